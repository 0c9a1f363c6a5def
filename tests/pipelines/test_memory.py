"""What caches take, and until when: `ras.stats` to the byte, and nothing while images are decoded.

The oracle of the bytes is the garbage collector: tensors that are alive in a run with `ras`, and
were not at the same point of a plain run.
"""

import gc
import math
from collections import Counter

import pytest
import torch
from support import pipelines
from support.operands import new_memory
from support.pipelines import lumina_inputs, sd3_inputs
from support.runs import Stop, run, stop_at

import ras
import ras_kernels

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]

PARTIAL = (1, 1, 0.5, 0, 1, 0.25, 0, 0.5)  # dense, partial and skipped steps
ENDS_DENSE = (1, 1, 0.5, 0, 0.25, 0, 1, 1)
EARLY = (1, 0.5, 0.5, 1, 0.5, 1, 0, 1)  # before there is any change
WHOLE = (1, 1, 0, 1, 0, 0, 1, 1)
SAMPLES, REGIONS = 2, 64
GUIDANCE_OF_LAYERS = dict(
    skip_guidance_layers=[1], skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.6
)


def sd3(**config):
    pipe = pipelines.sd3(vae=pipelines.autoencoder(), **config)
    return pipe, {**sd3_inputs(pipe, SAMPLES), "output_type": "pt"}


def lumina():
    pipe = pipelines.lumina()
    pipe.register_modules(vae=pipelines.autoencoder(channels=4))
    return pipe, {**lumina_inputs(pipe, SAMPLES), "output_type": "pt"}


FAMILIES = {
    "sd3": sd3,
    "sd3.5-medium": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "lumina": lumina,  # two heads of queries for each of keys
}


# --- what is alive --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def only_what_is_new():
    """The garbage collector looks at what a test makes, not at a million objects of libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


def tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def alive():
    """How many storages of each size there are, and what they hold."""
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors()}
    return Counter((tensor.untyped_storage().nbytes(), tensor.dtype) for tensor in found.values())


def more(now, before):
    """What there is more of, but for notes: rows to compute, their counts, an angle of Lumina's."""
    counts, angle = SAMPLES * REGIONS * 4, 12 * 8
    notes = Counter({(counts, torch.int32): 1, (angle, torch.complex64): 1})
    found = now - before - notes
    rows = [kind for kind in found if kind[1] == torch.int32 and kind[0] < counts]
    return found - Counter({kind: found[kind] for kind in rows})


def size(counted):
    return sum(nbytes * n for (nbytes, _), n in counted.items())


def after_each_step(pipe, inputs, **call):
    """What is alive when each step is done."""
    seen = []

    def look(pipe, step, t, tensors):
        seen.append(alive())
        return tensors

    run(pipe, inputs, callback_on_step_end=look, **call)
    return seen


def while_decoding(pipe, inputs, interrupt_at=None, look=alive, **call):
    """What is alive while the autoencoder works, in a run that may be interrupted after a step."""
    seen = []
    handle = pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda *_: seen.append(look()))

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == interrupt_at
        return tensors

    run(pipe, inputs, callback_on_step_end=interrupt, **call)
    handle.remove()
    (found,) = seen
    return found


# --- exact bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(extrapolation=0.0),
        dict(kv_correction=False),
        dict(metric="std"),
        dict(metric="l2norm", extrapolation=0.0, reuse_text=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [PARTIAL, ENDS_DENSE], ids=["ends-partial", "ends-dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_what_is_alive(family, plan, settings):
    pipe, inputs = FAMILIES[family]()
    plain = after_each_step(pipe, inputs)
    with ras.enabled(pipe, plan=plan, **settings):
        seen = after_each_step(pipe, inputs)
        told = ras.stats(pipe).cache_bytes
    sizes = [size(more(now, before)) for now, before in zip(seen, plain, strict=True)]
    assert told == max(sizes) > 0 == sizes[-1]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "settings, layers",
    [({}, False), ({}, True), (dict(extrapolation=0.0), True)],
    ids=str,
)
def test_bytes_in_the_middle_of_a_run(guidance, settings, layers):
    """Told at each step, of all branches of guidance; without a partial step only noise is kept."""
    call = dict(guidance=guidance, **(GUIDANCE_OF_LAYERS if layers and guidance > 1 else {}))
    pipe, inputs = sd3()
    plain = after_each_step(pipe, inputs, **call)
    for plan in (PARTIAL, tuple(map(math.ceil, ENDS_DENSE))):
        told = []

        def tell(pipe, told=told):
            told.append(ras.stats(pipe).cache_bytes)
            return alive()

        with ras.enabled(pipe, plan=plan, **settings):
            seen = []

            def look(pipe, step, t, tensors, seen=seen, tell=tell):
                seen.append(tell(pipe))
                return tensors

            run(pipe, inputs, callback_on_step_end=look, **call)
        sizes = [size(more(now, before)) for now, before in zip(seen, plain, strict=True)]
        assert told == [max(sizes[: n + 1]) for n in range(len(sizes))]


def test_bytes_by_hand():
    """Two branches of guidance, two heads of 32, three layers, 64 image and 12 text tokens."""
    pipe, inputs = sd3()
    both, width, noise = 2 * SAMPLES, 64, 2 * 2 * 16
    key = both * (REGIONS + 12) * width * 4
    change = both * REGIONS * width * 4
    kept = both * REGIONS * noise * 4  # by token: one patch of each channel
    guided = SAMPLES * REGIONS * noise * 4
    with ras.enabled(pipe, plan=PARTIAL):
        run(pipe, inputs)
        drift = guided + 3 * SAMPLES * REGIONS * 4  # a pace, a position and a wait for each region
        positions = (2 * REGIONS + 1) * both * 4  # two of each token, and s
        shown = 2 * guided + SAMPLES * 4  # the last two of all tokens, and s
        expected = 3 * 2 * (key + change) + 2 * kept + positions + drift + shown
        assert ras.stats(pipe).cache_bytes == expected
    with ras.enabled(pipe, plan=PARTIAL, extrapolation=0.0, metric="std"):
        run(pipe, inputs)
        ages = SAMPLES * REGIONS * 4
        assert ras.stats(pipe).cache_bytes == 3 * 2 * key + kept + ages


@pytest.mark.parametrize("family, dtype", zip(("sd3", "lumina"), ras_kernels.CODES))
def test_bytes_of_caches_of_8_bits(family, dtype):
    """They are those of what is alive: numbers of a byte, and a scale for each head."""
    pipe, inputs = FAMILIES[family]()
    plain = after_each_step(pipe, inputs)
    with ras.enabled(pipe, plan=PARTIAL, cache_dtype=dtype):
        seen = after_each_step(pipe, inputs)
        told = ras.stats(pipe).cache_bytes
    sizes = [size(more(now, before)) for now, before in zip(seen, plain, strict=True)]
    assert told == max(sizes) > 0 == sizes[-1]


def test_bytes_are_of_the_last_run():
    """A smaller run after a larger one, and a dense one, which keeps nothing."""
    pipe, inputs = sd3()
    small = {**inputs, **sd3_inputs(pipe, height=8, width=8), "output_type": "pt"}
    with ras.enabled(pipe, plan=PARTIAL):
        run(pipe, small)
        expected = ras.stats(pipe).cache_bytes
        run(pipe, inputs)
        assert ras.stats(pipe).cache_bytes > expected
        run(pipe, small)
        assert ras.stats(pipe).cache_bytes == expected
    with ras.enabled(pipe, speedup=1):
        run(pipe, inputs)
        assert ras.stats(pipe).cache_bytes == 0


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, dict(metric="std"), dict(extrapolation=0.0, reuse_text=True)],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_before_it_is_written(family, settings):
    found = []
    for poisoned in (False, True):
        pipe, inputs = FAMILIES[family]()
        with ras.enabled(pipe, plan=EARLY, **settings), new_memory(poisoned):
            found.append(run(pipe, inputs))
            assert ras.stats(pipe).steps_sparse == 3
    assert found[0].isfinite().all() and torch.equal(*found)


# --- freed before images are decoded --------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [dict(speedup=2), dict(plan=PARTIAL), dict(plan=ENDS_DENSE)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_while_decoding(family, settings):
    pipe, inputs = FAMILIES[family]()
    plain = while_decoding(pipe, inputs)
    with ras.enabled(pipe, **settings):
        for _ in range(2):
            assert more(while_decoding(pipe, inputs), plain) == Counter()
            assert ras.stats(pipe).cache_bytes > 0


@pytest.mark.parametrize("settings", [dict(speedup=2), dict(plan=PARTIAL)], ids=str)
@pytest.mark.parametrize("at", [0, 2, 3, 6])
def test_nothing_is_kept_after_an_interruption(at, settings):
    """The caches are gone when the pipeline returns, and the next run is as good as any."""
    pipe, inputs = sd3()
    with ras.enabled(pipe, **settings):
        expected = run(pipe, inputs)
    while_decoding(pipe, inputs, at)
    plain = alive()
    with ras.enabled(pipe, **settings):
        while_decoding(pipe, inputs, at)
        assert more(alive(), plain) == Counter()
        assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("at", [2, 3, 6])
def test_nothing_is_kept_while_decoding_after_an_exception(at):
    """What a run that broke off left behind is gone before the next one's image."""
    pipe, inputs = sd3()
    with ras.enabled(pipe, plan=PARTIAL):
        expected, told = run(pipe, inputs), ras.stats(pipe).cache_bytes
    plain = while_decoding(pipe, inputs)
    with ras.enabled(pipe, plan=PARTIAL):
        with pytest.raises(Stop):
            run(pipe, inputs, callback_on_step_end=stop_at(at))
        assert ras.stats(pipe).cache_bytes == told
        assert more(while_decoding(pipe, inputs), plain) == Counter()
        assert ras.stats(pipe).cache_bytes == told
        assert torch.equal(run(pipe, inputs), expected)


def test_a_preview_decoded_in_a_callback_changes_nothing():
    """The run goes on with what it had kept."""
    pipe, inputs = sd3()

    def preview(pipe, step, t, tensors):
        pipe.vae.decode(tensors["latents"], return_dict=False)
        return tensors

    with ras.enabled(pipe, plan=PARTIAL):
        expected = run(pipe, inputs)
        assert torch.equal(run(pipe, inputs, callback_on_step_end=preview), expected)
        assert ras.stats(pipe).steps_sparse == 3


# --- kept for capture -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [WHOLE, PARTIAL, ENDS_DENSE], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_caches_stay_where_they_are(family, plan):
    """While decoding and in the next run, also after an interruption; `disable` frees them."""
    pipe, inputs = FAMILIES[family]()
    run(pipe, inputs)
    known = tensors()

    def places():
        """Of keys, values and noise, which have a row for each image token, or each of a latent."""
        known_ones = set(map(id, known))
        return sorted(
            (tensor.data_ptr(), tensor.nbytes)
            for tensor in tensors()
            if id(tensor) not in known_ones
            and tensor.ndim > 2
            and len(tensor) in (1, 2 * SAMPLES)
            and tensor.shape[1] >= REGIONS
        )

    ras.enable(pipe, keep_caches=True, plan=plan)
    expected = run(pipe, inputs)
    kept, told = places(), ras.stats(pipe).cache_bytes
    assert 0 < sum(nbytes for _, nbytes in kept) <= told
    assert while_decoding(pipe, inputs, look=places) == kept
    if family != "lumina":  # whose pipeline cannot be interrupted
        assert while_decoding(pipe, inputs, 3, look=places) == kept
    assert torch.equal(run(pipe, inputs), expected)
    assert places() == kept and ras.stats(pipe).cache_bytes == told
    ras.disable(pipe)
    assert places() == []


def test_kept_caches_forget_a_run_that_went_wrong():
    """Nothing times 0 is nothing, unless it is no number."""
    pipe, inputs = sd3()
    with ras.enabled(pipe, plan=EARLY, keep_caches=True):
        expected = run(pipe, inputs)
        run(pipe, {**inputs, "latents": torch.full_like(inputs["latents"], math.nan)})
        assert torch.equal(run(pipe, inputs), expected)


def test_kept_caches_of_another_size_are_let_go():
    """A run of another size has caches of its own; in the one after, only those are there."""
    pipe, inputs = sd3()
    small = {**inputs, **sd3_inputs(pipe, height=8, width=8), "output_type": "pt"}
    with ras.enabled(pipe, plan=PARTIAL):
        run(pipe, small)
        expected = ras.stats(pipe).cache_bytes
    plain = while_decoding(pipe, small)
    with ras.enabled(pipe, plan=PARTIAL, keep_caches=True):
        for call in (inputs, small):
            run(pipe, call)
        found = size(while_decoding(pipe, small) - plain)
        assert ras.stats(pipe).cache_bytes == expected
    assert expected / 2 < found <= expected + 1024  # and what was counted
