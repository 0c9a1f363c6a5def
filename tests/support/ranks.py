"""Processes that are ranks, with gloo on CPUs: `run(N)` makes N and has them try all `CASES`.

One process imports everything and is forked, so that N of them cost little more than one. A case is
a generator: what comes before its `yield` is done once, before the fork, and the rest on each rank,
which is what it yields to.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 600


def run(module, ranks):
    """What went wrong on each of so many ranks in each case of a module, by the case's name."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "support.ranks", module, str(ranks), folder]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        told = sorted(Path(folder).glob("*.json"))
        assert done.returncode == 0 and len(told) == ranks, done.stderr
        return [json.loads(path.read_text()) for path in told]


def main(module, size, folder):
    import importlib

    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    cases = importlib.import_module(module).cases(size)
    for case in cases.values():
        next(case)
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            be_rank(cases, rank, size, Path(folder))
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(max(codes) and 1)


def be_rank(cases, rank, size, folder):
    """Try all cases, note what went wrong, and be no more."""
    import torch
    import torch.distributed as dist

    # Diffusers asks it for the rank's device, and divides by what there is.
    torch.accelerator.device_count = lambda: 1
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=300),
        )
        found = {}
        for name, case in cases.items():
            try:
                case.send(types.SimpleNamespace(rank=rank, size=size))
            except StopIteration:
                found[name] = ""
            except AssertionError:
                found[name] = traceback.format_exc()
            except Exception:
                found[name] = traceback.format_exc()
                break  # others may wait for this one, or it for them
            dist.barrier()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
