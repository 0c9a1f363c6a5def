"""Settings and the plan that they make."""

import dataclasses

import pytest
from support.runs import planned

import ras

PAPER = ras.RASConfig.paper


def plan_steps(config, num_steps, num_tokens):
    sigmas = tuple(1 - step / num_steps for step in range(num_steps + 1))
    return planned(config, sigmas, num_tokens, 0)[0].counts(num_tokens)


def sparse(plan, tokens):
    return [step for step, count in enumerate(plan) if count < tokens]


def test_the_papers_schedule():
    plan = plan_steps(PAPER(), 28, 4096)
    assert sparse(plan, 4096) == [s for s in range(4, 28) if s not in (12, 20)]
    assert set(plan) == {2048, 4096}


@pytest.mark.parametrize("tokens", [7, 256, 333, 1024, 4096])
@pytest.mark.parametrize("ratio", [0.1, 0.125, 0.25, 0.3, 0.5, 0.9])
def test_the_dropped_count_is_the_papers(ratio, tokens):
    plan = plan_steps(PAPER(sample_ratio=ratio), 28, tokens)
    assert tokens - plan[4] == min(int((1 - ratio) * tokens), tokens - 1)


def test_no_ratio_leaves_a_step_without_tokens():
    assert plan_steps(PAPER(sample_ratio=1e-9), 8, 64)[4] == 1
    assert set(plan_steps(PAPER(sample_ratio=1.0), 28, 64)) == {64}


def test_resets_beyond_the_end_are_ignored():
    assert sparse(plan_steps(PAPER(), 10, 64), 64) == [4, 5, 6, 7, 8, 9]
    assert sparse(plan_steps(PAPER(), 4, 64), 64) == []


def test_fractions_are_shares_of_the_run():
    config = PAPER(error_reset_steps=(0.5, 0.75, 5))
    assert sparse(plan_steps(config, 8, 64), 64) == [7]
    assert sparse(plan_steps(config, 12, 64), 64) == [4, 7, 8, 10, 11]


def test_start_and_end():
    config = PAPER(scheduler_start_step=2, scheduler_end_step=5, error_reset_steps=())
    assert sparse(plan_steps(config, 9, 64), 64) == [2, 3, 4, 5]
    # the first step has nothing to reuse
    config = PAPER(scheduler_start_step=0, error_reset_steps=())
    assert sparse(plan_steps(config, 3, 64), 64) == [1, 2]


def test_dropped_count_that_grows():
    """The paper's settings for Lumina: 1280 to 2816 of 4096 dropped in 30 steps."""
    config = PAPER(skip_num_step=256, skip_num_step_length=4, error_reset_steps=())
    plan = plan_steps(config, 30, 4096)
    dropped = [4096 - count for count in plan[4:]]
    assert (dropped[0], dropped[-1]) == (1280, 2816)
    assert dropped == [1280 + 256 * (i // 4) for i in range(26)]
    # where the published code asks for more tokens than there are, one is left
    config = dataclasses.replace(config, sample_ratio=0.125)
    assert plan_steps(config, 30, 4096)[-1] == 1


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ras.RASConfig().sample_ratio = 0.1
    assert hash(ras.RASConfig(error_reset_steps=[3])) == hash(ras.RASConfig(error_reset_steps=(3,)))


def test_paper_takes_overrides():
    assert PAPER(sample_ratio=0.25).sample_ratio == 0.25
    assert PAPER().error_reset_steps == (12, 20)
    with pytest.raises(TypeError, match="ratio_of_samples"):
        PAPER(ratio_of_samples=0.25)


@pytest.mark.parametrize(
    "error, options",
    [
        (TypeError, dict(sample_ratio=True)),
        (TypeError, dict(error_reset_steps="12,20")),
        (TypeError, dict(error_reset_steps=12)),
        (TypeError, dict(error_reset_steps=("12",))),
        (ValueError, dict(error_reset_steps=(1.0,))),
        (TypeError, dict(scheduler_start_step=2.5)),
        (ValueError, dict(scheduler_end_step=-3)),
        (ValueError, dict(starvation_scale=float("inf"))),
        (ValueError, dict(starvation_scale=-1)),
        (ValueError, dict(metric="l1")),
        (ValueError, dict(skip_num_step=256)),
        (TypeError, dict(skip_num_step=0.5, skip_num_step_length=4)),
    ],
)
def test_wrong_settings_are_named(error, options):
    name, value = next(iter(options.items()))
    shown = value if isinstance(value, str) else repr(value).strip("()").rstrip(",")
    with pytest.raises(error, match=name) as raised:
        ras.RASConfig(**options)
    assert shown in str(raised.value)
