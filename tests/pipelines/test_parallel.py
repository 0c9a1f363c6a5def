"""Context parallelism of diffusers, in two and in four processes on the CPU.

What is tried is in `support/parallel.py`; a process for each rank costs more than what it computes.
"""

import pytest
from support import ranks


@pytest.mark.parametrize("size", [2, 4])
def test_ranks(size):
    for rank, told in enumerate(ranks.run("support.parallel", size)):
        wrong = {name: error for name, error in told.items() if error}
        assert not wrong, f"rank {rank}: " + "\n".join(map(": ".join, wrong.items()))
        assert len(told) > 5
