"""What is published: a source archive, and the wheel that is built from it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import ras

ROOT = Path(__file__).parents[1]
PUBLISHED = ["ras", "ras_kernels"]
BUILT_FROM = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]


def built(kind, source, out):
    """The file that setuptools makes of a folder; it writes into that."""
    out.mkdir(exist_ok=True)
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.iterdir()
    return found


def files_of(package):
    """Those of the checkout that belong into the wheel."""
    found = (path for path in (ROOT / package).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.suffix != ".pyc" and path != ROOT / "ras_kernels/README.md"
    }


def test_the_wheel_of_the_source_archive(tmp_path):
    """It has the packages, both models and nothing else, and works from a path with spaces."""
    folder = tmp_path / "a path with spaces"
    checkout, tests = folder / "checkout", folder / "checkout/tests"
    tests.mkdir(parents=True)
    for name in PUBLISHED:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*(ROOT / name for name in BUILT_FROM), ROOT / "constraints.txt"):
        shutil.copy(path, checkout)
    shutil.copy(__file__, tests)

    with tarfile.open(built("sdist", checkout, folder / "archive")) as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"ras_diffusion-{ras.__version__}"
    assert (source / "constraints.txt").is_file() and not (source / "tests").exists()

    wheel = built("wheel", source, folder / "wheel")
    assert wheel.name == f"ras_diffusion-{ras.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 24e6
    installed = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(installed)
    expected = set.union(*map(files_of, PUBLISHED))
    assert {"ras/py.typed", "ras_kernels/py.typed"} < expected and names == expected

    told = subprocess.run(
        [sys.executable, "-m", "ras", "info"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ras.__version__ in told
    for model in map(ras.bundled_model, ("generate", "edit")):
        assert f"{installed / 'ras' / model.name} (" in told
