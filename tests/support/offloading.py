"""Ways to have a transformer's weights elsewhere, or other than they seem, until they are needed.

On a CPU they go from there to there, and what is loaded when can be counted.
"""

import accelerate
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.utils import torch_utils

from support.operands import DEVICE

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def by_model(pipe):
    pipe.enable_model_cpu_offload(device=DEVICE)


def sequentially(pipe):
    if DEVICE == "cuda":
        pipe.enable_sequential_cpu_offload(device=DEVICE)
    else:  # which that refuses to go back to
        accelerate.cpu_offload(pipe.transformer, CPU)


def by_groups(level, streams=False, **options):
    def apply(pipe):
        pipe.transformer.enable_group_offload(
            onload_device=torch.device(DEVICE),
            offload_device=CPU,
            offload_type=level,
            num_blocks_per_group=None if level == "leaf_level" else 1,
            use_stream=streams and DEVICE == "cuda",
            **options,
        )

    def apply_with_a_stream_of_nothing(pipe):
        config = group_offloading.GroupOffloadingConfig(
            onload_device=CPU,
            offload_device=CPU,
            offload_type=group_offloading.GroupOffloadingType(level),
            non_blocking=False,
            record_stream=False,
            low_cpu_mem_usage=True,
            num_blocks_per_group=1,
            stream=torch.cpu.Stream(),
        )
        group_offloading._apply_group_offloading(pipe.transformer, config)

    def apply_if_possible(pipe):
        if DEVICE == "cpu" and not hasattr(torch_utils, "TorchDeviceBackend"):
            pytest.skip("group offloading of this version of diffusers needs a GPU")
        (apply_with_a_stream_of_nothing if streams and DEVICE == "cpu" else apply)(pipe)

    return apply_if_possible


def casting(storage):
    def apply(pipe):
        transformer = pipe.to(DEVICE).transformer
        transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    return apply


WAYS = {
    "model": by_model,
    "sequential": sequentially,
    "leaves": by_groups("leaf_level"),
    "leaves-streams": by_groups("leaf_level", streams=True),
    "blocks": by_groups("block_level"),
    "blocks-streams": by_groups("block_level", streams=True),
    "float8": casting(FP8),
    "bfloat16": casting(torch.bfloat16),
}


def no_streams(monkeypatch):
    """Where there is no GPU, do what streams do between transfers, without any."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
        monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
