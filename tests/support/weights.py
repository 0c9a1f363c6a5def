"""Small pipelines, and what `ras` gives with their weights where and what they are needed as."""

import torch

import ras
from support import pipelines
from support.offloading import FP8
from support.operands import DEVICE
from support.runs import run

PLAN = (1, 0, 1, 0.5, 0, 0.25, 1, 0.5)  # skips as soon as it may

FAMILIES = {
    "sd3": lambda **config: with_inputs("sd3", **config),
    "sd3.5": lambda **config: with_inputs(
        "sd3", qk_norm="rms_norm", dual_attention_layers=(0, 1), **config
    ),
    "lumina": lambda **config: with_inputs("lumina", **config),
}


def with_inputs(family, **config):
    pipe = getattr(pipelines, family)(**config)
    return pipe, getattr(pipelines, f"{family}_inputs")(pipe, 2)


def moved(inputs, device=DEVICE):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def expected_of(family, way):
    """What `ras` gives, and the plain model, with weights that are where they are needed."""
    pipe, inputs = FAMILIES[family]()
    if way in ("float8", "bfloat16"):  # those that are left of a round trip
        round_trip(pipe, FP8 if way == "float8" else torch.bfloat16)
    pipe.to(DEVICE)
    plain = run(pipe, moved(inputs), len(PLAN))
    with ras.enabled(pipe, plan=PLAN):
        return run(pipe, moved(inputs), len(PLAN)), plain


def round_trip(pipe, storage):
    """Cast what layerwise casting casts, without its hooks."""
    skipped = getattr(pipe.transformer, "_skip_layerwise_casting_patterns", None) or []
    for name, module in pipe.transformer.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
        if not isinstance(module, kinds) or any(part in name for part in ("norm", *skipped)):
            continue
        if "pos_embed" in name or "patch_embed" in name or name in ("proj_in", "proj_out"):
            continue
        module.to(storage).to(torch.float32)
