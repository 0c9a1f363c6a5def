"""The oracle of `support/oracle.py` held to account: what it says is so, and what it finds."""

import itertools

import pytest
import torch
from diffusers import FluxTransformer2DModel
from support import pipelines
from support.oracle import NOBODY, Oracle, position, relative_error
from support.pipelines import Recorder, normal
from support.runs import errors, patches, rows_of, run

import ras

pytestmark = pytest.mark.usefixtures("no_gradients")

TOKENS = 64
SOME = torch.tensor([[0, 1, 9, 30, 63], [2, 3, 20, 40, 41]])
SETTINGS = dict(extrapolation=0.62, reuse_text=True)


def sd3(seed, **sizes):
    model = pipelines.sd3_transformer(**pipelines.SMALL, **sizes)
    return model, dict(
        hidden_states=normal(2, 16, 16, 16, seed=seed),
        encoder_hidden_states=normal(2, 12, 32, seed=1),
        pooled_projections=normal(2, 16, seed=2),
        timestep=torch.tensor([500.0, 500.0]),
    )


def dual(seed):
    return sd3(seed, qk_norm="rms_norm", dual_attention_layers=(0, 2))


def lumina(seed):
    model = pipelines.lumina_transformer(**pipelines.SMALL_LUMINA)
    angles = normal(384, 384, 12, seed=3)
    return model, dict(
        hidden_states=normal(2, 4, 16, 16, seed=seed),
        encoder_hidden_states=normal(2, 8, 32, seed=1),
        encoder_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        timestep=torch.tensor([0.5, 0.5]),
        image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        cross_attention_kwargs={},
    )


def flux(seed):
    """Packed latents, text first, and attention by diffusers' `dispatch_attention_fn`."""
    sizes = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, axes_dims_rope=(4, 6, 6))
    dims = dict(in_channels=16, attention_head_dim=16, joint_attention_dim=32)
    model = FluxTransformer2DModel(**sizes, **dims, pooled_projection_dim=16)
    return pipelines.randomise(model), dict(
        hidden_states=normal(2, TOKENS, 16, seed=seed),
        encoder_hidden_states=normal(2, 12, 32, seed=1),
        pooled_projections=normal(2, 16, seed=2),
        timestep=torch.tensor([0.5, 0.5]),
        img_ids=torch.cartesian_prod(*map(torch.arange, (1, 8, 8))).float(),
        txt_ids=torch.zeros(12, 3),
    )


FAMILIES = pytest.mark.parametrize("family", [sd3, dual, lumina, flux])


def oracle_of(family, **settings):
    model = family(0)[0]
    plain = lambda seed: model(**family(seed)[1], return_dict=False)[0]  # noqa: E731
    oracle = Oracle(model, **settings)
    return plain, lambda rows, sigma, seed: oracle(rows, sigma, **family(seed)[1])


def split(noise):
    """The tokens of SOME rows, and all others."""
    active = torch.zeros(2, TOKENS, dtype=torch.bool).scatter_(1, SOME, True)
    tokens = noise if noise.ndim == 3 else patches(noise)
    return tokens[active], tokens[~active]


# --- what it says is so ---------------------------------------------------------------------------


@FAMILIES
def test_all_tokens_active_is_the_plain_model(family):
    """To the bit, call after call, whether they are listed or not."""
    plain, oracle = oracle_of(family, extrapolation=0.62)
    for call, rows in enumerate((None, torch.arange(TOKENS)[None], None)):
        assert torch.equal(oracle(rows, 0.9 - 0.2 * call, call), plain(call))


@FAMILIES
def test_what_has_not_changed_is_reused_without_a_loss(family):
    plain, oracle = oracle_of(family, **SETTINGS)
    oracle(None, 0.9, 0)
    assert relative_error(oracle(SOME, 0.7, 0), plain(0)) < 1e-6


@FAMILIES
def test_active_tokens_are_new_and_see_old_ones(family):
    """The inactive keep their noise to the bit; the active have not that of the plain model."""
    plain, oracle = oracle_of(family)
    before, after = oracle(None, 0.9, 0), oracle(SOME, 0.7, 1)
    assert torch.equal(split(after)[1], split(before)[1])
    for other in (plain(0), plain(1)):
        assert relative_error(split(after)[0], split(other)[0]) > 1e-3


def test_one_layer_sees_what_its_inputs_were():
    """Inputs that differ in the active tokens alone: with one layer nothing else is out of date."""
    model = pipelines.sd3_transformer(**{**pipelines.SMALL, "num_layers": 1})
    old, inputs = sd3(0)[1], sd3(0)[1]
    for sample, row in itertools.product(range(2), range(SOME.shape[1])):
        y, x = divmod(SOME[sample, row].item(), 8)
        at = (sample, slice(None), slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        inputs["hidden_states"][at] = sd3(1)[1]["hidden_states"][at]
    oracle = Oracle(model)
    oracle(None, 0.9, **old)
    found, dense = oracle(SOME, 0.7, **inputs), model(**inputs, return_dict=False)[0]
    assert relative_error(split(found)[0], split(dense)[0]) < 1e-6
    assert relative_error(split(found)[1], split(dense)[1]) > 1e-3


@FAMILIES
def test_noise_goes_on_along_a_straight_line(family):
    """g is how far it goes on at `extrapolation=1`, each token from its own last two."""
    plain, oracle = oracle_of(family, extrapolation=1.0)
    levels = [position(sigma) for sigma in (0.9, 0.7, 0.4)]
    oracle(None, 0.9, 0)
    oracle(None, 0.7, 1)
    found = oracle(NOBODY, 0.4, 2)
    slope = (plain(1) - plain(0)) / (levels[1] - levels[0])
    assert relative_error(found, plain(1) + (levels[2] - levels[1]) * slope) < 1e-5


def test_a_call_that_skips_layers_keeps_noise_alone():
    model, inputs = sd3(0)
    plain, oracle = Oracle(model), Oracle(model)
    for each in (plain, oracle):
        each(None, 0.9, **inputs)
    skipping = dict(sd3(1)[1], skip_layers=[1])
    dense = model(**skipping, return_dict=False)[0]
    assert torch.equal(oracle(None, 0.8, **skipping), dense)
    assert torch.equal(oracle(SOME, 0.7, **sd3(2)[1]), plain(SOME, 0.7, **sd3(2)[1]))
    again = oracle(SOME, 0.7, **dict(sd3(2)[1], skip_layers=[1]))
    assert torch.equal(split(again)[1], split(dense)[1])


def test_nothing_is_reused_before_there_is_something():
    with pytest.raises(AssertionError, match="nothing to reuse"):
        oracle_of(sd3)[1](SOME, 0.9, 0)


# --- what it would not let pass -------------------------------------------------------------------


class Forgetful(Oracle):
    """It takes all keys and values of a layer, or of all of them (None), as they are now."""

    layer = None

    def keep(self, name, new, fresh, gains):
        forgets = name[0] != "noise" and self.layer in (None, name[0])
        return new if forgets else super().keep(name, new, fresh, gains)


class OneLayer(Forgetful):
    layer = 2


def next_row(rows):
    """One sample's first row is the one after, or the one before if that is active."""
    rows = rows.clone()
    free = set(range(TOKENS)) - set(rows[1].tolist())
    rows[1, 0] = min(free, key=lambda row: abs(row - rows[1, 0].item()))
    return rows


WRONG = {  # the rows, the recorded calls, and the oracle
    "other rows": dict(rows=lambda rows: (rows + 1) % TOKENS),
    "one row off by one": dict(rows=next_row),
    "another sample's rows": dict(rows=lambda rows: rows.flip(0)),
    "text swapped": dict(
        call=lambda c: {**c, "encoder_hidden_states": c["encoder_hidden_states"].flip(0)}
    ),
    "keys and values forgotten": dict(oracle=Forgetful),
    "those of one layer forgotten": dict(oracle=OneLayer),
    "nothing carried on": dict(settings=dict(extrapolation=0.0)),
    "another extrapolation": dict(settings=dict(extrapolation=0.4)),
    "keys and values held": dict(settings=dict(kv_correction=False)),
    "text that walks": dict(settings=dict(reuse_text=False)),
    "nothing wrong": {},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(monkeypatch, what):
    """In a run of `ras` with partial and skipped steps; with nothing wrong there is no error."""
    wrong, pipe = WRONG[what], pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 0.25, 1, 0.5), **SETTINGS):
        run(pipe, pipelines.sd3_inputs(pipe, 2), 7)
    rows = rows_of(record, [2, 4, 6])
    rows = {step: wrong.get("rows", lambda rows: rows)(rows[step]) for step in rows}
    record.calls = [wrong.get("call", lambda call: call)(call) for call in record.calls]
    monkeypatch.setattr("support.runs.Oracle", wrong.get("oracle", Oracle))
    settings = {**SETTINGS, **wrong.get("settings", {})}
    found = list(errors(record, pipe.transformer, {**rows, 3: NOBODY}, **settings))
    assert any(e > 1e-3 for e in found) if wrong else all(e < 1e-5 for e in found), found
