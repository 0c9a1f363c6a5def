"""Without a GPU the kernels run in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ras_kernels import _triton

ROOT = Path(__file__).parents[2]

CODE = """
import sys
import pytest
import ras_kernels
assert ras_kernels.backend("cpu") == "triton"
sys.exit(pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


APART = ["kernels/test_library.py", "kernels/test_ops.py"]
OTHERS = {f"kernels/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
OTHERS -= {*APART, f"kernels/{Path(__file__).name}"}
WHOLE_RUNS = [  # with projections into the cache; with norms too; rotary, with grouped queries
    "families/test_models.py::test_batch[sizes0-1]",
    "families/test_models.py::test_batch[sizes1-1]",
    "families/test_models.py::test_lumina[1-8-12-1.0]",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests run compiled kernels")
@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(_triton.INTERPRETED, reason="the tests run in the interpreter already")
@pytest.mark.parametrize(
    "tests", [sorted(OTHERS), APART[:1], APART[1:], WHOLE_RUNS], ids=["ops", *APART, "runs"]
)
def test_the_kernels_pass_in_the_interpreter(tests):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(f"tests/{test}" for test in tests)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
