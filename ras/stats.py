"""What a run did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import RASConfig
from .layout import Layout
from .plan import Plan
from .tokens import room


@dataclass(frozen=True)
class Stats:
    """The last run of an enabled model, or the one under way. `print` shows it as a table.

    Attributes:
        config: The settings.
        runs: Runs begun since `enable`.
        plan: What each of its steps computes; None before the first run.
        steps: What each solver step so far computed: `"dense"` (all image tokens), `"sparse"`
            (some) or `"skipped"` (nothing).
        walked: `(steps, samples, H / p, W / p)` bool: the regions that each of them computed, with
            a number of frames before the rows of a video; None where they are not known.
        calls_computed, calls_total: Calls of the transformers that computed anything, of all.
        tokens_computed, tokens_total: Image tokens that walked through the transformer, of those
            that would have without RAS; all samples, guidance copies and calls. 0 where the tokens
            of the model are not known.
        text_tokens, text_tokens_total: The same of the text tokens that walk with the image.
        reference_tokens, reference_tokens_total: The same of the tokens that only condition.
        cache_bytes: Bytes that the run's caches held at their largest: keys, values, noise and
            what regions are chosen by. They are freed when a run ends, unless `keep_caches`.
        region_counts: `(samples, H / p, W / p)`, int64: how often each region was computed; None
            before the first run, and where they are not known.
        edited: `(samples, H / p, W / p)` bool: the regions that an edit changes, as the run has
            shown, or those under the mask, with their margin; None where there is no picture to
            edit, or nobody asked.
        learnt: What `ras.learn` has come to; None where there was nothing to learn from.
        warnings: What was warned of since `enable`.
    """

    config: RASConfig
    runs: int = 0
    plan: Plan | None = None
    steps: tuple[str, ...] = ()
    walked: Tensor | None = None
    calls_computed: int = 0
    calls_total: int = 0
    tokens_computed: int = 0
    tokens_total: int = 0
    text_tokens: int = 0
    text_tokens_total: int = 0
    reference_tokens: int = 0
    reference_tokens_total: int = 0
    cache_bytes: int = 0
    region_counts: Tensor | None = None
    edited: Tensor | None = None
    learnt: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def steps_dense(self) -> int:
        """Solver steps that computed all image tokens."""
        return self.steps.count("dense")

    @property
    def steps_sparse(self) -> int:
        """Solver steps that computed some."""
        return self.steps.count("sparse")

    @property
    def steps_skipped(self) -> int:
        """Solver steps that computed nothing."""
        return self.steps.count("skipped")

    @property
    def steps_planned(self) -> int:
        """Solver steps of the run in all, those to come included."""
        return 0 if self.plan is None else len(self.plan.shares)

    @property
    def speedup_ceiling(self) -> float:
        """The speed-up if time went with the tokens in the sequence, or else with the calls."""
        computed = self.tokens_computed + self.text_tokens + self.reference_tokens
        total = self.tokens_total + self.text_tokens_total + self.reference_tokens_total
        if not total:
            computed, total = self.calls_computed, self.calls_total
        return total / computed if computed else 1.0

    @property
    def _rows(self) -> dict[str, str]:
        """What is told of the run, by names."""
        rows = {
            "runs": f"{self.runs}",
            "steps": f"{self.steps_dense} dense, {self.steps_sparse} sparse, "
            f"{self.steps_skipped} skipped, of {self.steps_planned}",
            "calls computed": f"{self.calls_computed:,} of {self.calls_total:,}",
        }
        if self.tokens_total:
            share = self.tokens_computed / self.tokens_total
            tokens = f"{self.tokens_computed:,} of {self.tokens_total:,} ({share:.1%})"
            rows["image tokens computed"] = tokens
            text = f"{self.text_tokens:,} of {self.text_tokens_total:,}"
            rows["text tokens computed"] = text
        if self.reference_tokens_total:
            references = f"{self.reference_tokens:,} of {self.reference_tokens_total:,}"
            rows["reference tokens computed"] = references
        if self.edited is not None:
            counts = self.edited.flatten(1).sum(1).tolist()
            whole = "" if self.steps_sparse else "; whole steps"
            rows["edited regions"] = (
                f"{', '.join(map(str, counts))} of {self.edited[0].numel()}{whole}"
            )
        if self.learnt is not None:
            rows["learnt"] = self.learnt
        return rows | {
            "speed-up ceiling": f"{self.speedup_ceiling:.3f}x",
            "caches": f"{self.cache_bytes:,} bytes",
            "warnings": "; ".join(self.warnings) or "none",
        }

    def __str__(self) -> str:
        return aligned(self._rows)

    def _repr_html_(self) -> str:
        from .pictures.html import of_stats  # which is of what this module defines

        return of_stats(self)


def aligned(rows: dict[str, Any]) -> str:
    """A line for each, the values below each other."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in rows.items())


@dataclass
class Tally:
    """What a run has done so far, call by call.

    Attributes:
        layout: The tokens of a sample.
        samples: S as far as it is known; the batch before the first step.
        steps: Each solver step's kind.
        walked: The regions that each of them computed, `(S, k)`, or None for all or for nothing.
        calls, tokens, text, references: Those computed, and all of them.
        step: The last solver step in which the transformer was called.
        dense_calls: Calls, the first of their stage, that computed all tokens.
        active_counts: `(S, N)`, in how many others of these a region was active.
        edited: `(S, N)` bool, the regions that an edit changes.
        cache_bytes: At their most.
    """

    layout: Layout
    samples: int
    steps: list[str] = field(default_factory=list)
    walked: list[Tensor | None] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    text: Counter[str] = field(default_factory=Counter)
    references: Counter[str] = field(default_factory=Counter)
    step: int = -1
    dense_calls: int = 0
    active_counts: Tensor | None = None
    edited: Tensor | None = None
    cache_bytes: int = 0

    def count(
        self,
        batch: int,
        layout: Layout,
        *,
        skip: bool,
        rows: Tensor | None,
        under: int,
        text_stays: bool,
    ) -> None:
        """Note a call of the transformer.

        Args:
            batch: B.
            layout: The tokens of a sample.
            skip: Whether it computes nothing.
            rows: `(B, k)` tokens that walk, or None for all.
            under: How many references walk with them.
            text_stays: Whether the text tokens do not.
        """
        tokens = layout.tokens
        self.calls["all"] += 1
        self.calls["computed"] += not skip
        if not layout.grid:
            return
        walking = 0 if skip else tokens if rows is None else rows.shape[1]
        self.tokens["all"] += batch * tokens
        self.tokens["computed"] += batch * walking
        self.text["all"] += batch * layout.text
        self.text["computed"] += 0 if text_stays else batch * layout.text
        self.references["all"] += batch * layout.references
        references = 0 if skip else layout.references if rows is None else under
        self.references["computed"] += batch * references

    def lead(self, step: int | None, *, skip: bool, active: Tensor | None) -> None:
        """Note the first call of a stage.

        Args:
            step: The solver step; None where steps are not seen.
            skip: Whether it computes nothing.
            active: `(S, k)` regions that it computes, or None for all.
        """
        if step is None or step != self.step:
            self.step = self.step if step is None else step
            self.steps.append("skipped" if skip else "dense" if active is None else "sparse")
            self.walked.append(None if skip else active)
        if skip:
            return
        if active is None:
            self.dense_calls += 1
            return
        if self.active_counts is None or len(self.active_counts) != len(active):
            shape = len(active), self.layout.tokens
            self.active_counts = room(None, shape, active.dtype, active.device)
        self.active_counts.scatter_add_(1, active.long(), torch.ones_like(active))

    @property
    def region_counts(self) -> Tensor | None:
        """How often each region was computed, `(S, *grid)`; None where there is no grid."""
        if not self.layout.grid:
            return None
        counts = self.active_counts
        if counts is None:
            counts = torch.zeros(self.samples, self.layout.tokens, dtype=torch.int64)
        return (counts + self.dense_calls).unflatten(1, self.layout.grid)

    @property
    def regions_walked(self) -> Tensor | None:
        """Which regions each step computed, `(steps, S, *grid)`; None where there is no grid."""
        if not self.layout.grid:
            return None
        chosen = [active for active in self.walked if active is not None]
        samples = max([self.samples, *map(len, chosen)])
        shape = len(self.steps), samples, self.layout.tokens
        found = torch.zeros(shape, dtype=torch.bool, device=chosen[0].device if chosen else None)
        for regions, kind, active in zip(found, self.steps, self.walked):
            if kind == "dense":
                regions.fill_(True)
            elif active is not None:
                regions.scatter_(1, active.long(), True)
        return found.unflatten(2, self.layout.grid)

    def stats(self, config: RASConfig, runs: int, plan: Plan, warnings: tuple[str, ...]) -> Stats:
        """What to tell of it."""
        return Stats(
            config=config,
            runs=runs,
            plan=plan,
            steps=tuple(self.steps),
            walked=self.regions_walked,
            calls_computed=self.calls["computed"],
            calls_total=self.calls["all"],
            tokens_computed=self.tokens["computed"],
            tokens_total=self.tokens["all"],
            text_tokens=self.text["computed"],
            text_tokens_total=self.text["all"],
            reference_tokens=self.references["computed"],
            reference_tokens_total=self.references["all"],
            cache_bytes=self.cache_bytes,
            region_counts=self.region_counts,
            edited=None if self.edited is None else self.edited.unflatten(1, self.layout.grid),
            warnings=warnings,
        )
