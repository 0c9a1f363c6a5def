"""Plans that calibration tries: their factors, and moves from one to another."""

import numpy as np
import pytest
import torch
from support.runs import held_like, merged, predicted

import ras
from ras.clock import Clock
from ras.layout import Layout
from ras.policy import candidates
from ras.policy.error_model import ErrorModel, covariance

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


def test_factors_amount_to_the_models_gains():
    """What a run makes of a factor is the best prediction from the measured covariance."""
    generator = np.random.default_rng(0)
    sigmas = [1, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1, 0]
    wander = generator.normal(size=(7, 7)) * 0.1
    kernel = covariance(Clock(tuple(sigmas)), 0.5) + wander @ wander.T
    model = ErrorModel(Clock(tuple(sigmas)).weights, kernel, hold=False)
    shares = (1, 0, 1, 1, 0, 0.5, 0)
    found = candidates.factors(model, sigmas, shares)
    assert [found[s] for s in (0, 1, 2, 3)] == [0, 0, 0, 0]
    held = held_like(torch.zeros(1, 1, 1))
    for step, noise in ((2, 0.0), (3, 1.0)):
        merged(held, torch.full((1, 1, 1), noise), None, sigmas[step], 0.0)
    gains = model.gains(2, 3, np.arange(4, 7))
    for step, gain in zip((4, 5, 6), gains):
        low, high = candidates.FACTORS
        if low < found[step] < high:
            assert predicted(held, sigmas[step], found[step]).item() - 1 == pytest.approx(
                gain, abs=1e-3
            )
    assert any(candidates.FACTORS[0] < found[s] < candidates.FACTORS[1] for s in (4, 5, 6))


@pytest.mark.parametrize("tokens, text", [(64, 12), (4096, 333), (4096, 0)])
def test_neighbours_are_one_move_away(tokens, text):
    shares = (1, 1, 0, 1, 0, 0.5, 0, 1, 0, 0)
    model = ErrorModel([0.1] * 10, np.eye(10), hold=False)
    layout = Layout((tokens,), text)
    near = candidates.neighbours(model, shares, (0.25, 0.5), layout, reuse_text=False)
    assert len(near) == len(set(near)) and shares not in near
    for plan in near:
        ras.Plan(plan)
        changed = [s for s in range(10) if plan[s] != shares[s]]
        if sorted(plan) == sorted(shares):  # a step went elsewhere
            a, b = changed
            assert abs(a - b) <= 3 and {plan[a], plan[b]} == {shares[a], shares[b]}
            assert 0 in (plan[a], plan[b])
        else:  # a dense step became partial ones
            (split,) = [s for s in changed if shares[s] == 1]
            assert all(shares[s] == 0 for s in changed if s != split)
            (size,) = {plan[s] for s in changed}
            assert size in (0.25, 0.5)
            spent = len(changed) * (size * tokens + text)
            assert abs(spent - tokens - text) <= (size * tokens + text) / 2
