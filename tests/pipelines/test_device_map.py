"""A transformer whose layers are on devices of their own, as accelerate's `device_map` has it.

There is one device here, so a run is split between it and the disk, and the device of nothing
(`meta`) stands for a second one where only places are looked at.
"""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support import pipelines
from support.oracle import relative_error
from support.zoo import ENTRIES
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ras
from ras.branch import Branch
from ras.families import family_of
from ras.layout import Layout
from ras.mount import Mount
from ras.output import HeldTokens
from ras.plan import Reuse
from ras.projections import Projected
from ras.site import Walk

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


def test_a_split_run(tmp_path):
    """Layers of which some are on the disk give what they give together."""
    pipe, call = ENTRIES["flux"].build()
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0)):
        expected = call(4)
    places = {name: "cpu" for name, _ in pipe.transformer.named_children()}
    del places["transformer_blocks"]
    places |= {"transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    accelerate.dispatch_model(
        pipe.transformer, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert any(weight.is_meta for weight in pipe.transformer.parameters())
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0)):
        assert relative_error(call(4), expected) <= 1e-6
        assert ras.stats(pipe).steps_sparse == 1


class OneDevice(TorchDispatchMode):
    """Refuses what takes tensors of two devices, but for copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if "copy" not in func.name():
            assert len({tensor.device for tensor in tensors}) <= 1, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("carries", [False, True])
def test_caches_live_with_their_layers(carries):
    """And take the rows of a walk that is told of on another device."""
    transformer = pipelines.sd3().transformer
    attn = transformer.transformer_blocks[1].attn
    add_hook_to_module(attn, AlignDevicesHook(execution_device="meta"))
    mount, branch, layout = Mount(transformer, family_of(transformer)), Branch(), Layout((8, 8), 12)
    cpu = torch.device("cpu")
    room = dict(reuse=Reuse.CARRIED, carries=carries)
    mount.make_room(branch, 2, layout, torch.float32, cpu, **room)
    devices = [{tensor.device.type for tensor in cache.tensors} for cache in branch.caches]
    assert devices[:2] == [{"cpu"}, {"meta"}] and branch.tokens.noise.device == cpu
    cache = branch.caches[1]
    key = torch.empty(2, 16, *cache.tensors[0].shape[2:], device="meta")
    rows = torch.arange(16, dtype=torch.int32).expand(2, -1).contiguous()
    walk = Walk(HeldTokens(), layout, rows, kv_gain=torch.zeros(2, 64), image=rows)
    with OneDevice():
        found = cache.update(Projected(key, key), None, walk)
    assert all(each.is_meta and each.shape[1] == 76 for each in found)
