"""Partial steps by the seam, whatever else is done to the transformer: before and after `enable`.

FLUX has two lists of blocks and one call a step, Qwen-Image one list and guidance in two calls.
What a run is held to is `ras` on a pipeline that has the weights which the adapters or the storage
make of them; `tests/families` holds that to account.
"""

import copy
import pickle
import threading

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from peft import LoraConfig
from support.by_seam import PLAN, build, by_ras
from support.offloading import FP8, WAYS, no_streams
from support.oracle import relative_error
from support.pipelines import normal
from support.zoo import ENTRIES

import ras
from ras.seam import can_redirect, redirect
from ras.site import RASAttnProcessor, Site

NAMES = pytest.mark.parametrize("name", ["flux", "qwen"])
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
STORED = {"float8": FP8, "bfloat16": torch.bfloat16}

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture(autouse=True)
def streams_of_nothing(monkeypatch):
    no_streams(monkeypatch)


@pytest.fixture(autouse=True)
def backend_of_its_own(monkeypatch):
    """For diffusers, what one transformer attends by is what all others of the process do."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def changed(name, order, change):
    """The pipeline with the change made and `ras` enabled, in that order or the other."""
    pipe, call = build(name)
    if order == "after":
        ras.enable(pipe, plan=PLAN)
    change(pipe)
    if order == "before":
        ras.enable(pipe, plan=PLAN)
    return pipe, call


def check(name, order, change, expected):
    """Two runs are what is expected; afterwards the model is the dense one of the change alone."""
    pipe, call = changed(name, order, change)
    for _ in range(2):
        assert relative_error(call(len(PLAN)), expected) < 1e-5
        assert ras.stats(pipe).steps_sparse == 3
    ras.disable(pipe)
    plain, dense = build(name)
    change(plain)
    assert torch.equal(call(len(PLAN)), dense(len(PLAN)))


# --- weights that are elsewhere, or others --------------------------------------------------------


def as_stored(storage):
    """Weights of layers as they are after storage in another dtype, as layerwise casting does."""

    def change(pipe):
        transformer = pipe.transformer
        patterns = transformer._skip_layerwise_casting_patterns or ()
        for name, module in transformer.named_modules():
            skipped = any(pattern in name for pattern in (*patterns, "norm"))
            if isinstance(module, torch.nn.Linear) and not skipped:
                for weight in module.parameters(recurse=False):
                    weight.copy_(weight.to(storage).to(weight.dtype))

    return change


@ORDERS
@pytest.mark.parametrize("way", WAYS)
@NAMES
def test_offloaded(name, way, order):
    if way in STORED:  # what is cast is diffusers' to say: the same, enabled after it
        pipe, call = changed(name, "before", WAYS[way])
        expected = call(len(PLAN))
    else:
        expected = by_ras(name)
    pipe, call = changed(name, order, WAYS[way])
    for _ in range(2):
        assert relative_error(call(len(PLAN)), expected) < 1e-5
        assert ras.stats(pipe).steps_sparse == 3


LAYERS = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "proj_out"]


def adapted(pipe):
    """A LoRA on layers of all kinds, the one that the noise leaves by among them."""
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False)
    )


def merged(pipe):
    """The same LoRA, added to the weights."""
    other, _ = build("flux" if "Flux" in type(pipe).__name__ else "qwen")
    adapted(other)
    for name, module in other.transformer.named_modules():
        if hasattr(module, "lora_A"):
            weight = pipe.transformer.get_submodule(name).weight
            weight += module.lora_B["default"].weight @ module.lora_A["default"].weight


@ORDERS
@NAMES
def test_lora(name, order):
    expected = by_ras(name, merged)
    assert relative_error(expected, by_ras(name)) > 1e-3
    pipe, call = changed(name, order, adapted)
    assert relative_error(call(len(PLAN)), expected) < 1e-5
    pipe.transformer.delete_adapters("default")
    assert relative_error(call(len(PLAN)), by_ras(name)) < 1e-5


# --- processors and backends ----------------------------------------------------------------------


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def with_math(pipe):
    pipe.transformer.set_attention_backend("_native_math")


@ORDERS
@pytest.mark.parametrize("change", [fused, with_math])
@NAMES
def test_processors_of_others(name, change, order):
    """What is set while enabled stays after `disable`."""
    check(name, order, change, by_ras(name))


@NAMES
def test_unfused_again(name):
    pipe, call = changed(name, "after", fused)
    call(len(PLAN))
    pipe.transformer.unfuse_qkv_projections()
    assert relative_error(call(len(PLAN)), by_ras(name)) < 1e-5
    ras.disable(pipe)
    kinds = {type(processor) for processor in pipe.transformer.attn_processors.values()}
    assert not any(issubclass(kind, RASAttnProcessor) for kind in kinds)


@NAMES
def test_the_backend_is_asked_in_partial_steps(monkeypatch, name):
    """By the function that the processor calls, with the user's backend."""
    module = transformer_flux if name == "flux" else transformer_qwenimage
    plain, asked = module.dispatch_attention_fn, []

    def dispatch(query, key, *args, **kwargs):
        asked.append((query.shape[1] < key.shape[1], kwargs["backend"]))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    changed(name, "after", with_math)[1](len(PLAN))
    assert {backend.value for _, backend in asked} == {"_native_math"}
    assert {partial for partial, _ in asked} == {False, True}


@NAMES
def test_processors_are_the_very_same_afterwards(name):
    pipe, call = build(name)
    before = dict(pipe.transformer.attn_processors)
    states = [dict(vars(processor)) for processor in before.values()]
    with ras.enabled(pipe, plan=PLAN):
        during = dict(pipe.transformer.attn_processors)
        assert all(isinstance(processor, RASAttnProcessor) for processor in during.values())
        call(len(PLAN))
    after = pipe.transformer.attn_processors
    assert all(after[key] is processor for key, processor in before.items())
    assert [dict(vars(processor)) for processor in after.values()] == states


def test_copies_of_a_processor_are_plain():
    """Deep copies, copies and pickles do not lead back to the model that was enabled."""
    original = transformer_flux.FluxAttnProcessor()
    original._attention_backend = "flash"
    ours = redirect(original, Site(lambda: None))
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is transformer_flux.FluxAttnProcessor
        assert other._attention_backend == "flash"
    ours._attention_backend = "sage"
    assert original._attention_backend == "sage"


def test_what_cannot_be_redirected():
    class Other:
        def __call__(self, attn, hidden_states):
            return hidden_states

    def closed_over(attend=torch.nn.functional.scaled_dot_product_attention):
        F = torch.nn.functional

        class Closed:
            def __call__(self, attn, hidden_states):
                return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

        return Closed()

    made = {}
    exec(
        "class Made:\n    def __call__(self, attn, x): return F.scaled_dot_product_attention(x)",
        made,
    )
    for processor in (Other(), closed_over(), made["Made"]()):
        assert not can_redirect(processor)
        with pytest.raises(ValueError, match=type(processor).__name__):
            redirect(processor, Site(lambda: None))


def test_tracebacks_lead_to_diffusers(monkeypatch):
    """The lines of a redirected processor are those of its source."""
    pipe, call = build("flux")
    ras.enable(pipe, plan=PLAN)
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", None)
    with pytest.raises(TypeError) as error:
        call(len(PLAN))
    lines = [str(entry.statement) for entry in error.traceback]
    assert any("dispatch_attention_fn(" in line for line in lines)


# --- prompts of one shape, and loaders ------------------------------------------------------------


def test_prompts_that_are_padded_alike():
    """Lumina 2 tells by values alone how long a text is: each call has a layout of its own."""
    pipe, call = ENTRIES["lumina2"].build()
    mask = (torch.arange(8) < 5).long()[None]
    ras.enable(pipe, plan=PLAN, keep_caches=True)
    found = call(len(PLAN), negative_prompt_attention_mask=mask)
    assert ras.stats(pipe).steps_sparse == 3 and ras.stats(pipe).warnings == ()
    call(len(PLAN))  # caches of another layout stay out of it
    assert torch.equal(call(len(PLAN), negative_prompt_attention_mask=mask), found)


def test_a_class_that_is_found_makes_plain_processors():
    """As diffusers' loader of FLUX's IP-adapters does."""
    pipe, _ = build("flux")
    ras.enable(pipe, plan=PLAN)
    for processor in pipe.transformer.attn_processors.values():
        made = processor.__class__()
        assert type(made) is transformer_flux.FluxAttnProcessor


# --- threads --------------------------------------------------------------------------------------


def test_two_pipelines_in_two_threads():
    """FLUX and Qwen-Image, each in its own thread, are what they are one after the other."""
    expected, found = {name: by_ras(name) for name in ("flux", "qwen")}, {}
    pipes = {name: changed(name, "after", lambda pipe: None) for name in expected}

    def work(name):
        with torch.no_grad():
            found[name] = [pipes[name][1](len(PLAN)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, runs in found.items():
        assert all(torch.equal(latents, expected[name]) for latents in runs)


def test_two_pipelines_of_one_class_in_two_threads():
    pipes = [changed("flux", "after", lambda pipe: None) for _ in range(2)]
    noise = [normal(1, 64, 16, seed=seed) for seed in range(2)]
    expected = [call(len(PLAN), latents=noise[i]) for i, (_, call) in enumerate(pipes)]
    found = [None, None]

    def work(i):
        with torch.no_grad():
            found[i] = pipes[i][1](len(PLAN), latents=noise[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected)) and not torch.equal(*found)
