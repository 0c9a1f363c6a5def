"""A transformer in a loop by hand, with no pipeline around it."""

import warnings

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from support import pipelines
from support.oracle import relative_error
from support.pipelines import sd3_inputs
from support.runs import (
    CONFIG,
    SHARES,
    by_keyword,
    by_position,
    fresh,
    loop,
    run,
    steps_of,
)

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.mark.parametrize("call", [by_keyword, by_position])
def test_bare_transformer(call):
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    transformer = pipe.transformer
    scheduler = pipelines.euler()
    assert ras.enable(transformer, CONFIG, scheduler=scheduler) is transformer
    result = loop(transformer, scheduler, inputs, call=call)
    assert steps_of(transformer) == (3, 5)
    ras.disable(transformer)
    assert torch.equal(result, fresh(lambda pipe: inputs))


def test_steps_that_are_not_seen():
    """The user's own Euler step: nothing is known of the noise, so all is dense, with a warning."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    scheduler = pipelines.euler()

    def own_step(noise, t, latents):
        i = (scheduler.timesteps == t).nonzero().item()
        return latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * noise

    plain = loop(pipe.transformer, scheduler, inputs, step=own_step)
    ras.enable(pipe.transformer, CONFIG, scheduler=scheduler)
    for expected_warnings in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = loop(pipe.transformer, scheduler, inputs, step=own_step)
        told = [w for w in caught if issubclass(w.category, ras.RASWarning)]
        assert len(told) == expected_warnings
        assert relative_error(result, plain) < 1e-5
        assert ras.stats(pipe.transformer).steps_sparse == 0


@pytest.mark.parametrize("plan", [(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), SHARES])
def test_guidance_in_two_calls(plan):
    """Each branch has its own caches: it is guidance in one."""
    pipe = pipelines.sd3()
    inputs, scheduler = sd3_inputs(pipe, 2), pipelines.euler()
    ras.enable(pipe.transformer, plan=plan, scheduler=scheduler)
    together = loop(pipe.transformer, scheduler, inputs)
    counts = ras.stats(pipe.transformer).region_counts
    apart = loop(pipe.transformer, scheduler, inputs, separate=True)
    stats = ras.stats(pipe.transformer)
    assert relative_error(apart, together) < 1e-5
    assert stats.calls_total == 16 and torch.equal(stats.region_counts, counts)
    assert (stats.steps_sparse > 0) == (plan is not SHARES) and stats.steps_skipped


def test_gradients_are_those_of_the_plain_model():
    """With gradients enabled `ras` stands aside."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    transformer, scheduler = pipe.transformer, pipe.scheduler

    def gradients():
        with torch.enable_grad():
            loop(transformer, scheduler, inputs, steps=6).square().mean().backward()
        found = {name: p.grad for name, p in transformer.named_parameters()}
        transformer.zero_grad()
        return found

    plain = gradients()
    with ras.enabled(pipe, CONFIG), warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)
        found = gradients()
    for name, gradient in plain.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_the_noise_handed_out_is_the_callers_own(family):
    """Writing into a result changes nothing that `ras` keeps (patch 1: no copy on the way out)."""
    pipe = getattr(pipelines, family)(patch_size=1)
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, height=8, width=8)

    def spoil(module, args, kwargs, output):
        spoiled = output[0].clone()
        output[0].fill_(float("nan"))
        return (spoiled,)

    with ras.enabled(pipe, CONFIG):
        expected = run(pipe, inputs)
        hook = pipe.transformer.register_forward_hook(spoil, with_kwargs=True)
        result = run(pipe, inputs)
        hook.remove()
    assert torch.equal(result, expected)


def test_decoded_image():
    """All the way to pixels, with prompts as text."""
    pipe = pipelines.sd3(parts=pipelines.text_encoders(), vae=pipelines.autoencoder())
    call = dict(prompt="a red ring", max_sequence_length=4, **pipelines.size(16, 16))
    with ras.enabled(pipe, CONFIG) as enabled:
        assert enabled is pipe and isinstance(pipe, StableDiffusion3Pipeline)
        (image,) = run(pipe, call)
    assert image.size == (128, 128)
