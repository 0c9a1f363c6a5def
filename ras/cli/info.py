"""`ras info`: versions, devices and the bundled model."""

from __future__ import annotations

import argparse
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import ras
import ras_kernels

from ..stats import aligned


def main(options: argparse.Namespace) -> None:
    """Print versions, devices with the kernels that would run on them, and the bundled model."""
    lines = {"ras": ras.__version__, "ras_kernels": ras_kernels.__version__}
    lines["python"] = f"{platform.python_version()} on {platform.platform()}"
    lines["torch"] = torch.__version__  # its metadata may lack the build, such as +cu130
    for name in ("triton", "diffusers", "transformers"):
        lines[name] = version(name) or "not installed"
    lines["cpu"] = _device_line(f"{_processor()}, {torch.get_num_threads()} threads", "cpu")
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        capability = f"sm_{properties.major}{properties.minor}"
        lines[name] = _device_line(f"{properties.name}, {memory}, {capability}", name)
    lines["bundled model"] = _folder_line(ras.bundled_model())
    lines["bundled editor"] = _folder_line(ras.bundled_model("edit"))
    print(aligned(lines))


def version(package: str) -> str | None:
    """That of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_line(description: str, device: str) -> str:
    return f"{description}; kernels: {ras_kernels.backend(torch.device(device))}"


def _processor() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _folder_line(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder} ({size / 1e6:.1f} MB)" if size else f"missing from {folder}"
