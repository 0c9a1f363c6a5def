"""Partial steps of every family: whole runs, held against the oracle's of the same rows."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.oracle import FAMILIES, NOBODY, Oracle, relative_error
from support.runs import by_oracle
from support.zoo import ENTRIES

import ras
from ras.families import support
from ras.policy.selection import Selection
from ras.references import references_under
from ras.sessions import session_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

PLAN = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0, 0.25, 1)
STEPS = len(PLAN)
CARRIED = dict(extrapolation=0.625, kv_correction=True)
HELD = dict(extrapolation=0.0, kv_correction=False)

FAMILY = [  # an entry of each
    "flux",
    "flux2",
    "chroma",
    "qwen",
    "z-image",
    "krea2",
    "wan",
    "hunyuan-video",
    "ltx",
    "cogvideox",
    "cogview4",
    "pixart-sigma",
    "aura-flow",
    "lumina2",
    "lumina",
    "sd3",
    "ovis",
    "longcat",
    "bria",
    "bria-fibo",
    "flux3",
    "hunyuan-image",
    "cogview3",
    "glm",
    "hidream",
    "sky-reels",
]
VARIANTS = [
    "flux-true-cfg",
    "flux-modular",
    "flux-fill",
    "flux-control",
    "flux-control-inpaint",
    "flux-controlnet",
    "flux-img2img",
    "flux-inpaint",
    "flux2-klein",
    "chroma-padded",
    "chroma-inpaint",
    "qwen-padded",
    "qwen-inpaint",
    "qwen-controlnet",
    "krea2-padded",
    "z-image-truncated",
    "z-image-img2img",
    "wan-unipc",
    "wan22",
    "wan-per-token",
    "wan-image",
    "wan-image-per-token",
    "wan-unguided",
    "cogvideox-rotary",
    "cogvideox-image",
    "ltx-padded",
    "hunyuan-video-padded",
    "pixart-dpm",
    "pixart-oblong",
    "lumina2-truncated",
    "sd3-inpaint",
    "sd3-controlnet",
    "sd3-heun",
    "sd3-skipping-layers",
]
BEHIND = [  # with tokens that never walk: references and padding
    "flux-kontext",
    "flux-kontext-inpaint",
    "flux2-reference",
    "flux2-klein-reference",
    "qwen-edit",
    "qwen-edit-plus",
    "qwen-edit-2511",
    "qwen-edit-inpaint",
    "z-image-padded",
    "z-image-inpaint",
    "z-image-controlnet",
]
NAMES = FAMILY + VARIANTS + BEHIND
HELD_ALONE = "cosmos2"  # its noise levels are on another scale than the oracle's
ONE_SAMPLE = {  # or an output of another kind: `ras.check` is all that tries them
    "WanVACETransformer3DModel",
    "EasyAnimateTransformer3DModel",
    "DiTTransformer2DModel",
}
EVEN = {f"{sign}prompt_attention_mask": torch.ones(2, 8).long() for sign in ("", "negative_")}
MORE = dict.fromkeys(("lumina2", "lumina2-truncated"), EVEN)  # or else steps are whole


def start(name, steps=STEPS):
    """A pipeline of the zoo, and what makes two samples with it in so many steps."""
    entry = ENTRIES[name]
    pipe, call = entry.build()
    more = {**entry.two, **MORE.get(name, {})}
    asked = next((n for n in range(3 * steps) if entry.steps(n) == steps), steps)
    return pipe, lambda: call(asked, **more)


def listen(pipe, names):
    """The noise of each call of these transformers from now on, as it comes."""
    noises = []

    def note(module, args, output):
        noise = output[0]
        noises.append(noise.clone() if torch.is_tensor(noise) else torch.stack(noise))

    for name in names:
        getattr(pipe, name).register_forward_hook(note)
    return noises


def with_ras(name, **settings):
    """What a run of two samples gives: latents, each call's noise, each partial step's rows."""
    rows, choose = [], Selection.choose
    pipe, call = start(name)
    noises = listen(pipe, ENTRIES[name].transformers)

    def noted(*args, **kwargs):
        rows.append(choose(*args, **kwargs).clone())
        return rows[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        ras.enabled(pipe, plan=PLAN, mask=False, **settings),
    ):
        patch.setattr(Selection, "choose", noted)
        latents = call()
        stats = ras.stats(pipe)
        layout = session_of(pipe).run.planned.layout
    assert stats.warnings == () and stats.plan.shares == PLAN
    steps = [step for step, share in enumerate(PLAN) if 0 < share < 1]
    rows = dict(zip(steps, rows, strict=True))
    for step, chosen in rows.items():
        assert len(latents) == 2 and chosen.dtype == torch.int32
        assert not torch.equal(*chosen) and (chosen.diff() > 0).all()
        assert chosen.shape[1] / rows[2].shape[1] == pytest.approx(PLAN[step] / PLAN[2], rel=0.05)
    return latents, noises, rows, partial(references_under, layout=layout)


def with_oracle(name, rows, **settings):
    """What the same run by the oracle gives with these rows: latents, and each call's noise."""
    pipe, call = start(name)
    names = ENTRIES[name].transformers
    noises = listen(pipe, names)
    rows = [rows.get(step, None if share else NOBODY) for step, share in enumerate(PLAN)]
    by_oracle(pipe, rows, names=names, **settings)
    return call(), noises


def errors(found, name, change=lambda rows: rows, **settings):
    """The relative error of a run's latents, and of each call's noise; of references there is none.

    `found` is what it gave, and `change` is done to the rows that the oracle is told.
    """
    latents, noises, rows, under = found
    rows = {step: change(chosen) for step, chosen in rows.items()}
    expected, others = with_oracle(name, rows, **{"under": under, **settings})
    pairs = [(a[:, : b.shape[1]], b[:, : a.shape[1]]) for a, b in zip(noises, others, strict=True)]
    return [relative_error(a, b) for a, b in [(latents, expected), *pairs]]


def check(name, **settings):
    found = errors(with_ras(name, **settings), name, **settings)
    assert max(found) < 1e-5, found


# --- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_run(name):
    """It is the oracle's with the rows that were chosen, and not with the next ones."""

    def after(rows):
        return (rows + 1).clamp(max=rows.max())

    found = with_ras(name, **CARRIED)
    right = errors(found, name, **CARRIED)
    assert max(right) < 1e-5, right
    assert max(errors(found, name, after, **CARRIED)) > 1e-3


@pytest.mark.parametrize("name", [*FAMILY, HELD_ALONE])
def test_run_that_holds(name):
    check(name, **HELD)


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "qwen", "qwen-edit", "sd3"])
def test_run_without_text_in_partial_steps(name):
    check(name, reuse_text=True, **CARRIED)


def test_every_family_is_there():
    """Of those that have partial steps; nothing here is taken from their records."""
    families = {row["transformer"] for row in support() if row["partial steps"] == "yes"}
    tested = {type(start(name)[0].transformer).__name__ for name in [*FAMILY, HELD_ALONE]}
    assert families == tested | ONE_SAMPLE and tested <= set(FAMILIES)


# --- caches of 8 bits -----------------------------------------------------------------------------


class Rounding(Oracle):
    """It keeps keys and values as int8, with a scale for each head of a token.

    A call of all tokens attends to them as they are.
    """

    kind, most = torch.int8, 127

    def rounded(self, rows):
        """`(B, H, N, D)`, as what it keeps of them."""
        scale = rows.abs().amax(-1, keepdim=True) / self.most
        codes = (rows / scale).nan_to_num()  # 0 by 0
        return (codes.round() if self.kind == torch.int8 else codes.to(self.kind).float()) * scale

    def keep(self, name, new, fresh, gains):
        if name[0] == "noise":
            return super().keep(name, new, fresh, gains)
        last, change = self.kept.get(name, (torch.zeros_like(new),) * 2)
        change = torch.where(fresh, self.rounded(new - last), change)
        last = torch.where(fresh, self.rounded(new), last)
        self.kept[name] = last, change
        return new if fresh.all() else last + gains.to(last) * change


class Rounding8(Rounding):
    """As float8 instead."""

    kind, most = torch.float8_e4m3fn, 448


class RoundingTokens(Rounding):
    """With one scale for all heads of a token."""

    def rounded(self, rows):
        whole = rows.transpose(1, 2).flatten(2)[:, None]
        return super().rounded(whole)[:, 0].unflatten(2, (rows.shape[1], -1)).transpose(1, 2)


ROUNDED = [
    *((name, Rounding) for name in ("flux", "sd3", "lumina", "wan", "qwen-edit")),
    ("flux", Rounding8),
]


@pytest.mark.parametrize("name, kind", ROUNDED)
def test_run_with_caches_of_8_bits(name, kind):
    """Seven times nearer to codes than to what they stand for: some numbers lie halfway between
    two, and go either way."""
    found = with_ras(name, cache_dtype=kind.kind, **CARRIED)
    right, wrong = (max(errors(found, name, kind=each, **CARRIED)) for each in (kind, Oracle))
    assert 7 * right < wrong < 0.05, (right, wrong)
    if (name, kind) == ("flux", Rounding):
        for other in (RoundingTokens, Rounding8):
            assert max(errors(found, name, kind=other, **CARRIED)) > 7 * right


# --- what is wrong --------------------------------------------------------------------------------


class Forgets(Oracle):
    """It takes the keys and values of what follows the noise as they are now."""

    def along(self, numbers, after, text, others=(0, 0)):
        if numbers.dtype == torch.bool:
            others = True, others[1]
        return super().along(numbers, after, text, others)


def nothing(rows):
    """What the oracle is told of references that stay behind."""


class OneBranch(Oracle):
    """It takes all calls of a step for the same."""

    def __call__(self, *args, branch=0, **inputs):
        return super().__call__(*args, **inputs)


def unlike(model, **change):
    """What the oracle would have to know of a family if it were another."""
    return dict(tokens=replace(FAMILIES[model], **change))


def flipped(rows):
    return rows.flip(0)


FLUX, Z_IMAGE = "FluxTransformer2DModel", "ZImageTransformer2DModel"

WRONG = {  # the entry, and what the oracle is told
    "another sample's rows": ("qwen", dict(change=flipped)),
    "another sample's rows, batched": ("pixart-sigma", dict(change=flipped)),
    "fresh references of FLUX": ("flux-kontext", dict(kind=Forgets)),
    "fresh references of FLUX.2": ("flux2-reference", dict(kind=Forgets)),
    "fresh references of Qwen": ("qwen-edit", dict(kind=Forgets)),
    "references that stay": ("qwen-edit", dict(under=nothing)),
    "fresh padding": ("z-image-padded", dict(kind=Forgets)),
    "one branch": ("wan", dict(kind=OneBranch)),
    "text last": ("flux", unlike(FLUX, text_first=False)),
    "text first": ("z-image", unlike(Z_IMAGE, text_first=True)),
    "no refiner": ("z-image", unlike(Z_IMAGE, alone=False)),
    "a refiner": ("lumina2", unlike("Lumina2Transformer2DModel", alone=True)),
    "text that stays": ("flux", dict(reuse_text=True)),
    "nothing carried on": ("chroma", dict(extrapolation=0.0)),
    "keys and values held": ("krea2", dict(kv_correction=False)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what):
    name, wrong = WRONG[what]
    assert max(errors(with_ras(name, **CARRIED), name, **{**CARRIED, **wrong})) > 1e-3
