"""Region-adaptive sampling of diffusion transformers: `ras.enable(pipe)`."""

from pathlib import Path

from ras_kernels import __version__

from . import pictures
from .api import (
    compile_repeated_blocks,
    disable,
    enable,
    enabled,
    is_enabled,
    plan,
    settings,
    stats,
)
from .check import check
from .config import RASConfig
from .edits import put_back
from .family import Family
from .layout import Layout, Rows
from .log import follow_environment
from .many import generate
from .plan import Plan, RunPlan
from .policy.calibration import calibrate
from .policy.learning import learn
from .stats import Stats
from .warned import RASWarning

follow_environment()

BUNDLED = {"generate": "bundled", "edit": "bundled_edit"}

__all__ = [
    "Family",
    "Layout",
    "Plan",
    "RASConfig",
    "RASWarning",
    "Rows",
    "RunPlan",
    "Stats",
    "__version__",
    "bundled_model",
    "calibrate",
    "check",
    "compile_repeated_blocks",
    "disable",
    "enable",
    "enabled",
    "generate",
    "is_enabled",
    "learn",
    "pictures",
    "plan",
    "put_back",
    "settings",
    "stats",
]


def bundled_model(task: str = "generate") -> Path:
    """The folder of a small pipeline that comes with the package.

    Args:
        task: `"generate"` for a `StableDiffusion3Pipeline`, `"edit"` for a `FluxKontextPipeline`.

    Raises:
        ValueError: Another task.
    """
    if task not in BUNDLED:
        raise ValueError(f"task must be one of {', '.join(BUNDLED)}, got {task!r}")
    return Path(__file__).parent / BUNDLED[task]
