"""Many requests of one pipeline, at a tiny size."""

import json

import pytest
import torch

from benchmarks import serving

TINY = ["--requests=10", "--kinds=3", "--threads=2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(SIDES=(64, 96), STEPS=(3, 4), BROKEN_OFF=4).items():
        monkeypatch.setattr(serving, name, value)


def test_serving(capsys):
    serving.main([*TINY, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["equal"], told["unlike"], told["broken_off"]) == (8, 0, 2)
    memory = told["memory"]
    assert [*memory] == [str(number) for number in range(1, 11)]
    tensors = [memory[number]["tensors"] for number in memory]
    assert 0 < tensors[-1] == pytest.approx(tensors[2], rel=0.01)
    assert memory["10"]["process"] > tensors[-1]


def test_what_is_not_equal_is_told(monkeypatch, capsys):
    monkeypatch.setattr(serving, "alone", lambda *_: torch.zeros(1))
    serving.main(TINY)
    said = capsys.readouterr().out
    assert "0 equal to what they are alone, 8 not, 2 broken off" in said
    assert "| requests served | process, MB | tensors, MB |" in said and "\n| 10 | " in said
