"""Steps that compute a part, in whole runs, also with skipped ones among them.

The oracle is that of `naive.py` with what is kept carried on, token by token.
"""

import itertools

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from support import naive, pipelines
from support.pipelines import Recorder, normal, sd3_inputs
from support.runs import check, drift_scores, gain, levels, lumina_oracle, run

import ras
from ras.api import session_of
from ras.clock import position

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]

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
    pipe = pipelines.sd3(scheduler=FlowMatchHeunDiscreteScheduler())
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
    (branch,) = session_of(pipe)._branches.values()
    caches = branch.caches
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
            session = session_of(pipe)
            assert session.run.selection is None and not session._branches
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
