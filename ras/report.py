"""What a run did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .config import RASConfig
from .plan import Plan


@dataclass(frozen=True)
class Stats:
    """The last run of an enabled model, or the one under way. `print` shows it as a table.

    Attributes:
        config: The settings.
        runs: Runs begun since `enable`.
        plan: What each of its steps computes; None before the first run.
        steps_dense, steps_sparse, steps_skipped: Solver steps that computed all image tokens,
            some, or nothing.
        tokens_computed, tokens_total: Image tokens that walked through the transformer, of those
            that would have without RAS; all samples, guidance copies and calls.
        text_tokens, text_tokens_total: The same of the text tokens that walk with the image.
        cache_bytes: Bytes that the run's caches held at their largest: keys, values, noise and
            what regions are chosen by. They are freed when a run ends, unless `keep_caches`.
        region_counts: `(samples, H / p, W / p)`, int64: how often each region was computed; None
            before the first run.
        warnings: What was warned of since `enable`.
    """

    config: RASConfig
    runs: int = 0
    plan: Plan | None = None
    steps_dense: int = 0
    steps_sparse: int = 0
    steps_skipped: int = 0
    tokens_computed: int = 0
    tokens_total: int = 0
    text_tokens: int = 0
    text_tokens_total: int = 0
    cache_bytes: int = 0
    region_counts: Tensor | None = None
    warnings: tuple[str, ...] = ()

    @property
    def steps_planned(self) -> int:
        """Solver steps of the run in all, those to come included."""
        return 0 if self.plan is None else len(self.plan.shares)

    @property
    def speedup_ceiling(self) -> float:
        """The speed-up if time went with the tokens computed, text included."""
        computed = self.tokens_computed + self.text_tokens
        return (self.tokens_total + self.text_tokens_total) / computed if computed else 1.0

    def __str__(self) -> str:
        share = self.tokens_computed / self.tokens_total if self.tokens_total else 1.0
        rows = {
            "runs": f"{self.runs}",
            "steps": f"{self.steps_dense} dense, {self.steps_sparse} sparse, "
            f"{self.steps_skipped} skipped, of {self.steps_planned}",
            "image tokens computed": f"{self.tokens_computed:,} of {self.tokens_total:,} "
            f"({share:.1%})",
            "text tokens computed": f"{self.text_tokens:,} of {self.text_tokens_total:,}",
            "speed-up ceiling": f"{self.speedup_ceiling:.3f}x",
            "caches": f"{self.cache_bytes:,} bytes",
            "warnings": "; ".join(self.warnings) or "none",
        }
        return aligned(rows)


def aligned(rows: dict[str, Any]) -> str:
    """A line for each, the values below each other."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in rows.items())
