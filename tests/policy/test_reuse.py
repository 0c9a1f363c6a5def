"""What is reused: extrapolated noise, and the choice by drift, against loops per token."""

import itertools

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from support.oracle import carried_on, gain, relative_error
from support.pipelines import normal
from support.runs import drift_scores, held_like, merged, predicted
from torch.utils._pytree import tree_leaves

import ras
import ras_kernels
from ras.clock import position
from ras.output import HeldOutput
from ras.plan import Reuse
from ras.policy.carry import Carry
from ras.policy.selection import Selection

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- reuse ----------------------------------------------------------------------------------------


def held_run(held, updates, extrapolation):
    """Merge `(sigma, rows, noise of all tokens)` one after another: what comes out each time."""
    found = []
    for sigma, rows, noise in updates:
        fresh = noise if rows is None else ras_kernels.gather_tokens(noise, rows)
        found.append(merged(held, fresh, rows, sigma, extrapolation))
    return found


def token_by_token(updates, extrapolation):
    """The same, token by token: each one's last two predictions and when they were."""
    batch, tokens, _ = updates[0][2].shape
    latest, found = {}, []
    for sigma, rows, noise in updates:
        t, out = position(sigma), torch.zeros_like(noise)
        for b, n in itertools.product(range(batch), range(tokens)):
            if rows is None or n in rows[b].tolist():
                _, past = latest.get((b, n), (None, None))
                latest[b, n] = (noise[b, n], t), latest.get((b, n), (None, None))[0] or past
            (v1, t1), past = latest[b, n]
            out[b, n] = v1
            if past is not None:
                v0, t0 = past
                out[b, n] += gain(abs(t - t1), abs(t1 - t0), extrapolation) * (v1 - v0)
        found.append(out)
    return found


def some_updates(batch=2, tokens=5, channels=3):
    """Two dense updates, then tokens of their own for each sample, one of them never again."""
    rows = [None, None, [[0, 3], [1, 2]], [[0, 1], [2, 3]], [[2, 3], [0, 1]], None, [[0], [4]]]
    sigmas = (0.97, 0.9, 0.74, 0.6, 0.35, 0.3, 0.1)
    return [
        (sigma, None if row is None else torch.tensor(row), normal(batch, tokens, channels, seed=i))
        for i, (sigma, row) in enumerate(zip(sigmas, rows))
    ]


@pytest.mark.parametrize("extrapolation", [-0.5, 0.3, 0.62, 1.0, 3.0])
def test_reuse_is_the_formula_token_by_token(extrapolation):
    updates = some_updates()
    held = held_like(updates[0][2])
    for out, expected in zip(
        held_run(held, updates, extrapolation), token_by_token(updates, extrapolation)
    ):
        assert relative_error(out, expected) < 1e-5
    for (sigma, rows, noise), out in zip(updates, held_run(held, updates, extrapolation)):
        if rows is not None:  # what was computed comes out as it was
            fresh = [ras_kernels.gather_tokens(each, rows) for each in (noise, out)]
            assert torch.equal(*fresh), sigma


def test_reuse_between_updates():
    """`predict` alone changes nothing that is kept."""
    updates = some_updates()[:4]
    held = held_like(updates[0][2])
    held_run(held, updates, 0.62)
    nobody = torch.zeros(2, 0, dtype=torch.int64)
    for sigma in (0.5, 0.2, 0.5):
        at = [*updates, (sigma, nobody, updates[0][2])]
        expected = token_by_token(at, 0.62)[-1]
        assert relative_error(predicted(held, sigma, 0.62), expected) < 1e-5


@pytest.mark.parametrize("reuse", Reuse)
def test_held_noise_is_a_copy_to_the_bit(reuse):
    updates = some_updates()
    held = held_like(updates[0][2], reuse)
    latest = torch.zeros_like(updates[0][2])
    for (_, rows, noise), out in zip(updates, held_run(held, updates, 0.0)):
        for b in range(2):
            at = slice(None) if rows is None else rows[b]
            latest[b, at] = noise[b, at]
        assert torch.equal(out, latest)
    assert torch.equal(predicted(held, 0.05, 0.0), latest)
    assert predicted(held, 0.05, 0.0) is not held.noise


def test_a_straight_line_is_predicted_exactly():
    base, slope = normal(2, 4, 3, seed=1), normal(2, 4, 3, seed=2)

    def noise(sigma):
        return base + slope * position(sigma)

    held = held_like(base)
    rows = torch.tensor([[0, 2], [1, 3]])
    held_run(held, [(s, r, noise(s)) for s, r in ((0.95, None), (0.8, None), (0.7, rows))], 1.0)
    for sigma in (0.6, 0.4, 0.1):
        assert relative_error(predicted(held, sigma, 1.0), noise(sigma)) < 1e-5


def test_a_second_prediction_at_the_same_level():
    """As of Heun's scheduler: the change is from the last one before; until then, none is known."""
    v = normal(4, 1, 4, 3)
    held = held_like(v[0])
    held_run(held, [(0.95, None, v[3]), (0.9, None, v[0]), (0.9, None, v[1])], 0.62)
    assert torch.equal(predicted(held, 0.4, 0.62), v[1])
    merged(held, v[2], None, 0.7, 0.62)
    t0, t1, t = (position(sigma) for sigma in (0.9, 0.7, 0.4))
    expected = v[2] + gain(abs(t - t1), abs(t1 - t0), 0.62) * (v[2] - v[1])
    assert relative_error(predicted(held, 0.4, 0.62), expected) < 1e-5


def test_one_prediction_is_all_there_is_to_reuse():
    held = held_like(normal(1, 4, 3))
    merged(held, normal(1, 4, 3), None, 1.0, 0.62)
    assert torch.equal(predicted(held, 0.5, 0.62), normal(1, 4, 3))


# --- how much goes on -----------------------------------------------------------------------------

PLAN = (1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0)
LEVELS = (0.97, 0.94, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def shares_of(noises, plan=PLAN):
    """What is measured in each step of a plan, and what should be."""
    carry, seen = Carry(1.0), []
    for step, (level, dense) in enumerate(zip(LEVELS, plan)):
        expected = carried_on(seen, position(level))[1] if seen else torch.ones(len(noises[0]))
        yield torch.ones(len(noises[0])) if carry.share is None else carry.share, expected.float()
        carry.observe(noises[step], level, dense=dense == 1)
        if dense:
            seen.append((step, position(level), noises[step]))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_as_much_goes_on_as_has_gone_on(scale):
    noises = [scale * normal(3, 4, 6, 5, seed=seed) for seed in range(len(PLAN))]
    for step, (found, expected) in enumerate(shares_of(noises)):
        torch.testing.assert_close(found, expected)
        assert (expected == 1).all() == (step < 4)  # the first stretch has ended then


@pytest.mark.parametrize(
    "q, share", [(1, 1), (0.3, 1), (0, 1), (-0.4, 0.6), (-1, 0), (-9, 0), (1.7, 1.7), (9, 2)]
)
def test_shares_by_hand(q, share):
    """What came was q times what had been expected to."""
    first, change = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    t = [position(level) for level in LEVELS]
    due = gain(t[1] - t[3], t[0] - t[1], 0.625).float() * change
    noises = [first, first + change, None, first + change + q * due]
    noises[2] = torch.full_like(first, torch.nan)  # reused, and of no account
    found = list(shares_of([*noises, first], PLAN[:5]))[-1][0]
    torch.testing.assert_close(found, torch.full((2,), float(share)), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_teaches_nothing():
    noises = [normal(2, 3, 4, seed=seed) for seed in range(len(PLAN))]
    noises[3][0, 1, 2] = torch.inf
    noises[7] = noises[4] = noises[3].clone()  # nothing changes
    found = [share for share, _ in shares_of(noises)]
    assert all(share.isfinite().all() for share in found)
    assert all(share[0] == 1 for share in found), "nor is what came taken for more than expected"


def test_other_samples_begin_anew():
    carry = Carry(0.0)
    for step, dense in enumerate((1, 1, 0, 1)):
        carry.observe(normal(2, 3, 4, seed=step), LEVELS[step], dense=dense == 1)
    assert carry.share.shape == (2,)
    carry.observe(normal(3, 3, 4), LEVELS[4], dense=True)
    assert torch.equal(carry.share, torch.zeros(3))


def test_shares_of_guidance_copies_and_of_lists():
    """Each sample has its own, in a batch of copies, and in a list of one tensor for each."""
    share, change = torch.tensor([0.5, 2.0]), normal(4, 3, 5, seed=1)
    held, listed = HeldOutput(), HeldOutput()
    for at, level in enumerate((0.9, 0.8)):
        output = normal(4, 3, 5) + at * change
        held.take(output, level, 0.625, reuse=Reuse.MEASURED)
        listed.take((list(output),), level, 0.625, reuse=Reuse.MEASURED)
    t0, t1, t = (position(level) for level in (0.9, 0.8, 0.5))
    due = gain(t1 - t, t0 - t1, 0.625).float() * change * share.repeat(2)[:, None, None]
    for each in (held, listed):
        each.carry_by(share)
        found = each.finish(each.predictor(0.5, 0.625)())
        found = found if torch.is_tensor(found) else torch.stack(found[0])
        torch.testing.assert_close(found, normal(4, 3, 5) + change + due, rtol=1e-4, atol=1e-5)


def test_samples_that_cannot_be_told_go_on_as_they_are_expected_to():
    held, noise = HeldOutput(), normal(3, 4, 5)
    for at, level in enumerate((0.9, 0.8)):
        held.take(noise + at, level, 0.625, reuse=Reuse.MEASURED)
    before = held.finish(held.predictor(0.5, 0.625)())
    held.carry_by(torch.tensor([0.5, 2.0]))
    assert torch.equal(held.finish(held.predictor(0.5, 0.625)()), before)


# --- outputs of any form --------------------------------------------------------------------------


class Cache:
    """Something that is no tensor."""


CACHE = Cache()
FORMS = {
    "tensor": lambda x: x,
    "scalar": lambda x: x[0, 0, 0],
    "strided": lambda x: x.transpose(0, 1),
    "tuple": lambda x: (x, None, CACHE),
    "dataclass": lambda x: Transformer2DModelOutput(sample=x),
    "lists": lambda x: ([x[0], x[1, :2]], {"sound": x * 2, "name": "text"}),
    "others": lambda x: (x, torch.arange(3), x > 0, torch.empty(2, 0)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_outputs_of_any_form(form):
    """Each tensor is carried on by itself; the rest is as it last was, and nothing is shared."""
    held, noises = HeldOutput(), [normal(2, 3, 4, seed=seed) for seed in range(3)]
    for sigma, noise in zip((0.95, 0.8, 0.6), noises):
        output = form(noise.clone())
        held.take(output, sigma, 0.62, reuse=Reuse.CARRIED)
        for leaf in tree_leaves(output):
            if torch.is_tensor(leaf) and leaf.dtype == torch.float32:
                leaf.zero_()  # the caller may write to what is his
    t0, t1, t = (position(sigma) for sigma in (0.8, 0.6, 0.3))
    g = gain(abs(t - t1), abs(t1 - t0), 0.62).float()
    for _ in range(2):
        found = held.finish(held.predictor(0.3, 0.62)())
        expected = form(noises[2] + g * (noises[2] - noises[1]))
        last = form(noises[2])
        assert type(found) is type(expected)
        leaves = zip(tree_leaves(found), tree_leaves(expected), tree_leaves(last), strict=True)
        for leaf, carried, kept in leaves:
            if not torch.is_tensor(leaf):
                assert leaf is kept
            elif leaf.is_floating_point():
                torch.testing.assert_close(leaf, carried)
                leaf.zero_()  # that was a copy
            else:
                assert torch.equal(leaf, kept)


def test_an_output_of_another_form_begins_anew():
    held = HeldOutput()
    for noise in (normal(2, 3), normal(2, 3, seed=1), normal(3, 3), normal(3, 3).double()):
        held.take((noise,), 0.9 - 0.01 * len(noise), 0.625, reuse=Reuse.MEASURED)
    (found,) = held.finish(held.predictor(0.3, 0.625)())
    assert torch.equal(found, normal(3, 3).double())


# --- drift ----------------------------------------------------------------------------------------


def guided(seed):
    return normal(2, 3, 4, 6, seed=seed)  # of 2 x 3 regions of 2 x 2 pixels


def tokens(noise):
    return rearrange(noise, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)


def test_drift_against_its_definition(monkeypatch):
    rows = torch.tensor([[0, 4], [2, 3]])
    updates = [(0.95, None, guided(0)), (0.8, None, guided(1)), (0.6, rows, guided(2))]
    seen = []
    select = ras_kernels.select_regions

    def recorded(scores, ages, count, **options):
        seen.append(scores.clone())
        return select(scores, ages, count, **options)

    monkeypatch.setattr(ras_kernels, "select_regions", recorded)
    selection = Selection(ras.RASConfig(), 4)
    for done in range(1, 4):
        level, active, noise = updates[done - 1]
        selection.observe(tokens(noise), active, level)
        for sigma in (0.5, 0.1):
            for count in (1, 2, 5, 6):
                chosen = selection.choose(tokens(noise), count, sigma)
                expected = drift_scores(updates[:done], sigma)
                assert chosen.dtype == torch.int32 and chosen.shape == (2, count)
                assert (chosen.diff(dim=1) > 0).all()
                if done > 1:  # the highest scores, ascending by place
                    assert torch.allclose(seen[-1], expected, rtol=1e-4)
                    best = expected.argsort(dim=1, descending=True)[:, :count]
                    assert torch.equal(chosen, best.sort(dim=1).values)


def test_noise_of_another_dtype_is_observed():
    """Loops by hand may mix them."""
    chosen = []
    for dtype in (torch.float32, torch.float64):
        selection = Selection(ras.RASConfig(), 4)
        selection.observe(tokens(guided(0)), None, 0.9)
        selection.observe(tokens(guided(1)).to(dtype), None, 0.8)
        chosen.append(selection.choose(tokens(guided(1)), 3, 0.5))
    assert torch.equal(*chosen)


def test_masked_regions_come_first():
    scores = drift_scores([(0.9, None, guided(0)), (0.8, None, guided(1))], 0.5)
    low = scores.argsort(dim=1)[:, :2].sort(dim=1).values
    selection = Selection(ras.RASConfig(), 4, low)
    selection.observe(tokens(guided(0)), None, 0.9)
    selection.observe(tokens(guided(1)), None, 0.8)
    chosen = selection.choose(tokens(guided(1)), 3, 0.5)
    for s in range(2):
        best = scores[s].argmax().item()
        assert set(chosen[s].tolist()) == {*low[s].tolist(), best}
    assert torch.equal(selection.choose(tokens(guided(1)), 2, 0.5), low)
