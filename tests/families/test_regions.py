"""Partial steps of every family: whole runs, held against the oracle's of the same rows."""

from dataclasses import replace

import pytest
import torch
from support.oracle import FAMILIES, NOBODY, Oracle, relative_error
from support.runs import by_oracle
from support.zoo import ENTRIES

import ras
from ras.families import support
from ras.policy.selection import Selection

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

PLAN = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0, 0.25, 1)
CARRIED = dict(extrapolation=0.625, kv_correction=True)
HELD = dict(extrapolation=0.0, kv_correction=False)

REFERENCES = ["flux-kontext", "qwen-edit", "qwen-edit-plus"]  # and padding: tokens that never walk
NAMES = [
    "flux",
    "flux-true-cfg",
    "flux-fill",
    "flux-control",
    "flux2",
    "flux2-klein",
    "chroma",
    "qwen",
    "z-image",
    "z-image-truncated",
    "krea2",
    "wan",
    "wan22",
    "wan-per-token",
    "wan-image",
    "wan-image-per-token",
    "hunyuan-video",
    "ltx",
    "cogvideox",
    "cogview4",
    "pixart-sigma",
    "aura-flow",
    "lumina2",
    "lumina2-truncated",
    "lumina",
    "sd3",
    "sd3-skipping-layers",
    *REFERENCES,
]


def listen(pipe, entry):
    """The noise of each call of an entry's transformers from now on, as it comes."""
    noises = []

    def note(module, args, output):
        noise = output[0]
        noises.append(noise.clone() if torch.is_tensor(noise) else torch.stack(noise))

    for name in entry.transformers:
        getattr(pipe, name).register_forward_hook(note)
    return noises


def with_ras(name, plan=PLAN, **settings):
    """What a run of two samples gives: latents, each call's noise, each partial step's rows."""
    entry, rows = ENTRIES[name], []
    pipe, call = entry.build()
    noises, choose = listen(pipe, entry), Selection.choose

    def noted(*args, **kwargs):
        rows.append(choose(*args, **kwargs).clone())
        return rows[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        ras.enabled(pipe, plan=plan, mask=False, **settings),
    ):
        patch.setattr(Selection, "choose", noted)
        latents = call(len(plan), **entry.two)
        stats = ras.stats(pipe)
    assert stats.warnings == () and stats.plan.shares == plan
    steps = [step for step, share in enumerate(plan) if 0 < share < 1]
    rows = dict(zip(steps, rows, strict=True))
    for step, chosen in rows.items():
        assert len(latents) == 2 and chosen.dtype == torch.int32
        assert not torch.equal(*chosen) and (chosen.diff() > 0).all()
        assert chosen.shape[1] / rows[2].shape[1] == pytest.approx(plan[step] / plan[2], rel=0.05)
    return latents, noises, rows


def with_oracle(name, rows, plan=PLAN, **settings):
    """What the same run by the oracle gives with these rows: latents, and each call's noise."""
    entry = ENTRIES[name]
    pipe, call = entry.build()
    noises = listen(pipe, entry)
    rows = [rows.get(step, None if share else NOBODY) for step, share in enumerate(plan)]
    by_oracle(pipe, rows, names=entry.transformers, **settings)
    return call(len(plan), **entry.two), noises


def errors(name, change=lambda rows: rows, wrong=None, **settings):
    """The relative error of the latents, and of each call's noise; of references there is none.

    `change` is done to the oracle's rows, and `wrong` are its settings where they are others.
    """
    latents, noises, rows = with_ras(name, **settings)
    rows = {step: change(chosen) for step, chosen in rows.items()}
    expected, others = with_oracle(name, rows, **{**settings, **(wrong or {})})
    pairs = [(a[:, : b.shape[1]], b[:, : a.shape[1]]) for a, b in zip(noises, others, strict=True)]
    return [relative_error(a, b) for a, b in [(latents, expected), *pairs]]


def check(name, **settings):
    found = errors(name, **settings)
    assert max(found) < 1e-5, found


# --- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_run(name):
    check(name, **CARRIED)


@pytest.mark.parametrize("name", NAMES)
def test_run_that_holds(name):
    check(name, **HELD)


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "qwen", "qwen-edit", "sd3"])
def test_run_without_text_in_partial_steps(name):
    check(name, reuse_text=True, **CARRIED)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFERENCES])
def test_all_tokens_in_any_order(name, monkeypatch):
    """It is the dense run, if no token stays behind that is not noise."""

    def shuffled(self, noise, *_):
        orders = [torch.randperm(noise.shape[1]) for _ in noise]
        return torch.stack(orders).int()

    monkeypatch.setattr(Selection, "choose", shuffled)
    pipe, call = ENTRIES[name].build()
    dense = call(6, **ENTRIES[name].two)
    with ras.enabled(pipe, plan=(1, 0.5, 0.5, 1, 0.5, 0.5)):
        assert relative_error(call(6, **ENTRIES[name].two), dense) < 1e-5


def test_every_family_is_known():
    """Of those that have partial steps; nothing here is taken from their records."""
    families = {row["transformer"] for row in support() if row["partial steps"] == "yes"}
    assert families == set(FAMILIES)


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_next_rows_are_found(name):
    def after(rows):
        return (rows + 1).clamp(max=rows.max())

    assert max(errors(name, change=after, **CARRIED)) > 1e-3


class Forgets(Oracle):
    """It takes the keys and values of what follows the noise as they are now."""

    def along(self, numbers, after, text, others=(0, 0)):
        if numbers.dtype == torch.bool:
            others = True, others[1]
        return super().along(numbers, after, text, others)


class OneBranch(Oracle):
    """It takes all calls of a step for the same."""

    def __call__(self, *args, branch=0, **inputs):
        return super().__call__(*args, **inputs)


def unlike(model, **change):
    """What the oracle would have to know of a family if it were another."""
    return dict(tokens=replace(FAMILIES[model], **change))


OTHERS = dict(change=lambda rows: rows.flip(0))
NEW_TEXT = dict(wrong=dict(reuse_text=False), reuse_text=True)

WRONG = {
    "another sample's rows": ("qwen", OTHERS),
    "another sample's rows, batched": ("pixart-sigma", OTHERS),
    "fresh references of FLUX": ("flux-kontext", dict(wrong=dict(kind=Forgets))),
    "fresh references of Qwen": ("qwen-edit", dict(wrong=dict(kind=Forgets))),
    "one branch": ("wan", dict(wrong=dict(kind=OneBranch))),
    "text last": ("flux", dict(wrong=unlike("FluxTransformer2DModel", text_first=False))),
    "text first": ("z-image", dict(wrong=unlike("ZImageTransformer2DModel", text_first=True))),
    "no refiner": ("z-image", dict(wrong=unlike("ZImageTransformer2DModel", alone=False))),
    "a refiner": ("lumina2", dict(wrong=unlike("Lumina2Transformer2DModel", alone=True))),
    "text that walks": ("flux", NEW_TEXT),
    "nothing carried on": ("chroma", dict(wrong=dict(extrapolation=0.0))),
    "keys and values held": ("krea2", dict(wrong=dict(kv_correction=False))),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what):
    name, changes = WRONG[what]
    changes = {**CARRIED, **changes}
    assert max(errors(name, **changes)) > 1e-3
