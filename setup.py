"""`pip install .` installs the packages `ras` and `ras_kernels` and the command `ras`.

The distribution is `ras-diffusion`: on PyPI, `ras` is another project.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "ras_kernels" / "__init__.py").read_text(), re.MULTILINE
)
assert VERSION is not None
DEMO = ["gradio>=6"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

setup(
    name="ras-diffusion",
    version=VERSION[1],
    description="Region-adaptive sampling of diffusion transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["ras", "ras.*", "ras_kernels", "ras_kernels.*"]),
    package_data={
        "ras": ["py.typed", *(f"bundled{end}" for end in ("/*", "/*/*", "_edit/*", "_edit/*/*"))],
        "ras_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.6",
        'triton>=3.2; platform_system == "Linux"',
        "diffusers>=0.35",
        "einops>=0.8",
        "transformers>=4.48",
        "numpy>=1.26",
        "pillow>=10.1",
    ],
    extras_require={
        "bench": ["cache-dit>=1.3", "matplotlib>=3.9"],
        "demo": DEMO,
        "docs": DOCS,
        "dev": [
            *DEMO,
            *DOCS,
            "accelerate>=1.0",
            "hypothesis>=6",
            "matplotlib>=3.9",
            "mypy",
            "peft>=0.17",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff",
            "torchao>=0.15",
        ],
    },
    entry_points={"console_scripts": ["ras = ras.cli:main"]},
)
