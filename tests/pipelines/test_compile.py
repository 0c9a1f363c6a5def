"""`torch.compile` of enabled models: as many graphs as there are kinds of work, and no other noise.

Graphs are counted by a backend that runs them as they were traced, so that results are those of the
same model without compilation; Inductor's own code is compared in two cases at the end.
"""

import functools

import pytest
import torch
from diffusers import UNet2DModel
from support import pipelines
from support.graphs import WITHIN_A_CALL, Graphs, recompile_nothing
from support.oracle import relative_error
from support.runs import SHARES, load_lora, loop, lora, run
from support.zoo import ENTRIES
from torch.utils._pytree import tree_leaves

import ras
import ras_kernels
from ras import projections

PARTIAL = (1, 1, 0.5, 1, 0, 0.5, 1)  # all kinds of step
SEEDS = (0, 1, 2, 3)
HELD = 2  # graphs, at most, of a skipped step: predicted tokens, and the image that they are

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture(autouse=True)
def compiler():
    """No graphs of other tests; and where a call cannot, a higher limit on their number."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch({} if WITHIN_A_CALL else {"cache_size_limit": 64}):
        yield
    torch._dynamo.reset()


# --- models and the ways to compile them ----------------------------------------------------------

SD35 = dict(qk_norm="rms_norm", dual_attention_layers=(0,))
FAMILIES = {
    "SD3": (pipelines.sd3, pipelines.sd3_inputs, {}),
    "SD3.5": (pipelines.sd3, pipelines.sd3_inputs, SD35),
    "Lumina": (pipelines.lumina, pipelines.lumina_inputs, {}),
}
KINDS = {"SD3": 2, "SD3.5": 3, "Lumina": 1}  # of block: SD3's last is another, 3.5's first too


def make(family, layers=None):
    """A pipeline with a layer of each kind unless told, and what makes its inputs of a seed."""
    pipeline, inputs, config = FAMILIES[family]
    pipe = pipeline(num_layers=layers or KINDS[family], **config)
    return pipe, lambda seed: inputs(pipe, seed=seed)


def blocks(pipe, **options):
    assert ras.compile_repeated_blocks(pipe, fullgraph=True, **options) is pipe


def whole(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, **options)


def kinds_of(way, family):
    """Graphs of one step."""
    return KINDS[family] if way is blocks else 1


def layers_of(way, family):
    """Few: those of a whole model are traced one by one."""
    return KINDS[family] if way is blocks else min(KINDS[family], 2)


def sample(pipe, inputs, seed):
    return run(pipe, inputs(seed), len(PARTIAL), seed=seed)


@functools.cache
def uncompiled(family, config, count=4, layers=None):
    """What runs for so many seeds give without compilation; `config` None is without RAS."""
    pipe, inputs = make(family, layers)
    if config is not None:
        ras.enable(pipe, config)
    return [sample(pipe, inputs, seed) for seed in SEEDS[:count]]


def config_of(ratio=0.5, **settings):
    return ras.RASConfig(plan=[ratio if share == 0.5 else share for share in PARTIAL], **settings)


def check(found, expected):
    assert relative_error(found, expected) < 1e-5


def check_runs(pipe, inputs, expected):
    """The first run may compile, the others not; the latents are the expected ones, one a seed."""
    found = [sample(pipe, inputs, SEEDS[0])]
    with recompile_nothing():
        found += [sample(pipe, inputs, seed) for seed in SEEDS[1 : len(expected)]]
    for latents, others in zip(found, expected):
        check(latents, others)
    assert relative_error(found[1], found[0]) > 0.1


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [blocks, whole])
def test_compiled_before(family, way):
    """With dense graphs there already, to which `disable` goes back."""
    kinds, layers, graphs = kinds_of(way, family), layers_of(way, family), Graphs()
    pipe, inputs = make(family, layers)
    way(pipe, backend=graphs)
    dense = sample(pipe, inputs, 0)
    check(dense, uncompiled(family, None, 1, layers)[0])
    assert graphs.layers == [set()] * kinds

    ras.enable(pipe, config_of())
    expected = uncompiled(family, config_of(), layers=layers)
    check_runs(pipe, inputs, expected)
    stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (4, 2, 1)
    assert len(graphs) == 3 * kinds
    with recompile_nothing():
        ras.enable(pipe, config_of())
        check(sample(pipe, inputs, 0), expected[0])

    ras.enable(pipe, config_of(0.25))
    check(sample(pipe, inputs, 0), uncompiled(family, config_of(0.25), 1, layers)[0])
    assert len(graphs) == 4 * kinds and len(graphs.held) <= (0 if way is blocks else HELD)

    ras.disable(pipe)
    with recompile_nothing():
        assert torch.equal(sample(pipe, inputs, 0), dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [blocks, whole])
def test_compiled_after(family, way):
    layers, graphs = layers_of(way, family), Graphs()
    pipe, inputs = make(family, layers)
    ras.enable(pipe, config_of())
    way(pipe, backend=graphs)
    assert ras.is_enabled(pipe)
    check_runs(pipe, inputs, uncompiled(family, config_of(), layers=layers))
    assert len(graphs) == 2 * kinds_of(way, family) and all(graphs.layers)


def test_compiled_in_place():
    (pipe, inputs), graphs = make("Lumina"), Graphs()
    pipe.transformer.compile(backend=graphs, fullgraph=True)
    dense = sample(pipe, inputs, 0)
    with ras.enabled(pipe, config_of()):
        check_runs(pipe, inputs, uncompiled("Lumina", config_of()))
    with recompile_nothing():
        assert torch.equal(sample(pipe, inputs, 0), dense)
    assert len(graphs) == 3 and graphs.layers[0] == set()


@pytest.mark.parametrize("dynamic, counts", [(False, [2, 3, 4, 4]), (None, [2, 3, 3, 3])])
def test_ratios(dynamic, counts):
    """With static shapes each costs a graph; otherwise the second one's is for any other, too.

    However many blocks of a kind there are.
    """
    (pipe, inputs), graphs, found = make("Lumina", 3), Graphs(), []
    blocks(pipe, backend=graphs, dynamic=dynamic)
    for ratio in (0.5, 0.25, 0.125, 0.5):
        with ras.enabled(pipe, config_of(ratio)):
            latents = sample(pipe, inputs, 0)
        check(latents, uncompiled("Lumina", config_of(ratio), 1, 3)[0])
        found.append(len(graphs))
    assert found == counts


# --- settings and models --------------------------------------------------------------------------

SETTINGS = {
    "paper": ras.RASConfig.paper(scheduler_start_step=2, error_reset_steps=(4,)),
    "held": config_of(extrapolation=0.0),
    "text stays": config_of(reuse_text=True),
    "int8": config_of(cache_dtype=torch.int8, keep_caches=True),
    "whole steps": ras.RASConfig(plan=SHARES[: len(PARTIAL)]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    (pipe, inputs), graphs, config = make("SD3"), Graphs(), SETTINGS[name]
    whole(pipe, backend=graphs)
    ras.enable(pipe, config)
    check_runs(pipe, inputs, uncompiled("SD3", config, 2))
    partial = ras.stats(pipe).steps_sparse > 0
    assert len(graphs) == 1 + partial and partial == (name != "whole steps")
    assert len(graphs.held) <= HELD and bool(graphs.held) == (name != "paper")


@pytest.mark.parametrize("way", [blocks, whole])
def test_kept_caches(way):
    """What tells compilers that they stay where they are costs no graph."""
    (pipe, inputs), graphs = make("Lumina"), Graphs()
    ras.enable(pipe, config_of(keep_caches=True))
    way(pipe, backend=graphs)
    check_runs(pipe, inputs, uncompiled("Lumina", config_of()))
    assert len(graphs) == 2


@pytest.mark.parametrize("how", ["blocks", "wrapped", "in place"])
@pytest.mark.parametrize("before", [True, False])
def test_a_bare_transformer(how, before):
    """In a loop by hand, which calls what `torch.compile` returned."""
    pipe, scheduler, graphs = pipelines.sd3(num_layers=1), pipelines.euler(), Graphs()
    bare = pipe.transformer
    inputs = [pipelines.sd3_inputs(pipe, seed=seed) for seed in SEEDS[:2]]
    with ras.enabled(bare, config_of(), scheduler=scheduler):
        expected = [loop(bare, scheduler, each, len(PARTIAL)) for each in inputs]

    def compiled(model):
        options = dict(backend=graphs, fullgraph=True)
        if how == "wrapped":
            return torch.compile(model, **options)
        if how == "blocks":
            return ras.compile_repeated_blocks(model, **options)
        model.compile(**options)
        return model

    model = compiled(bare) if before else bare
    assert ras.enable(model, config_of(), scheduler=scheduler) is model
    model = model if before else compiled(model)
    assert (model is bare) == (how != "wrapped")
    found = [loop(model, scheduler, inputs[0], len(PARTIAL))]
    with recompile_nothing():
        found.append(loop(model, scheduler, inputs[1], len(PARTIAL)))
    for latents, others in zip(found, expected):
        check(latents, others)
    assert ras.stats(model).steps_sparse == 2 and len(graphs) == 2
    ras.disable(model)
    assert not ras.is_enabled(bare)


def test_a_lora_loaded_before():
    """Its layers are in the graphs: the three blocks have different ones, and share none."""
    pipe, graphs = pipelines.sd3(), Graphs()
    load_lora(pipe, lora(pipe.transformer, seed=5)[0])

    def inputs(seed):
        return pipelines.sd3_inputs(pipe, seed=seed)

    with ras.enabled(pipe, config_of()):
        expected = [sample(pipe, inputs, seed) for seed in SEEDS[:2]]
    blocks(pipe, backend=graphs)
    ras.enable(pipe, config_of())
    check_runs(pipe, inputs, expected)
    assert len(graphs) == 2 * 3


@pytest.mark.parametrize("name", ["flux", "qwen", "z-image", "ltx2"])
@pytest.mark.parametrize("way", [blocks, whole])
def test_whole_steps_of_any_transformer(way, name):
    """One call and two, a list and two tensors: later runs compile nothing."""
    (pipe, draw), graphs = ENTRIES[name].build(), Graphs()
    with ras.enabled(pipe, speedup=2):
        expected = tree_leaves(draw(8))
    ras.enable(pipe, speedup=2)
    way(pipe, backend=graphs)
    found = tree_leaves(draw(8))
    with recompile_nothing():
        again = tree_leaves(draw(8))
    for latents, others, plain in zip(found, again, expected, strict=True):
        check(latents, plain)
        assert torch.equal(latents, others)
    assert 0 < len(graphs) <= 8 and ras.stats(pipe).speedup_ceiling == 2


# --- compile_repeated_blocks ----------------------------------------------------------------------


def test_options_are_passed_on(monkeypatch):
    pipe, asked = pipelines.sd3(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: asked.append((self, kw)))
    assert ras.compile_repeated_blocks(pipe, mode="reduce-overhead", dynamic=False) is pipe
    limit = {"recompile_limit": 64} if WITHIN_A_CALL else {}
    assert asked == [
        (block, dict(mode="reduce-overhead", dynamic=False, **limit))
        for block in pipe.transformer.transformer_blocks
    ]
    asked.clear()
    lumina = pipelines.lumina().transformer
    assert ras.compile_repeated_blocks(lumina, recompile_limit=3) is lumina
    assert asked == [(block, {"recompile_limit": 3}) for block in lumina.layers]


def test_what_is_not_supported_is_named():
    parts = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    model = UNet2DModel(block_out_channels=(32,), **parts)
    with pytest.raises(ValueError, match="UNet2DModel is not supported"):
        ras.compile_repeated_blocks(model)
    with pytest.raises(TypeError, match="got int"):
        ras.compile_repeated_blocks(3)


# --- what runs on GPUs ----------------------------------------------------------------------------

PER_HEAD = {"norm_rotary", "norm_rotary_scatter_"}


@pytest.mark.parametrize(
    "family, way, ops",
    [
        ("SD3", blocks, {"qkv_scatter_"}),
        ("SD3.5", blocks, PER_HEAD),
        ("Lumina", whole, PER_HEAD),
    ],
)
def test_fused_projections(family, way, ops, monkeypatch):
    """As on a GPU, where kernels take the place of plain layers; here they are definitions."""
    layers, graphs = layers_of(whole, family), Graphs()
    pipe, inputs = make(family, layers)
    expected = uncompiled(family, config_of(), 2, layers)

    def fuses(tokens):
        return not torch.is_autocast_enabled(tokens.device.type)

    monkeypatch.setattr(projections, "fuses", fuses)
    ras.enable(pipe, config_of())
    way(pipe, backend=graphs)
    check_runs(pipe, inputs, expected)
    assert len(graphs) == 2 * layers
    assert all(found >= ops for found in graphs.layers)


# --- Inductor's own code --------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.cuda.is_available() and ras_kernels.backend("cpu") == "triton",
    reason="Inductor's own kernels need a compiler of Triton",
)
@pytest.mark.parametrize("family, way", [("SD3", blocks), ("Lumina", whole)])
def test_inductor(family, way):
    pipe, inputs = make(family)
    ras.enable(pipe, config_of())
    way(pipe)
    check_runs(pipe, inputs, uncompiled(family, config_of(), 2))
