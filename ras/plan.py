"""What each step of a run computes, known before the run begins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any

from .checks import shown
from .clock import EXTRAPOLATION
from .files import read_json, write_text
from .fingerprint import differences, plain
from .layout import Layout

if TYPE_CHECKING:
    from .config import RASConfig

FORMAT = 1  # of the file
DENSE, SKIP = 1.0, 0.0


class Reuse(Enum):
    """What becomes of reused noise in a run, see `ras.output`."""

    HELD = "as it last was"
    CARRIED = "goes on as it is told to"
    MEASURED = "goes on as much as the run has shown so far"


@dataclass(frozen=True)
class Plan:
    """For each solver step the share of the image tokens that it computes.

    Attributes:
        shares: One number in [0, 1] per step: 1 computes all tokens (a dense step), 0 nothing at
            all (the step takes the noise that `extrapolation` predicts), anything between as
            many of the most urgent tokens. The first is 1, as there is nothing to reuse before.
        extrapolation: One number per step, how much of the noise's last change is added to what
            is reused in that step, as `RASConfig.extrapolation` counts it. None leaves it to
            that.
        note: Where the plan comes from, for people.
        made_for: What it is a plan for, by names and values as in `ras/fingerprint.py`, given as a
            dictionary; a plan of your own has nothing there, and is one for all.

    Raises:
        ValueError, TypeError: Shares or factors out of range, or not one per step.
    """

    shares: tuple[float, ...]
    extrapolation: tuple[float, ...] | None = None
    note: str = ""
    made_for: Any = ()

    def __post_init__(self) -> None:
        shares = _numbers("shares", self.shares, 0, 1)
        if not shares or shares[0] != DENSE:
            raise ValueError(f"shares must begin with a dense step, 1; got {shown(self.shares)}")
        object.__setattr__(self, "shares", shares)
        if self.extrapolation is not None:
            factors = _numbers("extrapolation", self.extrapolation, -0.5, 8)
            if len(factors) != len(shares):
                raise ValueError(
                    f"extrapolation must have one number for each of the {len(shares)} steps; "
                    f"got {len(factors)}"
                )
            object.__setattr__(self, "extrapolation", factors)
        if not isinstance(self.note, str):
            raise TypeError(f"note must be text, got {shown(self.note)}")
        try:  # pairs are what it has been made to
            made_for = {None: None} if isinstance(self.made_for, str) else dict(self.made_for)
        except (TypeError, ValueError):
            made_for = {None: None}
        if not all(isinstance(name, str) for name in made_for):
            raise TypeError(f"made_for must be names and values, got {shown(self.made_for)}")
        object.__setattr__(self, "made_for", tuple(sorted(plain(made_for))))

    def counts(self, num_tokens: int) -> tuple[int, ...]:
        """The number of image tokens that each step computes, out of `num_tokens`."""
        return tuple(
            int(share) * num_tokens
            if share in (SKIP, DENSE)
            else min(max(round(share * num_tokens), 1), num_tokens)
            for share in self.shares
        )

    def speedup(
        self,
        num_tokens: int,
        text_tokens: int = 0,
        *,
        reference_tokens: int = 0,
        picture_tokens: int = 0,
        reuse_text: bool = False,
    ) -> float:
        """Tokens of a dense run per token of this plan, by all that is in the sequence.

        Text walks along in every step that computes anything; with `reuse_text`, in dense ones
        alone, as references do, but for `picture_tokens` of them, of which a partial step computes
        the share that it does of the image's.
        """
        counts = self.counts(num_tokens)
        under = sum(
            -(-count * picture_tokens // num_tokens) for count in counts if count < num_tokens
        )
        dense = sum(count == num_tokens for count in counts)
        with_text = dense if reuse_text else sum(count > 0 for count in counts)
        computed = sum(counts) + with_text * text_tokens + dense * reference_tokens + under
        return len(counts) * (num_tokens + text_tokens + reference_tokens) / computed

    def unfit(self, steps: int, here: Mapping[str, Any]) -> str | None:
        """Why a run of so many steps is not what the plan was made for, or None.

        Of `here`, see `ras/fingerprint.py`; what either does not know is not compared.
        """
        if len(self.shares) != steps:
            return f"the plan is one of {len(self.shares)} steps and the run has {steps}"
        told = differences(dict(self.made_for), here, shared=True)
        return f"the plan was made for another run ({'; '.join(told)})" if told else None

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as a small JSON file that people can read and edit, or nothing at all."""
        rows = [_text(share) for share in self.shares]
        lines = [f'  "ras_plan": {FORMAT}', f'  "note": {json.dumps(self.note)}']
        lines.append(f'  "shares": [{", ".join(rows)}]')
        if self.extrapolation is not None:
            factors = ", ".join(_text(factor) for factor in self.extrapolation)
            lines.append(f'  "extrapolation": [{factors}]')
        if self.made_for:
            pairs = (
                f"    {json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
                for name, value in self.made_for
            )
            lines.append('  "made_for": {\n' + ",\n".join(pairs) + "\n  }")
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises ValueError if the file is no plan."""
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is no plan: {error}") from None
        if not isinstance(found, dict) or found.get("ras_plan") != FORMAT:
            raise ValueError(f'{path} is no plan: it does not say "ras_plan": {FORMAT}')
        unknown = found.keys() - {"ras_plan", "note", "shares", "extrapolation", "made_for"}
        if unknown or "shares" not in found:
            raise ValueError(
                f"{path} is no plan: it must have shares, and may have extrapolation, note and "
                f"made_for; "
                f"got {', '.join(sorted(found.keys() - {'ras_plan'})) or 'nothing'}"
            )
        del found["ras_plan"]
        try:
            return cls(**found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no plan: {error}") from None

    def __str__(self) -> str:
        """A line per step."""
        lines = [self.note] if self.note else []
        for step, share in enumerate(self.shares):
            what = {SKIP: "nothing", DENSE: "all tokens"}.get(share, f"{share:.1%} of the tokens")
            line = f"step {step:3}  {what}"
            if share < DENSE and self.extrapolation is not None:
                line = f"{line:32}extrapolation {self.extrapolation[step]:g}"
            lines.append(line)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .pictures.html import of_plan  # which is of what this module defines

        return of_plan(self)


@dataclass(frozen=True)
class RunPlan:
    """What a run is going to do, known before it begins. `print` shows it.

    Attributes:
        plan: What each step computes.
        layout: The tokens of a sample.
        config: The settings.
        warning: What the run cannot do of what it was asked for, or None.
        cache_bytes: What keys and values take up, for each sample and each branch of guidance;
            None where there are none, or nobody knows.
    """

    plan: Plan
    layout: Layout
    config: RASConfig
    warning: str | None = None
    cache_bytes: int | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of the noise's tokens that each step computes."""
        return self.plan.counts(self.layout.tokens)

    @cached_property
    def dense(self) -> bool:
        """Whether all steps compute all tokens."""
        return min(self.counts) == self.layout.tokens

    @cached_property
    def partial(self) -> bool:
        """Whether a step computes some tokens, for which keys and values have to be kept."""
        return any(0 < count < self.layout.tokens for count in self.counts)

    @property
    def speedup(self) -> float:
        """Tokens of a dense run per token computed, by all that is in the sequence."""
        return speedup_of(self.plan, self.layout, self.config)

    @cached_property
    def extrapolation(self) -> tuple[float, ...]:
        """How what is reused in each step is carried on, by itself or before it is measured."""
        if self.plan.extrapolation is not None:
            return self.plan.extrapolation
        asked = self.config.extrapolation
        return (EXTRAPOLATION if asked is None else asked,) * len(self.counts)

    @cached_property
    def reuse(self) -> Reuse:
        """What becomes of what is reused."""
        if self.plan.extrapolation is None and self.config.extrapolation is None:
            return Reuse.MEASURED
        return Reuse.CARRIED if any(self.extrapolation) else Reuse.HELD

    @property
    def _told(self) -> list[str]:
        """What there is to say besides the plan."""
        lines = [f"speed-up {self.speedup:.3f} ({self.layout})"]
        if self.cache_bytes is not None:
            lines.append(f"{self.cache_bytes:,} bytes of keys and values for a sample's branch")
        return lines if self.warning is None else [*lines, self.warning]

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *self._told])

    def _repr_html_(self) -> str:
        from .pictures.html import of_plan  # which is of what this module defines

        return of_plan(self.plan, *self._told)


def speedup_of(plan: Plan, layout: Layout, config: RASConfig) -> float:
    """`Plan.speedup` of a run."""
    return plan.speedup(
        layout.tokens,
        layout.text,
        reference_tokens=layout.references,
        picture_tokens=layout.under(layout.tokens),
        reuse_text=config.reuse_text,
    )


def dense_steps(shares: Sequence[float]) -> list[int]:
    """The steps that compute all tokens."""
    return [step for step, share in enumerate(shares) if share == DENSE]


def as_plan(value: Any) -> Plan:
    """A plan from what a user may give for one: a `Plan`, a file's path, or the shares.

    Raises:
        TypeError: Something else.
        ValueError: A plan that is not valid, see `Plan`.
        OSError: A file that cannot be read.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, str | PathLike):
        return Plan.load(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        try:
            return Plan(tuple(value))
        except (TypeError, ValueError) as error:
            raise type(error)(f"plan's {error}") from None
    raise TypeError(
        f"plan must be a ras.Plan, a plan's file or a list of shares, got {shown(value)}"
    )


def _text(number: float) -> str:
    """A number as short as it can be written exactly."""
    return repr(number).removesuffix(".0")


def _numbers(name: str, values: Any, low: float, high: float) -> tuple[float, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of numbers, one per step; got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be numbers, got {shown(value)}")
        number: Any = value  # compared before it is a float, which has an end
        if not low <= number <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {shown(value)}")
    return tuple(float(value) for value in values)
