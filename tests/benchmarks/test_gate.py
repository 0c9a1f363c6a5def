"""The default draws no worse than what is recorded of it, and by the same plan."""

import json

import pytest

from benchmarks.quality import gate

RECORD = json.loads(gate.RECORD.read_text())


@pytest.mark.parametrize("name", gate.MODELS)
def test_the_default_at_2x(name):
    """After a change that is meant to change it: `python -m benchmarks.quality.gate --write`."""
    found, recorded = gate.measure(name), RECORD[name]
    assert found["plan"] == recorded["plan"]
    assert found["psnr"] > recorded["psnr"] - 0.5
