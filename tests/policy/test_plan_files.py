"""Plans that are given: their shares, their files, and what they take the place of."""

import json
import math

import pytest
from support import pipelines
from support.runs import levels, planned

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.mark.parametrize(
    "error, options, named",
    [
        (ValueError, dict(shares=()), "must begin with"),
        (ValueError, dict(shares=(0, 1)), "must begin with"),
        (ValueError, dict(shares=(0.5, 1)), "must begin with"),
        (ValueError, dict(shares=(1, 1.5)), "1.5"),
        (ValueError, dict(shares=(1, -0.1)), "-0.1"),
        (ValueError, dict(shares=(1, math.nan)), "nan"),
        (TypeError, dict(shares=(1, True)), "True"),
        (TypeError, dict(shares=(1, "0.5")), "0.5"),
        (TypeError, dict(shares="10"), "10"),
        (TypeError, dict(shares=1), "1"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0.5,)), "2 steps"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, 9)), "9"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, -1)), "-1"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, math.inf)), "inf"),
        (TypeError, dict(shares=(1, 0), extrapolation=(0, None)), "None"),
        (TypeError, dict(shares=(1, 0), note=5), "5"),
    ],
)
def test_wrong_plans_are_refused(error, options, named):
    with pytest.raises(error, match=named):
        ras.Plan(**options)


def test_counts_and_speedup_of_a_plan():
    plan = ras.Plan((1, 0, 0.5, 0.001, 0.999, 1))
    assert plan.counts(64) == (64, 0, 32, 1, 64, 64)
    assert plan.speedup(100) == pytest.approx(600 / (100 + 50 + 1 + 100 + 100))
    plan = ras.Plan((1, 0, 0.5, 1))
    assert plan.speedup(100, 20) == pytest.approx(480 / (250 + 60))
    assert plan.speedup(100, 20, reuse_text=True) == pytest.approx(480 / (250 + 40))


@pytest.mark.parametrize(
    "plan",
    [
        ras.Plan((1, 0, 1)),
        ras.Plan((1, 1 / 3, 0, 1e-9, 0.9999999), (0, 0.1 + 0.2, -0.5, 3, 0), 'two "lines"\n×'),
        planned(ras.RASConfig(2.2), levels(28), 1000, 77)[0],
    ],
)
def test_a_saved_plan_is_the_same(tmp_path, plan):
    path = tmp_path / "plan.json"
    plan.save(path)
    assert ras.Plan.load(path) == plan == ras.Plan.load(str(path))
    found = json.loads(path.read_text())
    assert found["shares"] == list(plan.shares) and found["note"] == plan.note


def test_a_plan_written_by_hand_is_read(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"shares": [1, 0, 0.5], "ras_plan": 1}')
    assert ras.Plan.load(path) == ras.Plan((1, 0, 0.5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shares: 1",
        "[1, 0, 1]",
        "\xff\xfe",
        '{"shares": [1, 0]}',
        '{"ras_plan": 2, "shares": [1, 0]}',
        '{"ras_plan": 1}',
        '{"ras_plan": 1, "shares": []}',
        '{"ras_plan": 1, "shares": {"1": 1}}',
        '{"ras_plan": 1, "shares": [1, "0"]}',
        '{"ras_plan": 1, "shares": [1, null]}',
        '{"ras_plan": 1, "shares": [1, NaN]}',
        '{"ras_plan": 1, "shares": [0, 1]}',
        '{"ras_plan": 1, "shares": [1, 0], "extrapolation": [0]}',
        '{"ras_plan": 1, "shares": [1, 0], "extrapolations": [0, 0]}',
        '{"ras_plan": 1, "shares": [1, 0], "note": 5}',
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        ras.Plan.load(path)
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        ras.RASConfig(plan=path)


def test_a_plan_shows_a_line_per_step():
    shown = str(ras.Plan((1, 0, 0.125), (0, 0.62, 0.5), "mine")).splitlines()
    assert shown[0] == "mine" and len(shown) == 4
    assert "all tokens" in shown[1] and "extrapolation" not in shown[1]
    assert "nothing" in shown[2] and shown[2].endswith("extrapolation 0.62")
    assert "12.5%" in shown[3] and shown[3].split()[1] == "2"


def test_what_may_be_given_for_a_plan(tmp_path):
    plan = ras.Plan((1, 0, 1))
    plan.save(tmp_path / "plan")
    for given in (plan, [1, 0, 1], (1.0, 0.0, 1.0), tmp_path / "plan", str(tmp_path / "plan")):
        assert ras.RASConfig(plan=given).plan == plan
    with pytest.raises(TypeError, match="7"):
        ras.RASConfig(plan=7)
    with pytest.raises(OSError):
        ras.RASConfig(plan=tmp_path / "none")
    for other in (dict(speedup=2), dict(sample_ratio=0.5)):
        with pytest.raises(ValueError, match="leave out"):
            ras.RASConfig(plan=plan, **other)


def test_a_plan_takes_the_place_of_the_settings():
    pipe = pipelines.sd3()
    config = ras.RASConfig(speedup=3)
    ras.enable(pipe, config, plan=[1, 0, 1])
    assert ras.stats(pipe).config.plan == ras.Plan((1, 0, 1))
    ras.enable(pipe, ras.stats(pipe).config, speedup=4)
    assert ras.stats(pipe).config == ras.RASConfig(speedup=4)
