"""Noise levels of every kind of scheduler, on the ruler of flow matching."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from ras.clock import Clock, is_set, position, read_clock
from ras.policy.error_model import SHAKE, covariance

STEPS = 12
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
SCHEDULERS = {  # and what a model predicts
    "FlowMatchEulerDiscreteScheduler": ({}, "flow"),
    "FlowMatchHeunDiscreteScheduler": ({}, "flow"),
    "FlowMatchLCMScheduler": ({}, "flow"),
    "LTXEulerAncestralRFScheduler": ({}, "flow"),
    "FlowMapEulerDiscreteScheduler": ({}, "flow"),
    "UniPCMultistepScheduler": (FLOW, "flow"),
    "DPMSolverMultistepScheduler": ({}, "epsilon"),
    "DEISMultistepScheduler": ({}, "epsilon"),
    "SASolverScheduler": ({}, "epsilon"),
    "EulerDiscreteScheduler": (dict(prediction_type="v_prediction"), "v_prediction"),
    "EulerAncestralDiscreteScheduler": ({}, "epsilon"),
    "HeunDiscreteScheduler": ({}, "epsilon"),
    "DDIMScheduler": (dict(prediction_type="sample"), "sample"),
    "DDPMScheduler": ({}, "epsilon"),
    "PNDMScheduler": (dict(skip_prk_steps=True), "epsilon"),
    "LCMScheduler": ({}, "epsilon"),
    "CogVideoXDDIMScheduler": (dict(prediction_type="v_prediction"), "v_prediction"),
    "CogVideoXDPMScheduler": ({}, "epsilon"),
    "EDMEulerScheduler": ({}, "epsilon"),
    "EDMDPMSolverMultistepScheduler": ({}, "epsilon"),
    "SCMScheduler": ({}, "v_prediction"),
}


def make(name, **config):
    scheduler = getattr(diffusers, name)(**config)
    options = dict(max_timesteps=1.57, intermediate_timesteps=None) if "SCM" in name else {}
    assert not is_set(scheduler)
    scheduler.set_timesteps(STEPS, **options)
    assert is_set(scheduler)
    return scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_fall_from_noise_to_image(name):
    config, prediction = SCHEDULERS[name]
    clock = read_clock(make(name, **config))
    assert clock.prediction == prediction
    assert clock.steps == STEPS + (name == "PNDMScheduler")  # which takes the second one twice
    assert 1 >= clock.stages[0] > 0.9 and 0 <= clock.stages[-1] < 0.1
    assert all(a >= b for a, b in itertools.pairwise(clock.stages))
    assert all(map(math.isfinite, [*clock.weights, *map(position, clock.sigmas)]))
    assert len(clock.weights) == len(clock.scales) == clock.steps and min(clock.scales) > 0


def log_snr(sigma):
    return 2 * math.log((1 - sigma) / sigma)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler"])
def test_levels_have_the_signal_to_noise_ratio_of_their_timesteps(name):
    scheduler = make(name)
    for t, sigma in zip(scheduler.timesteps, read_clock(scheduler).sigmas):
        alpha = scheduler.alphas_cumprod[t].item()
        assert log_snr(sigma) == pytest.approx(math.log(alpha / (1 - alpha)), rel=1e-4)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_levels_from_ratios_of_noise_to_signal(name):
    """Those of a scheduler with `sigmas` are those of the same timesteps without."""
    scheduler = make(name)
    for t, sigma in zip(scheduler.timesteps.long(), read_clock(scheduler).sigmas):
        alpha = scheduler.alphas_cumprod[t].item()
        assert log_snr(sigma) == pytest.approx(math.log(alpha / (1 - alpha)), abs=0.03)


def test_levels_of_edm_are_relative_to_the_data():
    scheduler = make("EDMEulerScheduler", sigma_data=0.5)
    ratios = [2 * sigma for sigma in scheduler.sigmas.tolist()]
    assert read_clock(scheduler).stages == pytest.approx([r / (1 + r) for r in ratios])


def test_levels_of_trigonometric_flow():
    scheduler = make("SCMScheduler")
    angles = scheduler.timesteps.tolist()
    expected = [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles]
    assert read_clock(scheduler).stages == pytest.approx(expected, abs=1e-6)


def test_rising_sigmas_are_turned_round():
    rising = make("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
    falling = make("FlowMatchEulerDiscreteScheduler")
    assert rising.sigmas[0] < rising.sigmas[-1]
    stages = read_clock(rising).stages
    assert stages[0] == pytest.approx(1) and all(a > b for a, b in itertools.pairwise(stages))
    assert stages == pytest.approx(read_clock(falling).stages, abs=0.01)


def test_a_run_that_begins_late():
    """At the scheduler's own index, or where the first call of the model is."""
    euler = make("FlowMatchEulerDiscreteScheduler")
    euler.set_begin_index(5)
    assert read_clock(euler, torch.tensor([0.0])).stages == tuple(euler.sigmas.tolist()[5:])
    assert read_clock(euler).stages == tuple(euler.sigmas.tolist()[5:])
    euler = make("FlowMatchEulerDiscreteScheduler")  # which nobody has told where to begin
    assert read_clock(euler, begin=3).stages == tuple(euler.sigmas.tolist()[3:])
    ddim = make("DDIMScheduler")
    whole, first = read_clock(ddim), ddim.timesteps[4].expand(2)
    assert read_clock(ddim, first).stages == whole.stages[4:]
    assert read_clock(ddim, torch.tensor(0.123)).stages == whole.stages


def test_as_many_steps_as_in_training_are_a_run_only_of_a_toy():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=8)
    scheduler.set_timesteps(8)
    assert is_set(scheduler)
    assert not is_set(diffusers.HeunDiscreteScheduler())  # which sets those of training by itself


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_what_a_step_of_ddim_makes_of_an_error(prediction):
    scheduler = make(
        "DDIMScheduler", prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
    )
    clock, generator = read_clock(scheduler), torch.Generator().manual_seed(0)
    x, p = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    for t, after, weight in zip(scheduler.timesteps, clock.sigmas[1:], clock.weights):
        ends = [scheduler.step(p + e, t, x).prev_sample for e in (0.0, 1.0)]
        size = (1 - after) / math.hypot(1 - after, after)  # alpha
        total = size / (1 - after)  # alpha + s
        assert ((ends[1] - ends[0]).abs() / total).mean().item() == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize("prediction, sign", [("flow", 1), ("epsilon", 1), ("sample", -1)])
def test_all_predictions_change_where_the_velocity_does(prediction, sign):
    """On any path, here a curve of third degree: `dp = m dv`."""

    def z(s):
        return 0.3 * s**3 - 1.2 * s**2 + 0.4 * s + 0.7

    def velocity(s):
        return 0.9 * s**2 - 2.4 * s + 0.4

    def predicted(s):
        parts = {"flow": velocity(s), "epsilon": z(s) + (1 - s) * velocity(s)}
        return parts.get(prediction, z(s) - s * velocity(s))

    for s in (0.1, 0.4, 0.8, 0.95):
        moved = predicted(s + 1e-5) - predicted(s - 1e-5)
        scale = Clock((s, 0.0), 1, prediction).scales[0]
        assert moved == pytest.approx(sign * scale * (velocity(s + 1e-5) - velocity(s - 1e-5)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_covariance_is_that_of_a_scaled_walk(prediction):
    """Of a Brownian motion, whose steps are independent of each other, and what shakes besides."""
    clock = Clock((0.97, 0.9, 0.7, 0.4, 0.2, 0.1, 0.0), 1, prediction)
    kernel, scales = covariance(clock, 0.0), np.array(clock.scales)
    at = [position(sigma) for sigma in clock.sigmas[:-1]]
    steps = np.abs(np.diff(at)) * ((scales[1:] + scales[:-1]) / 2) ** 2
    for i, j in itertools.combinations(range(6), 2):
        distance = kernel[i, i] + kernel[j, j] - 2 * kernel[i, j]
        own = sum(SHAKE * max(1 - clock.sigmas[k] / 0.3, 0) ** 2 * scales[k] ** 2 for k in (i, j))
        assert distance == pytest.approx(steps[i:j].sum() + own)
