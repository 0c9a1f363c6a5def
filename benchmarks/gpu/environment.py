"""What a machine has that speed and correctness depend on.

    python -m benchmarks.gpu.environment
    python -m benchmarks.gpu.environment --json

What a machine does not tell is None.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from ras.cli.info import version
from ras.stats import aligned

from ..commands import as_command
from ..speed.timing import device_name

PACKAGES = ("triton", "diffusers", "transformers", "numpy")
ASKED = {  # what nvidia-smi calls them
    "driver": "driver_version",
    "clock, MHz": "clocks.sm",
    "highest clock, MHz": "clocks.max.sm",
    "memory clock, MHz": "clocks.mem",
    "power limit, W": "power.limit",
    "temperature, C": "temperature.gpu",
}


def main() -> None:
    """Print it, with `--json` as such."""
    found = environment()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(found, indent=1))
    else:
        print(aligned(found))


def environment() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": device_name("cuda" if gpu else "cpu"),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
        "CUDA or ROCm": torch.version.cuda or torch.version.hip,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "free disk, GB": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    if not gpu:
        return found
    properties = torch.cuda.get_device_properties(0)
    found["compute capability"] = f"{properties.major}.{properties.minor}"
    found["multiprocessors"] = properties.multi_processor_count
    free, total = torch.cuda.mem_get_info()
    found["memory, GB"], found["free memory, GB"] = round(total / 1e9, 1), round(free / 1e9, 1)
    return found | told_by_driver()


def told_by_driver() -> dict[str, str | None]:
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, "--id=0"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # missing, or it cannot reach the driver
        return dict.fromkeys(ASKED)
    return dict(zip(ASKED, done.stdout.strip().split(", ")))


if __name__ == "__main__":
    as_command(main)
