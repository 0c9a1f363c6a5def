"""What ranks are held to in context parallelism: see `support.ranks`.

The oracle is `ras` on one process, which is held against its own; and the plain pipeline.
"""

import warnings

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import ras
from benchmarks import scale
from ras.policy.selection import Selection
from ras.sessions import session_of
from support.oracle import relative_error
from support.pipelines import normal, randomise
from support.snapshot import Snapshot
from support.traffic import of_calls
from support.zoo import ENTRIES

PLAN = (1, 1, 0.5, 0, 0.25, 1, 0.3, 0.5)
STEPS = len(PLAN)
ODD = dict(height=112, width=144)  # 63 tokens


def build(name, heads=4, **more):
    """A pipeline of the zoo with so many heads, and what runs it with `more`."""
    pipe, call = ENTRIES[name].build()
    config = {**pipe.transformer.config, "num_attention_heads": heads}
    if "caption_projection_dim" in config:  # of the width that the heads have
        config["caption_projection_dim"] = heads * config["attention_head_dim"]
    torch.manual_seed(0)
    pipe.register_modules(transformer=randomise(type(pipe.transformer).from_config(config)))
    return pipe, lambda steps=STEPS, **own: call(steps, **more, **own)


def spread(pipe, ranks, **degrees):
    """Have diffusers split the transformer's rows, by its own plan or, without one, nothing."""
    plan = {} if pipe.transformer._cp_plan is None else None
    degrees = degrees or dict(ulysses_degree=ranks.size)
    config = ContextParallelConfig(**degrees)
    pipe.transformer.enable_parallelism(config=config, cp_plan=plan)


def everyone(thing):
    """What each rank has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def as_alone(name, settings=None, **more):
    """All ranks have what one process has, and each a share of its keys and values."""
    settings = dict(plan=PLAN, **(settings or {}))
    pipe, call = build(name, **more)
    with ras.enabled(pipe, keep_caches=True, **settings):
        expected, alone = call(), ras.stats(pipe)
        caches = caches_of(pipe)
    ranks = yield
    spread(pipe, ranks)
    with warnings.catch_warnings(), ras.enabled(pipe, keep_caches=True, **settings):
        warnings.simplefilter("error", ras.RASWarning)
        found, stats = call(), ras.stats(pipe)
        assert [shape[:2] for shape in caches] == [shape[:2] for shape in caches_of(pipe)]
        assert [shape[2] for shape in caches] == [
            shape[2] * ranks.size for shape in caches_of(pipe)
        ]
    assert relative_error(found, expected) <= 1e-5
    assert all(torch.equal(other, found) for other in everyone(found))
    steps = stats.steps_dense, stats.steps_sparse, stats.steps_skipped
    assert steps == (alone.steps_dense, alone.steps_sparse, alone.steps_skipped) == (3, 4, 1)
    assert stats.tokens_computed == alone.tokens_computed


def caches_of(pipe):
    """The shapes of the keys that are kept, `(B, tokens, heads, size)`."""
    return [cache.tensors[0].shape for cache in session_of(pipe)._branches.caches]


def on_and_off(name="flux"):
    """In either order, and as it was after either; whole steps are diffusers' own."""
    pipe, call = build(name)
    with ras.enabled(pipe, plan=PLAN):
        expected = call()
    with ras.enabled(pipe, plan=(1, 0) * 4):
        whole = call()
    ranks = yield
    ras.enable(pipe, plan=PLAN)
    spread(pipe, ranks)
    assert relative_error(call(), expected) <= 1e-5
    ras.disable(pipe)
    dense, before = call(), Snapshot(pipe)
    ras.enable(pipe, plan=PLAN)
    assert relative_error(call(), expected) <= 1e-5
    ras.enable(pipe, plan=(1, 0) * 4)
    assert relative_error(call(), whole) <= 1e-5
    ras.disable(pipe)
    before.same_as(Snapshot(pipe), ignoring=("scheduler", "pipe"))
    assert torch.equal(call(), dense)


def splits_of(pipe):
    """What diffusers' hooks of context parallelism split and gather."""
    registries = (vars(part).get("_diffusers_hook") for part in pipe.transformer.modules())
    hooks = (hook for each in registries if each is not None for hook in each.hooks.values())
    return [hook.metadata for hook in hooks]


def interrupted(name="flux", *, off=False):
    """Diffusers' hooks are back where a partial step is broken off, or RAS is taken off in it."""
    pipe, call = build(name)
    plain = call()
    ranks = yield
    spread(pipe, ranks)
    splits = splits_of(pipe)
    ras.enable(pipe, plan=(1, 0.5) * 4)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            if off:
                ras.disable(pipe)
                raise KeyError  # of which nobody tells a model that is not enabled
            raise KeyboardInterrupt

    handle = pipe.transformer.norm_out.register_forward_pre_hook(fail)
    try:
        call()
        raise AssertionError("it was not interrupted")
    except (KeyboardInterrupt, KeyError):
        handle.remove()
    assert splits_of(pipe) == splits and all(splits)
    ras.disable(pipe)
    assert relative_error(call(), plain) <= 1e-5


def agreed(name="flux"):
    """Where ranks would choose unlike tokens, they take the first one's."""
    pipe, call = build(name)
    rows = torch.arange(64).repeat(2)

    def choosing(rank):
        choose = Selection.choose

        def chosen(self, tokens, count, sigma):
            found = choose(self, tokens, count, sigma)
            return rows[rank * 3 : rank * 3 + count].sort().values.expand_as(found).to(found)

        Selection.choose = chosen
        return lambda: setattr(Selection, "choose", choose)

    back = choosing(0)
    with ras.enabled(pipe, plan=PLAN):
        expected = call()
    back()
    ranks = yield
    spread(pipe, ranks)
    back = choosing(ranks.rank)
    with ras.enabled(pipe, plan=PLAN):
        assert relative_error(call(), expected) <= 1e-5
    back()


def counted(name, **of_model):
    """Collectives, bytes and FLOPs of each kind of step are as `benchmarks.scale` has them.

    So the rows are spread evenly: one rank more or less would be told in bytes.
    """
    pipe, call = build(name, **ODD)
    ranks = yield
    spread(pipe, ranks)
    told = []
    end = of_calls(pipe.transformer, told)
    with ras.enabled(pipe, plan=PLAN):
        call()
    end()
    model = getattr(scale, name)(heads=4, size=16, **of_model)
    calls = len(told) // STEPS
    for index, (collectives, count, flops) in enumerate(told):
        share = PLAN[index // calls]
        ours = scale.received(model, share, ranks.size, rank=ranks.rank, itemsize=4)
        assert collectives.total() == scale.collectives(model, share, ranks.size), (
            share,
            collectives,
        )
        assert count == ours, (share, count, ours)
        assert share or not collectives
        if ranks.rank == 0:
            assert flops == (scale.flops(model, share, ranks.size) if share else 0), (share, flops)


def checked(name="flux"):
    """`ras.check`, whose orders each rank draws for itself."""
    pipe, call = build(name)
    plain = type(pipe)

    def run(self):
        self.__class__ = plain
        torch.manual_seed(dist.get_rank())
        call(2)

    ranks = yield
    spread(pipe, ranks)
    pipe.__class__ = type(plain.__name__, (plain,), {"__call__": run})
    assert ras.check(pipe) < 1e-5


def whole_steps(name, told, heads=4, **degrees):
    """What there are no partial steps for is run by whole ones, with one warning that says why."""
    pipe, call = build(name, heads)
    ranks = yield
    spread(pipe, ranks, **degrees)
    refused(pipe, told, plan=PLAN)
    dense = call()
    with warnings.catch_warnings(record=True) as caught, ras.enabled(pipe):
        warnings.simplefilter("always")
        found, stats = call(), ras.stats(pipe)
    warned = [str(each.message) for each in caught if each.category is ras.RASWarning]
    assert sum(told in message for message in warned) == 1, warned
    assert stats.steps_skipped and not stats.steps_sparse
    assert not torch.equal(found, dense)


def sharded(name="flux"):
    """FSDP2, before and after `ras.enable`, each rank with noise of its own; not by pictures."""
    pipe, call = build(name)
    inputs = [dict(prompt_embeds=normal(1, 8, 32, seed=40 + rank)) for rank in range(2)]
    with ras.enabled(pipe, plan=PLAN):
        expected = [call(**prompt) for prompt in inputs]
    ranks = yield
    from torch.distributed.fsdp import fully_shard

    prompt, expected = inputs[ranks.rank], expected[ranks.rank]

    def shard(pipe):
        blocks = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
        for module in (*blocks[0], *blocks[1], pipe.transformer):
            fully_shard(module, mesh=init_device_mesh("cpu", (ranks.size,)))

    shard(pipe)
    dense = call(**prompt)
    for _ in range(2):
        with ras.enabled(pipe, plan=PLAN):
            assert relative_error(call(**prompt), expected) <= 1e-5
            assert ras.stats(pipe).steps_skipped == 1
        assert torch.equal(call(**prompt), dense)
        later, call = build(name)
        ras.enable(later, plan=PLAN)
        shard(later)
        ras.disable(later)
        pipe = later
    for settings in (dict(mask=torch.ones(8, 8)), dict(sample_ratio="edited")):
        refused(pipe, "FSDP", **settings)


def tensor_parallel(name="flux"):
    """Whole steps; diffusers' list of devices, which leaves CPUs out, is made longer."""
    pipe, call = build(name)
    with ras.enabled(pipe, plan=(1, 0) * 4):
        expected = call()
    yield
    from diffusers.hooks import tensor_parallel

    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    pipe.transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    with ras.enabled(pipe, plan=(1, 0) * 4):
        assert relative_error(call(), expected) <= 1e-5
    refused(pipe, "tensor parallelism", plan=PLAN)


def refused(pipe, told, **settings):
    """`ras.enable` raises an error that says so, and changes nothing."""
    before = Snapshot(pipe)
    try:
        ras.enable(pipe, **settings)
        raise AssertionError("it was not refused")
    except ValueError as error:
        assert told in str(error), error
    before.same_as(Snapshot(pipe))


def cases(size):
    """Those for so many ranks, by name."""
    small = dict(layers=2, feed_forward=64, text=8)
    stay, any_heads = dict(reuse_text=True), dict(ulysses_degree=2, ulysses_anything=True)
    if size == 2:
        return {
            "FLUX": as_alone("flux"),
            "FLUX, guided by two calls": as_alone("flux-true-cfg", **ODD),
            "Qwen-Image with masks": as_alone("qwen-padded", **ODD),
            "FLUX with ControlNet": as_alone("flux-controlnet", heads=2),
            "Wan": as_alone("wan", num_videos_per_prompt=2, **ODD),
            "Stable Diffusion 3": as_alone("sd3"),
            "on and off": on_and_off(),
            "interrupted": interrupted(),
            "switched off": interrupted(off=True),
            "agreed": agreed(),
            "bytes of FLUX": counted("flux", double=2, single=2, tokens=63, text=8, channels=16),
            "bytes of Wan": counted("wan", **small, tokens=189, channels=16),
            "check": checked(),
            "FSDP": sharded(),
            "tensor parallelism": tensor_parallel(),
            "heads": whole_steps(
                "flux", "ulysses_degree=2 does not divide 3 heads", heads=3, **any_heads
            ),
            "ring": whole_steps("sd3", "ring_degree=2", ring_degree=2),
            "FLUX.2": whole_steps("flux2", "Flux2Transformer2DModel"),
        }
    return {
        "FLUX, odd": as_alone("flux", num_images_per_prompt=2, **ODD),
        "FLUX, text stays": as_alone("flux", stay, **ODD),
        "Kontext": as_alone("flux-kontext"),
        "Qwen-Image-Edit": as_alone("qwen-edit-2511", stay),
        "Wan, times of tokens": as_alone("wan-per-token"),
        "Wan of a picture": as_alone("wan-image"),
        "Stable Diffusion 3": as_alone("sd3", stay, height=112, width=144, latents=None),
        "bytes of FLUX": counted("flux", double=2, single=2, tokens=63, text=8, channels=16),
    }
