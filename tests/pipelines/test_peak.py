"""The peak of what a run holds."""

import gc
import weakref

import pytest
import torch
from support import pipelines
from support.operands import DEVICE
from support.pipelines import lumina_inputs, sd3_inputs
from support.runs import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- what is alive --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def only_what_is_new():
    """The garbage collector looks at what a test makes, not at a million objects of libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- the peak -------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that a transformer and what was made meanwhile held at once, between ops."""

    def __init__(self, transformer):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            self.note(tensor.untyped_storage())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        weakref.finalize(storage, self.freed, key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def freed(self, key):
        self.now -= self.alive.pop(key)


def peak_of(pipe, inputs, steps):
    """Between the first call of the transformer and the last, on whatever device it is."""
    if DEVICE == "cpu":
        gc.collect()
        with Peak(pipe.transformer) as peak:
            run(pipe, inputs, steps)
        return peak.most
    calls = []

    def begin(*_):
        if not calls:
            torch.cuda.reset_peak_memory_stats()

    def end(*_):
        calls.append(torch.cuda.max_memory_allocated())

    handles = [
        pipe.transformer.register_forward_pre_hook(begin),
        pipe.transformer.register_forward_hook(end),
    ]
    run(pipe, inputs, steps)
    for handle in handles:
        handle.remove()
    return calls[-1]


@pytest.mark.parametrize("plan", [(1, 1, 0.5, 0, 0.25, 1), (1, 1, 0, 1, 0, 1)])
@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_peak(family, plan):
    """That of the dense run and the caches, within 5 %."""
    on_gpu = DEVICE == "cuda"
    side, layers = (128, 8) if on_gpu else (48, 12)
    if family == "sd3":
        config = pipelines.SD3_MEDIUM if on_gpu else pipelines.SMALL
        pipe = pipelines.sd3(**{**config, "num_layers": layers})
        inputs = sd3_inputs(pipe, height=side, width=side, text=pipelines.SD3_TEXT)
    else:
        config = pipelines.LUMINA_NEXT if on_gpu else pipelines.SMALL_LUMINA
        pipe = pipelines.lumina(**{**config, "num_layers": layers})
        inputs = lumina_inputs(pipe, height=side, width=side, text=pipelines.LUMINA_TEXT)
    pipe.to(DEVICE, torch.float16 if on_gpu else torch.float32)
    for name, value in inputs.items():
        if torch.is_tensor(value):
            dtype = pipe.dtype if value.is_floating_point() else value.dtype
            inputs[name] = value.to(DEVICE, dtype)
    run(pipe, inputs, 1)  # what is allocated once, such as cuBLAS's workspace
    dense = peak_of(pipe, inputs, len(plan))
    with ras.enabled(pipe, plan=plan):
        run(pipe, inputs, len(plan))
        peak = peak_of(pipe, inputs, len(plan))
        told = ras.stats(pipe).cache_bytes
    assert told > 0
    assert peak == pytest.approx(dense + told, rel=0.05), (dense, told)
