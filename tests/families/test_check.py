"""`ras.check`: records that are right pass, and each way for one to be wrong is found."""

import dataclasses

import pytest
import torch
from support.zoo import ENTRIES

import ras
from ras.denoisers import families_of
from ras.families import family_of
from ras.layout import Layout, Rows

pytestmark = pytest.mark.usefixtures("no_gradients")


def callable_by_check(name):
    """A pipeline of the zoo that is run by its class's own call, as `ras.check` does."""
    pipe, draw = ENTRIES[name].build()

    class Drawn(type(pipe)):
        drawing = False

        def __call__(self, *args, **call):
            if self.drawing:
                return super().__call__(*args, **call)
            type(self).drawing = True
            try:
                return draw(call.pop("num_inference_steps"), **call)
            finally:
                type(self).drawing = False

    Drawn.__name__ = type(pipe).__name__
    pipe.__class__ = Drawn
    return pipe


def check(name, **changes):
    """The error that `ras.check` gives for a record with these changes."""
    pipe = callable_by_check(name)
    record = dataclasses.replace(family_of(pipe.transformer), **changes)
    return ras.check(pipe, family=record, num_inference_steps=2)


WHOLE = {  # pipelines whose calls have no partial steps, and why
    "lumina2-padded": "of unlike length",
    "flux2-klein-kv": "keeps keys and values itself",
    "glm-edit": "keeps keys and values itself",
    "sky-reels-forcing": "a time of its own",
    "sky-reels-causal": "a time of its own",
    "cosmos": "not given the guided noise",
}
REGIONS = [
    name
    for name, entry in ENTRIES.items()
    if name not in WHOLE
    and name != "flux-modular"  # which has no call of its own
    and all(family.regions for _, family in families_of(entry.build()[0]))
]


@pytest.mark.parametrize("name", REGIONS)
def test_records(name):
    """Of all pipelines of the zoo with partial steps."""
    pipe = callable_by_check(name)
    processors = dict(getattr(pipe.transformer, "attn_processors", {}))
    assert ras.check(pipe, num_inference_steps=2) < 1e-5
    assert not ras.is_enabled(pipe)
    after = dict(getattr(pipe.transformer, "attn_processors", {}))
    assert all(after[key] is processor for key, processor in processors.items())
    assert not [name for name in vars(pipe.transformer) if "ras" in name]


FLUX = family_of(ENTRIES["flux"].build()[0].transformer)
QWEN = family_of(ENTRIES["qwen"].build()[0].transformer)
WRONG = {
    "the text is last": ("flux", dict(image_first=True)),
    "a list of blocks is left out": (
        "flux",
        dict(attention={"transformer_blocks.*.attn": Rows.JOINT}),
    ),
    "keys of the image alone": (
        "flux",
        dict(attention=dict.fromkeys(FLUX.attention, Rows.IMAGE)),
    ),
    "a table is left out": ("flux", dict(enter={"": FLUX.enter[""]})),
    "rows of a table of the image": (
        "qwen",
        dict(enter={**QWEN.enter, "pos_embed": {0: Rows.TABLE, 1: Rows.TABLE}}),
    ),
    "tokens leave too early": ("flux", dict(leave="x_embedder")),
    "cross-attention is kept": (
        "wan",
        dict(attention={"blocks.*.attn1": Rows.IMAGE, "blocks.*.attn2": Rows.IMAGE}),
    ),
    "fewer tokens": ("wan", dict(layout=lambda *_: Layout((1, 2, 4)))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_records(fault):
    name, changes = WRONG[fault]
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError, TypeError)):
        check(name, **changes)


def test_wrong_records_that_compute_something():
    """The error is of the order of the output."""
    with pytest.raises(AssertionError, match=r"relative error \d.*FluxTransformer2DModel is wrong"):
        check("flux", image_first=True)


@pytest.mark.parametrize("name", WHOLE)
def test_calls_of_whole_steps(name):
    """The reason is said, and a run that asks for partial steps is warned once and dense."""
    with pytest.raises(AssertionError, match=WHOLE[name]):
        ras.check(callable_by_check(name), num_inference_steps=2)
    pipe, call = ENTRIES[name].build()
    ras.enable(pipe, plan=(1, 0.5, 1, 0.5), mask=False)
    with pytest.warns(ras.RASWarning):
        call(4)
    stats = ras.stats(pipe)
    assert stats.steps_sparse == 0 and stats.calls_computed == stats.calls_total
    assert any(WHOLE[name] in warning or "no step of" in warning for warning in stats.warnings)


# --- what cannot be tried -------------------------------------------------------------------------


def test_enabled_pipelines():
    pipe = ras.enable(callable_by_check("flux"))
    with pytest.raises(ValueError, match=r"ras\.disable"):
        ras.check(pipe, num_inference_steps=2)


def test_pipelines_without_partial_steps():
    with pytest.raises(ValueError, match="PRXTransformer2DModel has no partial steps"):
        ras.check(callable_by_check("prx"), num_inference_steps=2)


@pytest.mark.parametrize(
    "record, error, named",
    [
        ("flux", TypeError, "ras.Family"),
        (dataclasses.replace(FLUX, model="Other"), ValueError, "Other.*FluxTransformer2DModel"),
        (dataclasses.replace(FLUX, leave="proj"), ValueError, "'proj'"),
        (dataclasses.replace(FLUX, leave=""), ValueError, "leave="),
        (dataclasses.replace(FLUX, enter={"pos": {0: Rows.TABLE}}), ValueError, "'pos'"),
    ],
)
def test_records_that_are_none(record, error, named):
    """Before anything is changed, for `enable` too."""
    pipe = callable_by_check("flux")
    for call in (ras.check, ras.enable):
        with pytest.raises(error, match=named):
            call(pipe, family=record)
        assert not ras.is_enabled(pipe)


def test_a_record_from_outside():
    """It takes the place of ours, and serves a class that we have none of."""
    pipe, call = ENTRIES["flux"].build()
    plan = (1, 1, 0.5, 0, 0.25, 1)
    with ras.enabled(pipe, plan=plan):
        expected = call(len(plan))

    class Mine(type(pipe.transformer)):
        pass

    pipe.transformer.__class__ = Mine
    record = dataclasses.replace(FLUX, model="Mine")
    with ras.enabled(pipe, plan=plan, family=record):
        assert torch.equal(call(len(plan)), expected)
        assert ras.stats(pipe).steps_sparse == 2
