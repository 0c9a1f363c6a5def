"""Plans as strips, and what notebooks show of plans and runs."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.zoo import ENTRIES

import ras
from ras.pictures import plan_strip
from ras.pictures.maps import colours
from ras.pictures.panels import GREY, PAPER
from ras.pictures.strip import BAR, bars

SHARES = (1, 0, 0.5, 1)


def heights(strip, steps):
    """How many pixels of each step's bar are of its colour, and the colour."""
    pixels = np.asarray(strip)
    for step in range(steps):
        column = pixels[:, step * pixels.shape[1] // steps]
        inside = (column != PAPER).any(-1) & (column != GREY).any(-1)
        yield int(inside.sum()), tuple(column[inside][0]) if inside.any() else None


def test_a_bar_is_as_high_as_its_share():
    strip = plan_strip(SHARES)
    assert strip.size == (4 * BAR, 48)
    (dense, light), skipped, (partial, middle), again = heights(strip, 4)
    assert skipped == (0, None) and again == (dense, light)
    assert partial == pytest.approx(dense / 2, abs=1)
    assert light == tuple(colours(1.0)) and middle == tuple(colours(0.5))


@pytest.mark.parametrize("steps", [1, 7, 500, 3000])
def test_each_step_has_a_bar(steps):
    """Of one pixel at least; nothing leaves the strip."""
    strip = plan_strip([1] * steps)
    assert steps <= strip.width <= max(1024, steps)
    assert all(high > 40 for high, _ in heights(strip, steps))


def test_the_step_under_way_is_marked():
    marked = np.asarray(bars(SHARES, 80, 32, at=1)) != np.asarray(bars(SHARES, 80, 32))
    columns = np.flatnonzero(marked.any((0, 2)))
    assert 20 <= columns.min() < columns.max() < 40


def test_strips_of_whatever_tells_a_plan(tmp_path):
    pipe, _ = ENTRIES["sd3"].build()
    plan = ras.Plan(SHARES)
    plan.save(tmp_path / "plan.json")
    planned = ras.plan(ras.enable(pipe, plan=plan), 4)
    strips = [plan_strip(each) for each in (plan, planned, tmp_path / "plan.json")]
    assert len({strip.tobytes() for strip in strips}) == 1


# --- notebooks ------------------------------------------------------------------------------------


def shown(html):
    """The pictures in it."""
    found = re.findall(r'src="data:image/png;base64,(.+?)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]


def test_notebooks_show_a_plan():
    plan = ras.Plan(SHARES, note="a < b")
    html = plan._repr_html_()
    (strip,) = shown(html)
    assert strip.tobytes() == plan_strip(plan).tobytes()
    assert "a &lt; b" in html and "4 steps: 2 dense, 1 partial, 1 skipped" in html


def test_notebooks_show_what_is_planned():
    pipe, _ = ENTRIES["sd3"].build()
    html = ras.plan(ras.enable(pipe, plan=SHARES), 4)._repr_html_()
    assert "speed-up" in html and "bytes of keys and values" in html and len(shown(html)) == 1


@pytest.mark.parametrize("name", ["sd3", "wan", "sana"])
def test_notebooks_show_a_run(name, no_gradients):
    """Small, without a script, for images and videos, and where no tokens are known."""
    pipe, draw = ENTRIES[name].build()
    ras.enable(pipe, plan=SHARES if name != "sana" else (1, 0, 1, 0))
    assert shown(ras.stats(pipe)._repr_html_()) == []  # before a run
    draw(4)
    stats = ras.stats(pipe)
    html = stats._repr_html_()
    assert len(html) < 10_000 and "<script" not in html
    for row in str(stats).splitlines():
        assert all(part in html for part in re.split(r"\s{2,}", row))
    strip, *maps = shown(html)
    assert strip.tobytes() == plan_strip(stats.plan).tobytes()
    if name == "sana":
        assert maps == []
    else:
        counts = stats.region_counts.reshape(-1, *stats.region_counts.shape[-2:])
        middle = counts[len(counts) // 2]
        assert maps[0].tobytes() == ras.pictures.heat_map(middle, maps[0].size).tobytes()
        assert not torch.equal(middle, middle.flip(0))
