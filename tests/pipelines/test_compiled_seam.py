"""Blocks of models that the seam serves, compiled one by one, for what they compute alone."""

import pytest
import torch
from support.graphs import WITHIN_A_CALL, Graphs, recompile_nothing
from support.oracle import relative_error
from support.pipelines import normal
from support.zoo import ENTRIES

import ras

PLAN = (1, 1, 0.5, 1, 0, 0.5, 1, 0.5)  # all kinds of step
STATIC = dict(fullgraph=True, dynamic=False)
DENSE = {"flux": 3, "qwen": 1, "wan": 1, "sd3": 2}
"""Graphs that diffusers' own blocks make of a dense run. FLUX has two kinds of block, of which the
second has two graphs: its first block gets tokens of other strides than the others."""

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch({} if WITHIN_A_CALL else {"cache_size_limit": 64}):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name, order", [("flux", "after"), *((name, "before") for name in DENSE)])
def test_a_dense_and_a_partial_graph(name, order):
    """For each kind of block, as many partial graphs as dense ones; later runs compile nothing."""
    pipe, call = ENTRIES[name].build()
    dense, plain = call(len(PLAN)), Graphs()
    with ras.enabled(pipe, plan=PLAN):
        expected = call(len(PLAN))
    if order == "before":
        ras.compile_repeated_blocks(pipe, backend=plain, **STATIC)
        assert torch.equal(call(len(PLAN)), dense) and len(plain) == DENSE[name]
        pipe, call = ENTRIES[name].build()
    graphs = Graphs()
    if order == "before":
        ras.compile_repeated_blocks(pipe, backend=graphs, **STATIC)
    ras.enable(pipe, plan=PLAN)
    if order == "after":
        ras.compile_repeated_blocks(pipe, backend=graphs, **STATIC)
    found = [call(len(PLAN))]
    with recompile_nothing():
        found += [call(len(PLAN)) for _ in range(3)]
    assert all(relative_error(latents, expected) < 1e-5 for latents in found)
    assert len(graphs) == 2 * DENSE[name] and ras.stats(pipe).steps_sparse == 3
    ras.disable(pipe)
    assert torch.equal(call(len(PLAN)), dense)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_other_latents(name):
    """They choose other regions, which is no reason to compile."""
    pipe, call = ENTRIES[name].build()
    ras.enable(pipe, plan=PLAN)
    ras.compile_repeated_blocks(pipe, backend=Graphs(), **STATIC)
    shape = call(len(PLAN)).shape
    with recompile_nothing():
        found = [call(len(PLAN), latents=normal(*shape, seed=seed)) for seed in range(2)]
    assert relative_error(*found) > 0.1


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_whole_transformers(name):
    """In one piece, apart from what is decided before and after."""
    (pipe, call), graphs = ENTRIES[name].build(), Graphs()
    with ras.enabled(pipe, plan=PLAN):
        expected = call(len(PLAN))
    ras.enable(pipe, plan=PLAN)
    pipe.transformer = torch.compile(pipe.transformer, backend=graphs, fullgraph=True)
    found = [call(len(PLAN))]
    with recompile_nothing():
        found.append(call(len(PLAN)))
    assert all(relative_error(latents, expected) < 1e-5 for latents in found)
    assert len(graphs) == 2
