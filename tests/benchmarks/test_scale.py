"""What `benchmarks.scale` tells is on the page; its counts are held in `test_parallel.py`."""

from pathlib import Path

import pytest

from benchmarks import scale

PAGE = Path(__file__).parents[2] / "docs/scale.md"


def test_the_page(capsys):
    scale.main(["--markdown"])
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 3 * 3 * 4 and table in PAGE.read_text()
    scale.main([])
    assert capsys.readouterr().out.count("\n") == 1 + 3 * 3 * 4


def test_the_models():
    """Their parameters are those that their names tell, and 1 rank waits for none."""
    flux, *videos = scale.MODELS
    assert flux.weights == pytest.approx(11.9e9, rel=0.01)
    assert all(video.weights == pytest.approx(14e9, rel=0.02) for video in videos)
    for model in scale.MODELS:
        assert scale.times(model, 0.5, 1, scale.Machine())[1] == 0
        assert scale.received(model, 0, 8) == scale.collectives(model, 0, 8) == 0
        assert scale.cache_bytes(model, 1) == 8 * scale.cache_bytes(model, 8)
