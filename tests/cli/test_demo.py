"""`ras demo`: the page, asked by gradio's client."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import HALF, PROMPT, by_hand, error_line, pixels

import ras
from ras import cli
from ras.cli import runs
from ras.cli.loading import load

STEPS = 12


@pytest.fixture
def url(folder, monkeypatch):
    """Where `ras demo` serves a small pipeline, until the test is done."""
    gradio = pytest.importorskip("gradio")
    served, launch = [], gradio.Blocks.launch

    def start(page, **options):
        served.append(page)
        launch(page, prevent_thread_lock=True, quiet=True, **options)

    monkeypatch.setattr(gradio.Blocks, "launch", start)
    assert cli.main(["demo", "--model", str(folder)]) == 0
    (page,) = served
    yield page.local_url
    page.close()


def test_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(cli.demo, "load", lambda *_: pytest.fail("loaded a model"))
    assert cli.main(["demo"]) == 2
    assert "pip install 'ras-diffusion[demo]'" in error_line(capsys)


def test_the_page_times_runs_after_a_warm_up(folder, monkeypatch):
    """Of the same kinds as those that it times."""
    drawing, made = {}, []

    class Part(ModuleType):
        """Whatever of gradio, which does nothing but keep what a click is to call."""

        def __init__(self, *_, **__):
            super().__init__("gradio")

        def __getattr__(self, name):
            return Part

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def click(self, draw, *_, **__):
            drawing["draw"] = draw

    def run(job, label, steps):
        made.append((label, steps, ras.is_enabled(job.pipe)))
        return runs.Run(Image.new("RGB", (64, 64)), 1.0)

    monkeypatch.setitem(sys.modules, "gradio", Part())
    monkeypatch.setattr(runs.Job, "run", run)
    pipe = load(SimpleNamespace(model=folder, device=torch.device("cpu"), dtype=None), folder)
    cli.demo.page(pipe, torch.device("cpu"), {})
    told = drawing["draw"](PROMPT, 2, STEPS, 3, None)[3]
    assert [enabled for _, _, enabled in made] == [True, False, True, False]
    assert [label for label, *_ in made] == ["warm-up", "warm-up", "RAS", "dense"]
    assert [steps for _, steps, _ in made[2:]] == [STEPS] * 2 and "after a warm-up" in told


def test_answers_with_what_a_run_makes(url, folder):
    client = pytest.importorskip("gradio_client").Client(url, verbose=False)
    shown = client.predict(PROMPT, 2, STEPS, 3, None, api_name="/draw")
    size = dict(width=None, height=None, steps=STEPS, seed=3)
    (dense, _), (sparse, stats) = by_hand(folder, **size), by_hand(folder, HALF, **size)
    found = [pixels(Image.open(path)) for path in shown[:3]]
    assert np.array_equal(found[0], pixels(dense)) and np.array_equal(found[1], pixels(sparse))
    assert np.array_equal(found[2], found[1])  # all regions were computed as often
    assert f"{stats.steps_dense} steps dense, 0 partial, {stats.steps_skipped} skipped" in shown[3]
    with pytest.raises(Exception, match="the prompt must not be empty"):
        client.predict(" ", 2, STEPS, 3, None, api_name="/draw")
