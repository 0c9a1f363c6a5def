"""Steps that compute nothing or a part, in whole runs.

The oracle is a stand-in for the plain transformer that answers the skipped steps itself.
"""

import copy
import itertools
import warnings
from types import SimpleNamespace

import naive
import pipelines
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from naive import relative_error
from pipelines import Recorder, normal, sd3_inputs
from runs import SHARES, check, drift_scores, gain, levels, loop, lumina_oracle, run

import ras
from ras.controller import Controller
from ras.planner import position
from ras.scheduler import noise_levels

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- whole runs: steps that compute nothing -------------------------------------------------------


DENSE_STEPS = (0, 1, 3, 6)


HEUN = FlowMatchHeunDiscreteScheduler


class ByHand:
    """The plain transformer in the dense steps; else what its last two answers lead to."""

    def __init__(self, transformer, scheduler, shares, extrapolation=0.62):
        self.compute, self.scheduler = transformer.forward, scheduler
        self.shares, self.factor = shares, extrapolation
        self.stage, self.computed, self.seen = 0, 0, []  # (position, noise) of two levels

    def __call__(self, *args, **kwargs):
        step = self.stage // self.scheduler.order
        t = position(noise_levels(self.scheduler)[self.stage])
        self.stage += 1
        if self.shares[step]:
            noise = self.compute(*args, **{**kwargs, "return_dict": False})[0]
            self.computed += 1
            if self.seen and self.seen[-1][0] == t:
                self.seen.pop()
            self.seen = [*self.seen, (t, noise)][-2:]
        else:
            (t1, noise) = self.seen[-1]
            if len(self.seen) > 1:
                t0, v0 = self.seen[0]
                noise = noise + gain(abs(t - t1), abs(t1 - t0), self.factor) * (noise - v0)
        if kwargs.get("return_dict", True):
            return Transformer2DModelOutput(sample=noise)
        return (noise,)


def skipping(family="sd3", batch=1, scheduler=pipelines.euler, shares=SHARES, **call):
    """What a run with the plan gives, what it gives by hand, and the statistics."""
    pipe = getattr(pipelines, family)(scheduler=scheduler())
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, batch)
    plain = getattr(pipelines, family)(scheduler=scheduler())
    hand = ByHand(plain.transformer, plain.scheduler, shares)
    plain.transformer.forward = hand
    expected = run(plain, inputs, len(shares), **call)
    with ras.enabled(pipe, plan=shares, extrapolation=0.62):
        result = run(pipe, inputs, len(shares), **call)
        stats = ras.stats(pipe)
    return result, expected, stats, hand


@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
@pytest.mark.parametrize("family, batch, guidance", [("sd3", 1, 1.0), ("sd3", 2, 4.0)])
def test_skipped_steps(family, batch, guidance, scheduler):
    result, expected, stats, hand = skipping(family, batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    order, copies = scheduler().order, batch * (2 if guidance > 1 else 1)
    calls = 8 * order - (order - 1)
    assert hand.stage == calls and hand.computed == 4 * order
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (4, 0, 4)
    assert (stats.tokens_computed, stats.tokens_total) == (
        copies * 64 * hand.computed,
        copies * 64 * calls,
    )
    assert (stats.text_tokens, stats.text_tokens_total) == (
        copies * 12 * hand.computed,
        copies * 12 * calls,
    )
    assert stats.speedup_ceiling == calls / hand.computed
    assert torch.equal(stats.region_counts, torch.full((batch, 8, 8), hand.computed))
    assert stats.plan.shares == SHARES and stats.steps_planned == 8 and stats.warnings == ()


@pytest.mark.parametrize("batch, guidance", [(1, 1.0), (3, 4.0)])
@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
def test_skipped_steps_of_lumina(scheduler, batch, guidance):
    result, expected, stats, hand = skipping("lumina", batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)
    copies = batch * (2 if guidance > 1 else 1)
    assert stats.tokens_computed == copies * 64 * hand.computed
    assert (stats.text_tokens, stats.text_tokens_total) == (0, 0)


@pytest.mark.parametrize("return_dict", [True, False])
def test_skipped_steps_in_a_loop_by_hand(return_dict):
    """No pipeline at all: the transformer is called with and without a dict to return."""

    def call(transformer, latents, text, pooled, t):
        output = transformer(latents, text, pooled, t, return_dict=return_dict)
        assert isinstance(output, Transformer2DModelOutput if return_dict else tuple)
        return output.sample if return_dict else output[0]

    pipe = pipelines.sd3()
    inputs, scheduler = sd3_inputs(pipe, 2), pipelines.euler()
    hand = ByHand(pipe.transformer, scheduler, SHARES)
    expected = loop(hand, scheduler, inputs, call=call)
    ras.enable(pipe.transformer, plan=SHARES, extrapolation=0.62, scheduler=scheduler)
    result = loop(pipe.transformer, scheduler, inputs, call=call)
    stats = ras.stats(pipe.transformer)
    ras.disable(pipe.transformer)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)


def test_factors_of_a_plan_count_for_their_steps():
    shares, factors = (1, 1, 0, 0, 1, 0), (0, 0, 0.3, 1.0, 0, 0)
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    hand = ByHand(plain.transformer, plain.scheduler, shares)

    def forward(*args, **kwargs):
        hand.factor = factors[hand.stage]
        return hand(*args, **kwargs)

    plain.transformer.forward = forward
    with ras.enabled(pipe, plan=ras.Plan(shares, factors)):
        assert relative_error(run(pipe, inputs, 6), run(plain, inputs, 6)) < 1e-5


def test_held_noise_in_skipped_steps():
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    plain.transformer.forward = ByHand(plain.transformer, plain.scheduler, SHARES, 0.0)
    with ras.enabled(pipe, plan=SHARES, extrapolation=0):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))


def test_skipped_steps_do_not_run_the_model():
    pipe = pipelines.sd3()
    entered, seen = [], []
    pipe.transformer.pos_embed.register_forward_hook(lambda *_: entered.append(len(seen)))
    pipe.transformer.register_forward_hook(lambda *_: seen.append(0))
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, sd3_inputs(pipe))
    assert entered == list(DENSE_STEPS) and len(seen) == 8


def test_guidance_cut_off_at_a_skipped_step():
    """There is no noise of half the batch to reuse: the step is dense instead."""
    pipe = pipelines.sd3()

    def cut(pipe, step, t, tensors):
        if step == 3:
            pipe._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with ras.enabled(pipe, plan=SHARES):
        run(
            pipe,
            sd3_inputs(pipe, 2),
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=names,
        )
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_skipped) == (5, 3)


@pytest.mark.parametrize("partial", [0.0, 0.25])
def test_skip_layer_guidance_with_skipped_steps(partial):
    """Its branch reuses its own noise, and computes where it has none yet."""
    pipe = pipelines.sd3()
    calls = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook
    with ras.enabled(pipe, plan=(1, 1, partial, 1, 0, 0, 1, 0)):
        hook(lambda *_: calls.append(0))
        result = run(
            pipe,
            sd3_inputs(pipe),
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.7,
        )
        stats = ras.stats(pipe)
    assert result.isfinite().all()
    assert (stats.steps_dense, stats.steps_sparse) == (4, int(partial > 0))
    # 1 to 5 have a second call, which is dense in a partial step
    assert len(calls) == 4 + 2 + 2 * (partial > 0)


# --- whole runs: partial steps --------------------------------------------------------------------


PARTIAL = (1, 1, 0.5, 0.5, 1, 0.25, 0.25, 0.5)


PARTIAL_STEPS = [2, 3, 5, 6, 7]


class Carried:
    """The oracle with noise, keys and values carried on, token by token, and text that stays."""

    def __init__(self, *args, extrapolation=0.62, carry=True, stay=False, **options):
        super().__init__(*args, **options)
        self.pace, self.carry, self.stay = extrapolation, carry, stay
        self.changes, self.text, self.times, self.noise_changes = {}, {}, {}, {}

    def gain(self, sample, token):
        t1, t0 = self.times[sample][token]
        return 0.0 if t0 is None else gain(abs(self.now - t1), abs(t1 - t0), self.pace)

    def again(self, sample, token):
        """Whether it was last computed at this level too: then that is what is replaced."""
        return float(sample in self.times and self.times[sample][token][0] == self.now)

    def carried(self, sample, kept, changes, rows, token_dim):
        """What is kept of each token, plus its gain times its change unless it is active."""
        out = kept.clone()
        for token in set(range(kept.shape[token_dim])) - set(rows.tolist()):
            at = (slice(None),) * token_dim + (token,)
            out[at] += self.gain(sample, token) * changes[at]
        return out

    def remember(self, layer, sample, rows, k, v):
        old = self.cache.get((layer, sample))
        new = super().remember(layer, sample, rows, k, v)
        last = self.changes.get((layer, sample), (torch.zeros_like(new[0]),) * 2)
        if old is not None:
            changes = tuple(change.clone() for change in last)
            for token in range(new[0].shape[1]) if rows is None else rows.tolist():
                again = self.again(sample, token)
                for change, a, b in zip(changes, new, old):
                    change[:, token] = a[:, token] - b[:, token] + again * change[:, token]
            last = changes
        self.changes[layer, sample] = last
        if rows is None or not self.carry:
            return new
        return tuple(self.carried(sample, a, c, rows, 1) for a, c in zip(new, last))

    def linear(self, name, x):
        if not name.endswith(("add_k_proj", "add_v_proj")):
            return super().linear(name, x)
        if not (self.stay and self.partial):
            self.text[name, self.at] = super().linear(name, x)
        return self.text[name, self.at]

    def __call__(self, latents, rows=None, skip_layers=(), **inputs):
        out = []
        for i in range(len(latents)):
            self.now, self.at = position(self.sigma(inputs["timestep"][i].item())), i
            active = None if rows is None else rows[i]
            self.partial = active is not None
            tokens = self.sample(i, latents, active, **inputs)
            old = self.noise.get(i)
            self.noise[i] = self.merge(old, tokens, active)
            change = self.noise_changes.get(i, torch.zeros_like(self.noise[i]))
            if old is not None:
                again = torch.tensor([self.again(i, token) for token in range(len(old))])
                fresh = self.noise[i] - old + again[:, None] * change
                change = fresh if active is None else self.merge(change, fresh[active], active)
            self.noise_changes[i] = change
            given = self.noise[i]
            if active is not None:
                given = self.carried(i, self.noise[i], change, active, 0)
            count = len(given)
            times = self.times.setdefault(i, [(None, None)] * count)
            for token in range(count) if active is None else active.tolist():
                if not self.again(i, token):
                    times[token] = self.now, times[token][0]
            out.append(self.image(given, latents.shape[-2:]))
        return torch.stack(out)


class CarriedSD3(Carried, naive.NaiveSD3):
    def sigma(self, timestep):
        return timestep / 1000


class CarriedLumina(Carried, naive.NaiveLumina):
    def sigma(self, timestep):
        return 1 - timestep


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))])
def test_partial_steps(monkeypatch, sizes, carry, stay):
    """With keys and values carried on and without, with text that walks and that stays."""
    pipe = pipelines.sd3(**sizes)
    record = Recorder(monkeypatch, pipe)
    oracle = CarriedSD3(pipe.transformer, carry=carry, stay=stay)
    settings = dict(extrapolation=0.62, kv_correction=carry, reuse_text=stay)
    with ras.enabled(pipe, plan=PARTIAL, **settings):
        run(pipe, sd3_inputs(pipe, 2))
        stats = ras.stats(pipe)
    check(record, oracle, PARTIAL_STEPS)
    assert [rows.shape[1] for rows in record.rows] == [32, 32, 16, 16, 32]
    tokens = 3 * 64 + 32 + 32 + 16 + 16 + 32
    walks = 3 if stay else 8
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 5, 0)
    assert (stats.tokens_computed, stats.tokens_total) == (4 * tokens, 4 * 8 * 64)
    assert (stats.text_tokens, stats.text_tokens_total) == (4 * 12 * walks, 4 * 12 * 8)
    assert stats.speedup_ceiling == 8 * 76 / (tokens + 12 * walks)
    assert stats.speedup_ceiling == stats.plan.speedup(64, 12, reuse_text=stay)
    assert stats.region_counts.flatten(1).sum(dim=1).tolist() == [tokens, tokens]


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_a_second_order_run(monkeypatch, carry):
    pipe = pipelines.sd3(scheduler=HEUN())
    record = Recorder(monkeypatch, pipe)
    oracle = CarriedSD3(pipe.transformer, carry=carry)
    with ras.enabled(pipe, plan=PARTIAL, extrapolation=0.62, kv_correction=carry):
        run(pipe, sd3_inputs(pipe, 2))
    check(record, oracle, PARTIAL_STEPS, order=2)


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_lumina(monkeypatch, carry):
    pipe = pipelines.lumina()
    record = Recorder(monkeypatch, pipe)
    plain = lumina_oracle(pipe, 16, 16)
    oracle = CarriedLumina(
        pipe.transformer, carry=carry, base_length=plain.base_length, factor=plain.factor
    )
    with ras.enabled(pipe, plan=PARTIAL, extrapolation=0.62, kv_correction=carry):
        run(pipe, pipelines.lumina_inputs(pipe, 2))
    check(record, oracle, PARTIAL_STEPS)


def test_the_active_rows_are_those_that_drift(monkeypatch):
    """From the guided noise that the scheduler got, also across a skipped step."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    shares = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0.5)
    with ras.enabled(pipe, plan=shares):
        run(pipe, sd3_inputs(pipe, 2))
    sigmas, rows, updates = levels(8), iter(record.rows), []
    for step, share in enumerate(shares):
        active = None
        if 0 < share < 1:
            active = next(rows)
            scores = drift_scores(updates, sigmas[step], 16)
            best = scores.argsort(dim=1, descending=True)[:, : int(share * 64)]
            assert torch.equal(active, best.sort(dim=1).values), step
        if share:
            updates.append((sigmas[step], active, record.noises[step]))
    assert len(record.rows) == 4


def text_rows(pipe):
    """The text's keys in each layer's cache."""
    caches = [layer._ours.cache for layer in Controller.of(pipe.transformer)._layers]
    return torch.stack([cache._kept[0][:, cache._image_tokens :] for cache in caches])


@pytest.mark.parametrize("stays", [False, True])
def test_text_rows_stay_as_they_are(stays):
    pipe = pipelines.sd3()
    seen = []

    def look(pipe, step, t, tensors):
        if step < 7:  # after the last one nothing is kept
            seen.append(text_rows(pipe).clone())
        return tensors

    with ras.enabled(pipe, plan=PARTIAL, reuse_text=stays):
        run(pipe, sd3_inputs(pipe, 2), callback_on_step_end=look)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [stays and share < 1 for share in PARTIAL[1:7]]


@pytest.mark.parametrize("stays", [False, True])
def test_control_net_with_partial_and_skipped_steps(stays):
    pipe = pipelines.sd3_controlnet()
    inputs = sd3_inputs(pipe, control_image=normal(1, 3, 128, 128).sigmoid())
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), reuse_text=stays):
        assert run(pipe, inputs).isfinite().all()
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 3, 2)


def test_nothing_is_kept_when_a_run_ends(monkeypatch):
    """Neither caches nor what drift is measured by; interrupted or not."""
    pipe = pipelines.sd3()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == 3
        return tensors

    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5)):
        for call in ({}, dict(callback_on_step_end=interrupt)):
            run(pipe, sd3_inputs(pipe), **call)
            state = Controller.of(pipe.transformer)._run
            assert state.selection is None and not state.noise
            assert ras.stats(pipe).cache_bytes > 0


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_half_precision(family):
    pipe = getattr(pipelines, family)()
    pipe.to(torch.bfloat16)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in getattr(pipelines, f"{family}_inputs")(pipe, 2).items()
    }
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), reuse_text=True):
        result = run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 2
    assert result.dtype == torch.bfloat16 and result.isfinite().all()


# --- the method on the transformer ----------------------------------------------------------------


def test_forward_is_back():
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(pipe, inputs)
    with ras.enabled(pipe, plan=SHARES):
        assert not torch.equal(run(pipe, inputs), expected)
        ras.enable(pipe, plan=SHARES)  # again, without a disable between
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(run(pipe, inputs), expected)


def wrap(transformer):
    """What offloading does: a function in the place of `forward`, which calls what was there."""
    inner, calls = transformer.forward, []

    def forward(*args, **kwargs):
        calls.append(0)
        return inner(*args, **kwargs)

    transformer.forward = forward
    return SimpleNamespace(forward=forward, calls=calls)


def test_a_wrapper_that_was_there_before():
    """It runs where something is computed, and is back after `disable`."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    wrapper = wrap(pipe.transformer)
    expected = run(pipe, inputs)
    wrapper.calls.clear()
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert len(wrapper.calls) == len(DENSE_STEPS)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)


def test_a_wrapper_put_on_top():
    """It stays when `ras` goes, and reaches the plain model; taken off, it leaves that."""
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(plain, inputs)
    ras.enable(pipe, plan=SHARES)
    ours = pipe.transformer.forward
    wrapper = wrap(pipe.transformer)
    with ras.enabled(plain, plan=SHARES):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))
    assert len(wrapper.calls) == 8
    ras.disable(pipe)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)
    pipe.transformer.forward = ours
    assert torch.equal(run(pipe, inputs), expected)
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 4
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_copy_of_an_enabled_transformer(ran, wrapped):
    """It runs by itself, also where the one it was copied from has been disabled."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    call = dict(
        hidden_states=inputs["latents"],
        encoder_hidden_states=inputs["prompt_embeds"],
        pooled_projections=inputs["pooled_prompt_embeds"],
        timestep=torch.full((2,), 500.0),
        return_dict=False,
    )
    expected = pipe.transformer(**call)[0]
    if wrapped:
        wrap(pipe.transformer)
    ras.enable(pipe, plan=SHARES)
    if ran:
        run(pipe, inputs)
    twin = copy.deepcopy(pipe.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)
        assert relative_error(twin(**call)[0], expected) < 1e-5
        before = run(pipe, inputs)
        ras.disable(pipe)
        assert relative_error(twin(**call)[0], expected) < 1e-5
    with torch.no_grad():
        twin.proj_out.weight.zero_()  # the copy has weights of its own
    assert torch.equal(pipe.transformer(**call)[0], expected)
    with ras.enabled(pipe, plan=SHARES):
        assert torch.equal(run(pipe, inputs), before)
