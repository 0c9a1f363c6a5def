"""Region-adaptive sampling of diffusion transformers: `ras.enable(pipe)`."""

from pathlib import Path

from ras_kernels import __version__

from .api import compile_repeated_blocks, disable, enable, enabled, is_enabled, plan, stats
from .calibration import calibrate
from .config import RASConfig
from .controller import RASWarning
from .plan import Plan
from .report import Stats

__all__ = [
    "Plan",
    "RASConfig",
    "RASWarning",
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
