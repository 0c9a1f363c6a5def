"""Region-adaptive sampling of diffusion transformers: `ras.enable(pipe)`."""

from pathlib import Path

from ras_kernels import __version__

from .api import compile_repeated_blocks, disable, enable, enabled, is_enabled, plan, stats
from .config import RASConfig
from .plan import Plan, RunPlan
from .policy.calibration import calibrate
from .session import RASWarning
from .stats import Stats

__all__ = [
    "Plan",
    "RASConfig",
    "RASWarning",
    "RunPlan",
    "Stats",
    "__version__",
    "bundled_model",
    "calibrate",
    "compile_repeated_blocks",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "plan",
    "stats",
]


def bundled_model() -> Path:
    """The folder of the small Stable Diffusion 3 pipeline that comes with the package."""
    return Path(__file__).parent / "bundled"
