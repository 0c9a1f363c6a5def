"""The gallery is made by its command, and its page shows all of it."""

import re

import numpy as np
from PIL import Image
from support.pages import ROOT

from benchmarks import gallery

STEPS = 3


def test_one_command_makes_it(monkeypatch, tmp_path):
    """In fewer steps, the pictures that the page shows, as large as they are there."""
    monkeypatch.setattr(gallery, "STEPS", STEPS)
    monkeypatch.setattr("sys.argv", ["gallery", "--out", str(tmp_path)])
    gallery.main()
    kept = {path.name: Image.open(path) for path in gallery.PICTURES.iterdir()}
    made = {path.name: Image.open(path) for path in tmp_path.iterdir()}
    page = (ROOT / "docs/gallery.md").read_text()
    assert made.keys() == kept.keys() == {*re.findall(r"\]\(pictures/gallery/(.+?)\)", page)}
    for name, picture in made.items():
        if "plan" in name:  # one bar for each step
            assert picture.width * 28 == kept[name].width * STEPS
        else:
            (width, height), (kept_width, kept_height) = picture.size, kept[name].size
            assert height == kept_height
            assert abs(width - kept_width) < 16  # by the digits beside a map
        if "steps" in name:
            assert (picture.n_frames, kept[name].n_frames) == (STEPS, 28)
        assert np.asarray(picture.convert("L")).std() > 10


def test_it_is_small():
    assert sum(path.stat().st_size for path in gallery.PICTURES.iterdir()) < 400_000
