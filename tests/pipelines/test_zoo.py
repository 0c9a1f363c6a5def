"""Each pipeline of the zoo gives the same finite latents each time, in as many calls as it says."""

from collections import Counter
from functools import wraps

import pytest
import torch
from support.zoo import ENTRIES, REFUSED
from torch.utils._pytree import tree_leaves

STEPS = 8
REASONS = {"UNet", "discrete", "no scheduler"}


def watch(monkeypatch, pipe, names):
    """Return what counts the calls of the named transformers and of the scheduler's step.

    The scheduler's class is wrapped, as pipelines that copy a scheduler copy its attributes too.
    """
    counts = Counter()
    for name in names:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    step = type(pipe.scheduler).step

    @wraps(step)
    def counted(scheduler, *args, **options):
        counts["steps"] += scheduler is pipe.scheduler
        return step(scheduler, *args, **options)

    monkeypatch.setattr(type(pipe.scheduler), "step", counted)
    return counts


@pytest.mark.parametrize("name", ENTRIES)
def test_pipeline(name, monkeypatch):
    entry = ENTRIES[name]
    pipe, call = entry.build()
    counts = watch(monkeypatch, pipe, entry.transformers)
    first = tree_leaves(call(STEPS))
    assert counts.pop("steps") == entry.steps(STEPS)
    assert counts.keys() == set(entry.transformers)
    assert counts.total() == entry.forwards(STEPS)
    assert first and all(latents.isfinite().all() for latents in first)
    second = tree_leaves(call(STEPS))
    assert len(first) == len(second) and all(map(torch.equal, first, second))


def test_other_runs():
    _, call = ENTRIES["flux-true-cfg"].build()
    latents = call(STEPS)
    assert not torch.equal(latents, call(STEPS + 1))
    assert not torch.equal(latents, call(STEPS, true_cfg_scale=2.0))
    assert torch.equal(latents, call(STEPS))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    entry = REFUSED[name]
    pipe, call = entry.build()
    assert entry.note in REASONS
    assert all(isinstance(getattr(pipe, name), torch.nn.Module) for name in entry.transformers)
    assert call is None or tree_leaves(call(2))
