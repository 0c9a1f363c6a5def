"""What others have put on a model: refused by name, or dense with one warning, and never wrong."""

import functools
import types
import warnings

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks.hooks import CacheContext, ModelHook, _set_cache_context
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import run
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES

import ras

PARTIAL = (1, 1, 0.5, 0.5, 1, 0.5, 0.3, 0.5)
STEPS = len(PARTIAL)

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

CACHES = {
    "pyramid attention": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    ),
    "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1
    ),
    "magcache": lambda: diffusers.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), threshold=0.3
    ),
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "faster": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
        is_guidance_distilled=True,
    ),
}
EVERY_CACHE = pytest.mark.parametrize("cache", CACHES)


def flux():
    """A pipeline that has a cache context, and what draws with it."""
    pipe, call = ENTRIES["flux"].build()
    return pipe, functools.partial(call, STEPS)


def noted(draw):
    """What a run gives, and what RAS has warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = draw()
    return result, [str(w.message) for w in caught if issubclass(w.category, ras.RASWarning)]


# --- caches ---------------------------------------------------------------------------------------


@EVERY_CACHE
@pytest.mark.parametrize("settings", [{}, dict(plan=PARTIAL), dict(speedup=3)])
def test_a_cache_before(cache, settings):
    pipe, _ = flux()
    pipe.transformer.enable_cache(CACHES[cache]())
    before = Snapshot(pipe)
    with pytest.raises(ValueError, match=r"of diffusers.* decides by itself what the transformer"):
        ras.enable(pipe, **settings)
    check_undone(before, pipe, ran=False)
    pipe.transformer.disable_cache()
    ras.enable(pipe, **settings)


@pytest.mark.parametrize(
    "cache", sorted(CACHES.keys() - {"faster"})
)  # which fails by itself on FLUX
@pytest.mark.parametrize("settings", [dict(plan=PARTIAL), dict(speedup=2)])
def test_a_cache_after(cache, settings):
    """Every run with it is what it would be without RAS, and says so once; then RAS goes on."""
    pipe, draw = flux()
    pipe.transformer.enable_cache(CACHES[cache]())
    expected = draw()
    pipe.transformer.disable_cache()
    ras.enable(pipe, **settings)
    ours, told = noted(draw)
    assert told == []
    pipe.transformer.enable_cache(CACHES[cache]())
    for times in (1, 0):
        result, told = noted(draw)
        assert torch.equal(result, expected)
        assert len(told) == times and all("so that the run is dense" in each for each in told)
    assert ras.stats(pipe).steps_dense == STEPS
    pipe.transformer.disable_cache()
    assert torch.equal(draw(), ours)


def test_a_cache_without_its_config():
    """Put on by diffusers' functions, which tell the transformer nothing."""
    pipe = pipelines.sd3()
    hook = lambda module, args: _set_cache_context(module, CacheContext("x"))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(hook)
    diffusers.hooks.apply_taylorseer_cache(pipe.transformer, CACHES["taylorseer"]())
    with pytest.raises(ValueError, match="TaylorSeerCacheHook of diffusers on transformer_blocks"):
        ras.enable(pipe)


class Doubling(ModelHook):
    """A hook that diffusers has never heard of."""

    def post_forward(self, module, output):
        return output


def test_any_other_hook_of_diffusers():
    pipe, _ = flux()
    layer = pipe.transformer.single_transformer_blocks[1].attn
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Doubling(), "doubling")
    with pytest.raises(ValueError, match=r"Doubling of diffusers on single_.*\.1\.attn"):
        ras.enable(pipe)
    pipe, _ = flux()
    apply_layer_skip(
        pipe.transformer, LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=True)
    )
    with pytest.raises(ValueError, match=r"of diffusers on transformer_blocks\.1"):
        ras.enable(pipe)


# --- what stands in for forward -------------------------------------------------------------------


def every_other_call(transformer):
    """As TeaCache's users do: a forward that computes each other call."""
    forward, kept = transformer.forward, []

    @functools.wraps(type(transformer).forward)
    def cached(self, *args, **kwargs):
        kept.append(kept[-1] if len(kept) % 2 else forward(*args, **kwargs))
        return kept[-1]

    transformer.forward = types.MethodType(cached, transformer)


def test_a_forward_of_the_transformer():
    pipe, draw = flux()
    every_other_call(pipe.transformer)
    expected = draw()
    before = Snapshot(pipe)
    with pytest.raises(ValueError, match=r"test_others.cached, which stands in for forward"):
        ras.enable(pipe)
    check_undone(before, pipe, ran=False)
    pipe, draw = flux()
    ras.enable(pipe, plan=PARTIAL)
    every_other_call(pipe.transformer)
    result, told = noted(draw)
    assert torch.equal(result, expected) and len(told) == 1 and "test_others.cached" in told[0]
    with pytest.raises(ValueError, match=r"test_others\.cached"):
        ras.enable(pipe, speedup=2)


def test_a_forward_of_the_class(monkeypatch):
    pipe, _ = flux()
    forward = type(pipe.transformer).forward

    def patched(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", patched)
    with pytest.raises(ValueError, match=r"test_others\.patched, which stands in for forward"):
        ras.enable(pipe)


def test_a_forward_of_the_class_later(monkeypatch):
    pipe, draw = flux()
    expected = draw()
    ras.enable(pipe, plan=PARTIAL)
    forward = type(pipe.transformer).forward

    def patched(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", patched)
    result, told = noted(draw)
    assert torch.equal(result, expected) and len(told) == 1 and "test_others.patched" in told[0]


# --- what wants all rows --------------------------------------------------------------------------


def a_hook(block):
    block.register_forward_hook(lambda module, args, output: None)


def a_hook_of_attention(block):
    block.attn.register_forward_pre_hook(lambda module, args: None)


def a_forward(block):
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def a_class(block):
    block.__class__ = type("MergingBlock", (type(block),), {"__module__": "tomerge.patch"})


def chunks(block):
    block.set_chunk_feed_forward(4, 1)  # which not every number of rows can be divided by


CHANGES = {
    a_hook: r"the forward hook \S*test_others.<lambda> on transformer_blocks.1 ",
    a_hook_of_attention: r"the forward hook \S*test_others.<lambda> on transformer_blocks.1.attn",
    a_forward: r"test_others.<lambda>, which stands in for forward, on transformer_blocks.1 ",
    a_class: "the class MergingBlock of tomerge",
    chunks: "a feed-forward in chunks on transformer_blocks.1",
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_may_want_all_rows(change):
    """Refused where partial steps are asked for; else those are dense, and skipped ones are not."""
    pipe = pipelines.sd3()
    draw = functools.partial(run, pipe, sd3_inputs(pipe, 1), steps=STEPS)
    dense = draw()
    ras.enable(pipe, plan=PARTIAL)
    draw()
    change(pipe.transformer.transformer_blocks[1])
    for times in (1, 0):
        result, told = noted(draw)
        assert torch.equal(result, dense) and len(told) == times
    ras.disable(pipe)
    before = Snapshot(pipe)
    with pytest.raises(ValueError, match=CHANGES[change]):
        ras.enable(pipe, plan=PARTIAL)
    check_undone(before, pipe, ran=False)
    ras.enable(pipe, speedup=2)
    whole, told = noted(draw)
    assert told == [] and ras.stats(pipe).steps_skipped == 4 and whole.isfinite().all()


def test_what_does_not_change_rows():
    """Hooks on layers that take row by row, on the model as a whole, gradient checkpointing."""
    pipe = pipelines.sd3()
    draw = functools.partial(run, pipe, sd3_inputs(pipe, 1), steps=STEPS)
    ras.enable(pipe, plan=PARTIAL)
    expected, seen = draw(), []
    transformer = pipe.transformer
    for layer in (transformer, transformer.transformer_blocks[0].attn.to_q, transformer.proj_out):
        layer.register_forward_hook(lambda module, args, output: seen.append(0))
    transformer.enable_gradient_checkpointing()
    assert torch.equal(draw(), expected) and len(seen) == 3 * STEPS
