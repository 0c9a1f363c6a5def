"""What a host reads of a device's values, which has it wait; and what a device can do alone.

On a CPU a run is watched as if its tensors were on a device, and a step traced with tensors that
have no values, as a CUDA graph is captured. The rest needs a GPU.
"""

import collections
import traceback

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from support import pipelines
from support.operands import DEVICE
from support.oracle import relative_error
from support.runs import run
from support.zoo import ENTRIES
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ras
from ras.sessions import session_of
from ras_kernels import _checks

STEPS = 10
PARTIAL = (1, 1, 0.5, 1, 0.25, 0.5, 1, 0, 0.5, 1)
CONFIGS = {
    "default": ras.RASConfig(speedup=2),
    "partial": ras.RASConfig(plan=PARTIAL),
    "paper": ras.RASConfig.paper(scheduler_start_step=2, error_reset_steps=(6,)),
}
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Indices of a GPU are not read; those of a CPU are, for there that costs next to nothing."""
    monkeypatch.setattr(_checks, "check_range", lambda *_: None)


# --- reads ----------------------------------------------------------------------------------------

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits(func, args):
    """Whether an op hands a value to the host, or has a shape that depends on one."""
    name = func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        masks = (torch.bool, torch.uint8)
        return any(i is not None and i.dtype in masks for i in args[1])
    return bool(WAITING & set(func.tags))


class Reads(TorchDispatchMode):
    """Counts where the host reads values, of all tensors but those that it has itself.

    Those are what is `given` to it, what it makes of such alone, and `scheduler.sigmas`, which
    diffusers keeps on the CPU.
    """

    def __init__(self, monkeypatch, scheduler, *given):
        super().__init__()
        self.scheduler, self.given = scheduler, list(given)  # whose memory is not to be used again
        self.places = collections.Counter()
        for name in ("tolist", "numpy", "cpu", "to"):  # the first two are no ops, the others copy
            monkeypatch.setattr(torch.Tensor, name, self.noting(name))

    def noting(self, name):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, **kwargs):
            if (name != "to" or "cpu" in tree_leaves((args, kwargs))) and not self.has(tensor):
                self.note(name)
            return method(tensor, *args, **kwargs)

        return noted

    def has(self, tensor):
        mine = [*self.given, getattr(self.scheduler, "sigmas", None)]
        own = {t.untyped_storage().data_ptr() for t in mine if t is not None}
        return tensor.untyped_storage().data_ptr() in own

    def note(self, what):
        frames = (f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()))
        self.places[what, next(f for f in frames if "/torch/" not in f and __file__ not in f)] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        output = func(*args, **(kwargs or {}))
        if tensors and all(map(self.has, tensors)):
            self.given += [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        elif waits(func, args):
            self.note(func._schema.name)
        return output


def reads(monkeypatch, family, config, mask=None):
    """Where the host reads in a run, and how often; and the statistics of an enabled one."""
    pipe = getattr(pipelines, family)()
    inputs = getattr(pipelines, f"{family}_inputs")(pipe)
    if config is not None:
        ras.enable(pipe, config, mask=mask)
    with monkeypatch.context() as patch:
        watch = Reads(patch, pipe.scheduler)
        if mask is not None:
            watch.given.append(session_of(pipe).settings.mask)
        make = "diffusers.pipelines.lumina.pipeline_lumina.get_2d_rotary_pos_embed_lumina"

        def noted(*args, before=get_2d_rotary_pos_embed_lumina, **kwargs):
            watch.given.append(before(*args, **kwargs))
            return watch.given[-1]

        patch.setattr(make, noted)  # a table that is on the CPU, wherever the model is
        with watch:
            run(pipe, inputs, STEPS)
    return watch.places, None if config is None else ras.stats(pipe)


@pytest.mark.parametrize("family, count", [("sd3", 2), ("lumina", 2 + STEPS)])
@pytest.mark.parametrize("name", [*CONFIGS, "mask"])
def test_a_run_reads_no_more_than_a_dense_one(family, count, name, monkeypatch, as_on_a_device):
    """That is one of the scheduler for its first step, and one of Lumina's pipeline in each."""
    mask = torch.zeros(128, 128)
    mask[40:80, 40:80] = 1
    config = CONFIGS["partial" if name == "mask" else name]
    dense, _ = reads(monkeypatch, family, None)
    assert dense.total() == count
    found, stats = reads(monkeypatch, family, config, mask if name == "mask" else None)
    assert found == dense
    assert (stats.steps_sparse > 0) == (name != "default") and stats.steps_dense < STEPS


@pytest.mark.parametrize(
    "name, more", [("flux", 1), ("flux-kontext", 1), ("qwen", 0), ("wan", 0), ("z-image", 0)]
)
def test_partial_steps_of_any_transformer(name, more, monkeypatch, as_on_a_device):
    """FLUX tells by tensors alone where its tokens are: they are read once, before any step."""
    found = []
    for plan in (None, PARTIAL):
        pipe, call = ENTRIES[name].build()
        if plan is not None:
            ras.enable(pipe, plan=plan)
        with monkeypatch.context() as patch, Reads(patch, pipe.scheduler) as watch:
            call(STEPS)
        found.append(watch.places)
    dense, places = found
    assert ras.stats(pipe).steps_sparse == 4 and not dense - places
    assert sum((places - dense).values()) == more
    assert all("family.py" in place for _, place in places - dense)


def test_reads_are_seen(monkeypatch):
    """Of each kind, and not those of what the host has."""
    kinds = {
        "item": lambda t: t[0].item(),
        "float": lambda t: float(t[0]),
        "if": lambda t: bool(t[0] > 0),
        "equal": lambda t: torch.equal(t, t + 1),
        "allclose": lambda t: torch.allclose(t, t + 1),
        "nonzero": lambda t: t.nonzero(),
        "where": lambda t: torch.where(t > 0),
        "mask": lambda t: t[t > 0],
        "write by a mask": lambda t: t.clone().index_put_((t > 0,), t.new_zeros(())),
        "masked_select": lambda t: t.masked_select(t > 0),
        "unique": lambda t: t.unique(),
        "repeats": lambda t: t.repeat_interleave(t.long()),
        "tolist": lambda t: t.tolist(),
        "numpy": lambda t: t.numpy(),
        "cpu": lambda t: t.cpu(),
        "to": lambda t: t.to("cpu"),
    }
    scheduler = pipelines.euler()
    for name, read in kinds.items():
        ours, mine = torch.arange(3.0), torch.arange(3.0)
        with monkeypatch.context() as patch, Reads(patch, scheduler, mine) as watch:
            read(mine)
            assert not watch.places, name
            read(ours)
            assert watch.places, name
            before = watch.places.total()
            ours[ours.long()], (ours + mine).to(torch.float64), ours.where(ours > 0, mine)
            scheduler.sigmas.tolist()
            assert watch.places.total() == before, name


# --- a step by itself -----------------------------------------------------------------------------


class Loop:
    """Steps by hand of an SD3 pipeline's transformer."""

    def __init__(self, config=None, device="cpu", dtype=torch.float32):
        pipe = pipelines.sd3()
        self.scheduler = pipe.scheduler
        self.transformer = pipe.transformer.to(device, dtype)
        inputs = pipelines.sd3_inputs(pipe, 2)
        self.latents, self.text, self.pooled = (
            inputs[name].to(device, dtype)
            for name in ("latents", "prompt_embeds", "pooled_prompt_embeds")
        )
        self.device = device
        config = config or ras.RASConfig(plan=PARTIAL, keep_caches=True)
        ras.enable(self.transformer, config, scheduler=self.scheduler)

    def begin(self, steps=0):
        """A new run, up to a step."""
        self.scheduler.set_timesteps(STEPS, device=self.device)
        self.scheduler.set_begin_index(0)
        latents = self.latents
        for _ in range(steps):
            latents = self.step(self.noise(latents), latents)
        return latents

    @property
    def t(self):
        return self.scheduler.timesteps[self.scheduler.step_index or 0]

    def noise(self, latents):
        t = self.t.expand(len(latents))
        return self.transformer(latents, self.text, self.pooled, t, return_dict=False)[0]

    def step(self, noise, latents):
        return self.scheduler.step(noise, self.t, latents, return_dict=False)[0]

    @property
    def kept(self):
        branches = session_of(self.transformer)._branches.values()
        return [tensor for branch in branches for tensor in branch.held]


STEP_KINDS = {"dense": 3, "partial": 4, "skipped": 7}


@pytest.mark.parametrize("step", STEP_KINDS.values(), ids=STEP_KINDS)
def test_a_step_can_be_traced_without_values(step, as_on_a_device):
    """As CUDA graphs are: what is replayed with new latents is a call with them."""
    traced, eager = Loop(), Loop()
    latents, others = traced.begin(step), eager.begin(step)
    assert torch.equal(latents, others)
    options = dict(tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = make_fx(lambda x: traced.noise(x), **options)(torch.empty_like(latents))
    new = pipelines.normal(*latents.shape, seed=3)
    found, expected = graph(new), eager.noise(new)
    assert relative_error(found, expected) < 1e-6
    for mine, others in zip(traced.kept, eager.kept, strict=True):
        torch.testing.assert_close(mine, others)
    assert (relative_error(graph(-new), found) > 0.1) == (step != STEP_KINDS["skipped"])


def test_kept_caches_stay_where_they_are():
    loop, places = Loop(), []
    for _ in range(3):
        latents = loop.begin(STEPS - 1)
        places.append([tensor.data_ptr() for tensor in loop.kept])
        loop.step(loop.noise(latents), latents)
        assert [tensor.data_ptr() for tensor in loop.kept] == places[-1]
    assert len(places[0]) == 3 * 4 + 5 and places[0] == places[1] == places[2]


def test_caches_that_are_not_kept_are_freed():
    loop = Loop(ras.RASConfig(plan=PARTIAL))
    latents = loop.begin(STEPS - 1)
    assert len(loop.kept) == 3 * 4 + 5
    loop.step(loop.noise(latents), latents)
    assert not loop.kept


# --- on a GPU -------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_in_the_loop(name):
    """Between the first and the last step, in which a dense run waits for nothing either."""
    pipe = pipelines.sd3().to(DEVICE)
    inputs = pipelines.sd3_inputs(pipe)
    inputs = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def watch(pipe, step, t, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < STEPS - 2 else "default")
        return tensors

    try:
        run(pipe, inputs, STEPS)
        try:
            run(pipe, inputs, STEPS, callback_on_step_end=watch)
        except RuntimeError as error:
            pytest.skip(f"this diffusers has a dense run wait: {error}")
        torch.cuda.set_sync_debug_mode("default")
        with ras.enabled(pipe, CONFIGS[name]):
            run(pipe, inputs, STEPS)  # compiles kernels
            run(pipe, inputs, STEPS, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("step", STEP_KINDS.values(), ids=STEP_KINDS)
def test_a_captured_step(step):
    """Replayed with new latents it gives what a call with them gives."""
    captured, eager = Loop(device=DEVICE), Loop(device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.begin(STEPS)  # compiles kernels
        latents = captured.begin(step).clone()
    torch.cuda.current_stream().wait_stream(stream)
    eager.begin(STEPS)
    torch.testing.assert_close(eager.begin(step), latents)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = captured.noise(latents)
    new = pipelines.normal(*latents.shape, seed=3).to(latents)
    latents.copy_(new)
    graph.replay()
    torch.testing.assert_close(found, eager.noise(new), rtol=1e-3, atol=1e-3)


@on_a_gpu
def test_compiled_with_cuda_graphs():
    """Each call of the transformer is a step of theirs, which its caller has to say."""
    options = dict(plan=PARTIAL, keep_caches=True)
    found = []
    for mode in (None, "reduce-overhead"):
        pipe = pipelines.sd3().to(DEVICE)
        inputs = pipelines.sd3_inputs(pipe)
        inputs = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in inputs.items()}
        ras.enable(pipe, **options)
        if mode is not None:
            ras.compile_repeated_blocks(pipe, mode=mode, fullgraph=True)
            pipe.transformer.register_forward_pre_hook(
                lambda *_: torch.compiler.cudagraph_mark_step_begin()
            )
        for _ in range(3):  # warmed up, recorded, replayed
            latents = run(pipe, inputs, STEPS).cpu()
        assert ras.stats(pipe).steps_sparse == 4
        found.append(latents)
    assert relative_error(*reversed(found)) < 1e-3
    torch._dynamo.reset()
