"""Bytes of keys and values: what is said of them before a run, and a budget for them."""

import warnings

import pytest
import torch
from support.oracle import relative_error
from support.zoo import ENTRIES

import ras
import ras_kernels
from ras.branches import cache_bytes
from ras.denoisers import families_of
from ras.sessions import session_of

PLAN = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0)
NAMES = pytest.mark.parametrize("name", ["flux", "flux-kontext", "qwen", "wan", "z-image", "krea2"])
BRANCHES = {"qwen": 2, "wan": 2, "krea2": 2}

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


def run(name, **settings):
    """The latents, the statistics, and the bytes of keys, values and their changes."""
    pipe, call = ENTRIES[name].build()
    kept = []
    with ras.enabled(pipe, plan=PLAN, **settings):
        session = session_of(pipe)
        begin = session.begin_call

        def noted(mount, inputs):
            found = begin(mount, inputs)
            kept.append(bytes_kept(session))
            return found

        session.begin_call = noted
        latents = call(len(PLAN))
        return latents, ras.stats(pipe), max(kept)


def bytes_kept(session):
    return sum(tensor.nbytes for cache in session._branches.caches for tensor in cache.tensors)


def bytes_of(name, dtype=torch.float32):
    """Of keys and values, and of their changes, in a run: as the layers say."""
    pipe, call = ENTRIES[name].build()
    with ras.enabled(pipe, plan=PLAN):
        call(len(PLAN))
        run = session_of(pipe).run
        ((transformer, family),) = families_of(pipe)
        layouts = list(run.layouts.values())
        batch = run.tally.samples * (2 if name == "z-image" else 1)
    sizes = [cache_bytes(transformer, family, layout, dtype) for layout in layouts]
    branches = BRANCHES.get(name, 1) // len(layouts)
    return [batch * branches * sum(part) for part in zip(*sizes)]


@NAMES
def test_what_the_layers_say_is_what_is_kept(name):
    keys, changes = bytes_of(name)
    assert run(name)[2] == keys + changes
    assert run(name, kv_correction=False)[2] == keys
    stats = run(name)[1]
    assert stats.cache_bytes > keys + changes  # the noise is kept, too


@NAMES
def test_no_room_for_changes(name):
    """Then keys and values are held as they are, without a word."""
    keys, changes = bytes_of(name)
    held = run(name, kv_correction=False)[0]
    latents, _, kept = run(name, max_cache_bytes=keys + changes - 1)
    assert kept < keys + changes and relative_error(latents, held) < 1e-6
    masks = masks_of(name)[2][2]
    latents, _, kept = run(name, max_cache_bytes=keys + masks)
    assert kept == keys and relative_error(latents, held) < 1e-6
    latents, _, kept = run(name, max_cache_bytes=keys + changes + masks)
    assert kept == keys + changes and relative_error(latents, held) > 1e-6


@NAMES
def test_no_room(name):
    """Whole steps at the same speed-up, with one warning, and no keys and values."""
    keys, _ = bytes_of(name)
    pipe, call = ENTRIES[name].build()
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ras.enable(pipe, plan=PLAN, max_cache_bytes=keys - 1)
            planned = ras.plan(pipe, len(PLAN))
            latents = call(len(PLAN))
            again = call(len(PLAN))
        (warning,) = [w for w in caught if issubclass(w.category, ras.RASWarning)]
        assert f"max_cache_bytes={keys - 1}" in str(warning.message)
        stats = ras.stats(pipe)
        assert stats.steps_sparse == 0 < stats.steps_skipped and stats.runs == 2
        assert bytes_kept(session_of(pipe)) == 0
        assert name == "z-image" or planned.cache_bytes > 0  # which has no size of its own
        assert latents.isfinite().all() and relative_error(again, latents) < 1e-6


def masks_of(name, **settings):
    """How many layers have a mask, how many masks there are, and their bytes, at the most."""
    pipe, call = ENTRIES[name].build()
    ras.enable(pipe, plan=PLAN, **settings)
    session, seen = session_of(pipe), [(0, 0, 0)]
    begin = session.begin_call

    def noted(mount, inputs):
        found = begin(mount, inputs)
        masked = [each.mask for each in session._branches.caches if each.mask is not None]
        sizes = {mask.data_ptr(): mask.nbytes for mask in masked}
        seen.append((len(masked), len(sizes), sum(sizes.values())))
        return found

    session.begin_call = noted
    return call(len(PLAN)), ras.stats(pipe), max(seen)


def test_one_mask_for_all_layers():
    """Kept once where the model makes one, and counted among the bytes that are kept."""
    _, stats, (layers, masks, nbytes) = masks_of("hunyuan-video")
    assert layers > masks == 1 and nbytes > 0
    assert stats.cache_bytes > run("hunyuan-video")[2] + nbytes


def test_masks_count_in_the_budget():
    """Chroma makes a square one in each layer, which nobody knows of before the first step."""
    held, _, (_, _, nbytes) = masks_of("chroma", kv_correction=False)
    budget = run("chroma", kv_correction=False)[2] + nbytes
    fits, stats, _ = masks_of("chroma", kv_correction=False, max_cache_bytes=budget)
    assert relative_error(fits, held) < 1e-6 and stats.steps_sparse > 0
    with pytest.warns(ras.RASWarning, match="max_cache_bytes"):
        whole, stats, _ = masks_of("chroma", kv_correction=False, max_cache_bytes=budget - 1)
    assert stats.steps_sparse == 0 < stats.steps_skipped and whole.isfinite().all()


@pytest.mark.parametrize("dtype", ras_kernels.CODES, ids=str)
def test_caches_of_8_bits_are_counted_with_their_scales(dtype):
    """What is said before a run, what is kept, and a budget that is one byte too small."""
    keys, changes = bytes_of("flux", dtype)
    whole = [size * 16 // (16 + 4) for size in (keys, changes)]  # 16 numbers have a scale of 4
    assert [4 * size for size in whole] == list(bytes_of("flux"))
    assert run("flux", cache_dtype=dtype)[2] == keys + changes
    assert run("flux", cache_dtype=dtype, max_cache_bytes=keys + changes - 1)[2] == keys
    pipe, _ = ENTRIES["flux"].build()
    ras.enable(pipe, plan=PLAN, cache_dtype=dtype)
    planned = ras.plan(pipe, len(PLAN), height=128, width=128, text_tokens=8)
    assert planned.cache_bytes == keys + changes


@pytest.mark.parametrize(
    "value, error", [("int8", TypeError), (torch.float16, ValueError), (torch.uint8, ValueError)]
)
def test_no_dtype_of_caches(value, error):
    with pytest.raises(error, match=r"must be torch\.int8, torch\.float8_e4m3fn, or None"):
        ras.RASConfig(cache_dtype=value)


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_no_budget(value, error):
    with pytest.raises(error, match="max_cache_bytes"):
        ras.RASConfig(max_cache_bytes=value)


def test_plan_tells_the_bytes_of_a_sample():
    """For a size that is given, per branch of guidance; nothing where steps are whole."""
    pipe, call = ENTRIES["flux"].build()
    ras.enable(pipe, plan=PLAN)
    planned = ras.plan(pipe, len(PLAN), height=128, width=128, text_tokens=8)
    call(len(PLAN))
    assert planned.cache_bytes == sum(bytes_of("flux"))
    assert f"{planned.cache_bytes:,} bytes" in str(planned)
    held = ras.enable(pipe, plan=PLAN, kv_correction=False)
    assert (
        ras.plan(held, len(PLAN), height=128, width=128, text_tokens=8).cache_bytes
        == (bytes_of("flux")[0])
    )
    whole = ras.plan(ras.enable(pipe, speedup=2), len(PLAN))
    assert whole.cache_bytes is None and "bytes" not in str(whole)


def test_caches_of_the_first_transformer_go_at_the_switch():
    """Wan 2.2: never both models' at once."""
    pipe, call = ENTRIES["wan22"].build()
    ras.enable(pipe, plan=PLAN)
    session, kept = session_of(pipe), []
    after = session._after_step

    def noted(*step):
        after(*step)
        kept.append({name[0] for name, branch in session._branches.items() if branch.caches})

    session.origin._steps._observer.tell = lambda: noted
    call(len(PLAN))
    assert {mount.key for mount in session.mounts} == set().union(*kept)
    assert all(len(models) <= 1 for models in kept)
