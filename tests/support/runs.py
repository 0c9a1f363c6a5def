"""Runs that tests make of the pipelines of `pipelines.py`, and how they are checked.

A run is recorded, and every call of the transformer handed to `oracle.py`, with the rows that `ras`
chose for the sparse steps: the noise must be the same in each call.
"""

import functools
import itertools
import warnings
from collections import Counter

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import ras
from ras.clock import Clock
from ras.layout import Layout
from ras.output import HeldTokens
from ras.plan import Reuse
from ras.policy.planner import plan_run
from support import pipelines
from support.oracle import NOBODY, Oracle, position, relative_error
from support.pipelines import Recorder, normal

STEPS, START, RESETS = 8, 2, (5,)
SPARSE = [2, 3, 4, 6, 7]
SHARES = (1, 1, 0, 1, 0, 0, 1, 0)  # a plan with skipped steps
DENSE_STEPS = (0, 1, 3, 6)  # of that plan
CONFIG = ras.RASConfig.paper(scheduler_start_step=START, error_reset_steps=RESETS)


def run(pipe, inputs, steps=STEPS, guidance=4.0, seed=7, **call):
    """The latents that a call gives; whatever draws random numbers draws the same ones."""
    torch.manual_seed(seed)
    call["generator"] = torch.Generator().manual_seed(seed)
    return pipe(**inputs, num_inference_steps=steps, guidance_scale=guidance, **call).images


def errors(record, model, rows, order=1, **settings):
    """The relative error of each recorded call's noise; `rows` has the active ones of some steps.

    Model and settings are the oracle's. With a solver of order 2, two calls of the scheduler are
    one step.
    """
    oracle, scheduler = Oracle(model, **settings), record.pipe.scheduler
    sigmas = scheduler.sigmas[scheduler.begin_index or 0 :]
    assert not ras.is_enabled(model) and {c["after"] // order for c in record.calls} >= set(rows)
    for call in record.calls:
        inputs = {name: call[name] for name in call if name not in ("noise", "after")}
        stage = call["after"]
        noise = oracle(rows.get(stage // order), sigmas[stage], **inputs)
        yield relative_error(call["noise"], noise)


def check_rows(*args, **kwargs):
    """Every call's noise is the oracle's; see `errors`."""
    found = list(errors(*args, **kwargs))
    assert found and all(error < 1e-5 for error in found), found


def rows_of(record, sparse, planned=None):
    """The rows of each `sparse` step: one selection was made for each of them, or `planned` one."""
    planned = list(sparse if planned is None else planned)
    assert len(record.rows) == len(planned), "one selection for each sparse step"
    return {step: rows for step, rows in zip(planned, record.rows) if step in sparse}


def check(record, model, sparse=SPARSE, planned=None, order=1, **settings):
    """Every call's noise is the oracle's, and the rows of each sparse step were used."""
    check_rows(record, model, rows_of(record, sparse, planned), order, **settings)


def check_run(monkeypatch, pipe, inputs, config=CONFIG, **call):
    """A recorded run with `ras`, checked, and its statistics."""
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, config):
        run(pipe, inputs, **call)
        stats = ras.stats(pipe)
    check(record, pipe.transformer)
    assert (stats.steps_dense, stats.steps_sparse) == (STEPS - len(SPARSE), len(SPARSE))
    return record


class Stages:
    """How many steps a scheduler has made since, and which calls of a model came after the last."""

    def __init__(self, scheduler):
        self.scheduler, self.done, self.calls = scheduler, 0, Counter()
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its signature
        def counted(*args, **kwargs):
            self.done += 1
            self.calls.clear()
            return step(*args, **kwargs)

        scheduler.step = counted

    @property
    def step(self):
        return self.done // self.scheduler.order

    @property
    def level(self):
        """The noise level under way, as flow matching tells it."""
        scheduler, sigmas = self.scheduler, getattr(self.scheduler, "sigmas", None)
        if sigmas is None:
            signal = scheduler.alphas_cumprod[scheduler.timesteps[self.done]]
            ratio = ((1 - signal) / signal).sqrt()
        else:
            ratio = sigmas[self.done + (scheduler.begin_index or 0)]
            if scheduler.config.get("use_flow_sigmas", "FlowMatch" in type(scheduler).__name__):
                return ratio
        return ratio / (1 + ratio)

    def branch(self, model, batch):
        """Note a call; return what tells it from the others of its step."""
        self.calls[model, batch] += 1
        return batch, self.calls[model, batch]


def by_oracle(pipe, rows, factors=None, names=("transformer",), kind=Oracle, **settings):
    """A plain pipeline with the oracle in the place of its transformers; it is returned, too.

    `rows` are those of each step; the first call of each branch computes all tokens in any case.
    `factors` are the extrapolation of each step, if that is not always the same.
    """
    stages = Stages(pipe.scheduler)
    for name in names:
        model = getattr(pipe, name)
        model.forward = _answering(kind(model, **settings), stages, rows, factors)
    return pipe


def _answering(oracle, stages, rows, factors):
    """A forward that gives the noise of an oracle."""
    begun = set()

    def forward(*args, **kwargs):
        if factors is not None:
            oracle.extrapolation = factors[stages.step]
        latents = args[0] if args else kwargs["hidden_states"]
        branch = stages.branch(oracle, len(latents))
        active = rows[stages.step] if branch in begun else None
        begun.add(branch)
        noise = oracle(active, stages.level, *args, branch=branch, **kwargs)
        return Transformer2DModelOutput(noise) if kwargs.get("return_dict", True) else (noise,)

    return functools.update_wrapper(forward, oracle.forward)  # pipelines look at its signature


def of_plan(shares):
    """The rows of each step of a plan that skips some and computes all tokens in the others."""
    return [None if share else NOBODY for share in shares]


def fresh(inputs, config=CONFIG, **call):
    """What a pipeline gives that was made and enabled for this one call."""
    pipe = pipelines.sd3()
    with ras.enabled(pipe, config):
        return run(pipe, inputs(pipe), **call)


def steps_of(pipe):
    stats = ras.stats(pipe)
    return stats.steps_dense, stats.steps_sparse


LORA_LAYERS = [
    "context_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.2.ff.net.0.proj",
    "norm_out.linear",
    "proj_out",
]


def lora(transformer, seed, rank=4):
    """A LoRA's state dict, and what it adds to each weight."""
    state, deltas = {}, {}
    for n, name in enumerate(LORA_LAYERS):
        layer = transformer.get_submodule(name)
        a = normal(rank, layer.in_features, seed=seed + n, scale=layer.in_features**-0.5)
        b = normal(layer.out_features, rank, seed=seed - n, scale=rank**-0.5)
        state[f"transformer.{name}.lora_A.weight"] = a
        state[f"transformer.{name}.lora_B.weight"] = b
        deltas[f"{name}.weight"] = b @ a
    return state, deltas


def load_lora(pipe, state, name="style", **options):
    """Load a copy: an in-place swap would write into the tensors that were loaded before."""
    state = {key: weight.clone() for key, weight in state.items()}
    pipe.load_lora_weights(state, adapter_name=name, **options)


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler-dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "euler-stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
    "dpm-multistep": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm-multistep-3": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    "dpm-sde": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "dpm-singlestep": lambda: DPMSolverSinglestepScheduler(**FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "deis": lambda: DEISMultistepScheduler(**FLOW),
    "sa-solver": lambda: SASolverScheduler(**FLOW),
}


class Stop(Exception):
    pass


def stop_at(step_to_stop):
    def stop(pipe, step, t, tensors):
        if step == step_to_stop:
            raise Stop
        return tensors

    return stop


def run_noting_warnings(pipe, inputs, **call):
    """The result, and the RAS warnings' texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(pipe, inputs, **call)
    return result, [str(w.message) for w in caught if issubclass(w.category, ras.RASWarning)]


def by_keyword(transformer, latents, text, pooled, t):
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        return_dict=False,
    )[0]


def by_position(transformer, latents, text, pooled, t):
    return transformer(latents, text, pooled, t).sample


def loop(
    transformer,
    scheduler,
    inputs,
    steps=STEPS,
    guidance=4.0,
    step=None,
    call=by_keyword,
    separate=False,
    timesteps=None,
):
    """Sampling by hand, with one call of the transformer for both branches or with two."""
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    pooled = torch.cat([inputs["negative_pooled_prompt_embeds"], inputs["pooled_prompt_embeds"]])
    step = step or (lambda noise, t, x: scheduler.step(noise, t, x, return_dict=False)[0])
    if timesteps is None:
        scheduler.set_timesteps(steps)
    latents = inputs["latents"]
    for t in scheduler.timesteps if timesteps is None else timesteps(scheduler):
        if separate:
            parts = list(zip(text.chunk(2), pooled.chunk(2)))
            noise = [call(transformer, latents, *part, t.expand(len(latents))) for part in parts]
            without, given = noise
        else:
            both = torch.cat([latents, latents])
            without, given = call(transformer, both, text, pooled, t.expand(len(both))).chunk(2)
        latents = step(without + guidance * (given - without), t, latents)
    return latents


def levels(steps, shift=3.0):
    """A run's noise levels, that of the end included."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist())


def planned(config, sigmas, tokens, text, masked=None):
    """The plan of a run of so many tokens, and what is warned of."""
    found = plan_run(config, Clock(tuple(sigmas)), Layout((1, tokens), text), masked)
    return found.plan, found.warning


def patches(noise, p=2):
    """(batch, tokens, numbers of a patch)."""
    batch, channels, height, width = noise.shape
    noise = noise.reshape(batch, channels, height // p, p, width // p, p)
    return noise.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // p**2, -1)


def patch_of(noise, sample, region, width, p=2):
    y, x = divmod(region, width // p)
    return noise[sample, :, y * p : (y + 1) * p, x * p : (x + 1) * p]


def drift_scores(updates, sigma, width=6):
    """Each region's last two guided noises: how much they differ, at that pace until now."""
    samples, regions = len(updates[0][2]), updates[0][2][0, 0].numel() // 4
    scores = torch.zeros(samples, regions)
    for s, r in itertools.product(range(samples), range(regions)):
        seen = [
            (position(level), patch_of(noise, s, r, width))
            for level, rows, noise in updates
            if rows is None or r in rows[s].tolist()
        ]
        if len(seen) > 1:
            (t0, v0), (t1, v1) = seen[-2:]
            pace = (v1 - v0).square().mean().sqrt() / abs(t1 - t0)
            scores[s, r] = pace * abs(position(sigma) - t1)
    return scores


def held_like(noise, reuse=Reuse.CARRIED):
    """Room for noise of this shape."""
    held = HeldTokens()
    held.allocate(noise.shape, noise.dtype, noise.device, reuse=reuse)
    return held


def merged(held, fresh, rows, sigma, extrapolation):
    """What comes out of a step at `sigma` that predicts `fresh` of the tokens `rows`."""
    return held.merge(fresh, rows, held.expect(rows, sigma, extrapolation)).clone()


def predicted(held, sigma, extrapolation):
    """What comes out of a step that predicts nothing."""
    return held.predict(held.gain(sigma, extrapolation))
