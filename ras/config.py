"""What a user can ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from ras_kernels import CODES, METRICS

from .checks import check_count, check_kind, check_number, check_whole, shown
from .plan import Plan, as_plan

DEFAULT_SPEEDUP = 2.0
PAPER_START, PAPER_RESETS = 4, (12, 20)  # for Stable Diffusion 3 in 28 steps
SELECTIONS = ("drift", *METRICS)
EDITED = "edited"  # the sample_ratio of what an edit changes


@dataclass(frozen=True)
class RASConfig:
    """The settings of region-adaptive sampling, by the names of arXiv 2502.10389 where it has any.

    What each step computes comes from `plan`; else, if `speedup` is None and `sample_ratio` is
    given, from the paper's schedule; else from a plan made for `speedup`; if that is None too, for
    2, or for one step left out of 6 to 11, none of fewer. Steps are solver steps, counted from 0 at
    the first one that a run executes.

    In the paper's schedule a step computes `sample_ratio` of the tokens unless it comes before
    `scheduler_start_step` (None: 4) or after `scheduler_end_step`, or is in `error_reset_steps`
    (None: 12 and 20). Where a plan is made for a speed-up, those steps are dense too, as far as
    they are given, and `sample_ratio` is what its partial steps compute.

    Attributes:
        speedup: Tokens of a dense run per token computed, text included, at least 1.
        plan: What each step computes: a `ras.Plan`, the file of one, or its shares. A run of
            another number of steps is planned anew for the same speed-up.
        sample_ratio: Share of the image tokens that a partial step computes, in (0, 1].
            `int((1 - sample_ratio) * N)` of N tokens are dropped in the paper's schedule.
            `"edited"` is that of the regions that an edit changes, as far as the run has shown
            them, in that schedule or in a plan for a speed-up; without a picture to edit all steps
            are whole, with a warning.
        error_reset_steps: Steps in which all tokens are computed, which ends the drift of what
            was reused. Whole numbers are steps; those beyond the end of a run are ignored.
            Fractions in (0, 1) are shares of the run: step `int(fraction * steps)`.
        scheduler_start_step: The first step that may be other than dense.
        scheduler_end_step: The last step that may be other than dense; None is the run's last.
        skip_num_step: How many more tokens the paper's schedule drops each time that
            `skip_num_step_length` steps have gone by, around the mean that `sample_ratio` gives.
        skip_num_step_length: See `skip_num_step`; at least 1 if that is not 0.
        metric: Which tokens a partial step computes: `"drift"`, those whose reused noise is
            predicted to be most in error (see `ras.policy.selection`); `"std"` or `"l2norm"`, by
            the paper's scores (see `ras_kernels.region_scores`) and the two settings below.
        high_ratio: Share of the dropped tokens that have the highest scores, in [0, 1]; the
            rest have the lowest. Not for `"drift"`.
        starvation_scale: How strongly the steps that a region has waited speak for it, at least
            0, see `ras_kernels.select_regions`. Not for `"drift"`.
        extrapolation: What reused noise becomes: the last predicted noise, plus this share of
            its last change after an equally long time (see `ras.output`), in [0, 1]. 0 holds it;
            None takes as much as the run has shown so far to go on.
        kv_correction: Whether the keys and values of inactive tokens are carried on in the same
            way, which takes a second cache.
        reuse_text: Whether partial steps leave the text tokens out, so that their last keys and
            values serve again, where they walk with the image (Stable Diffusion 3).
        keep_caches: Whether caches stay between runs of one size and plan, at the same addresses,
            as CUDA graphs need (`mode="reduce-overhead"`, `torch.cuda.graph`); otherwise they are
            freed after a run's last step, before images are decoded.
        cache_dtype: What keys, values and their changes are kept in: None for the model's dtype,
            `torch.int8` or `torch.float8_e4m3fn` for half of that or less, as codes with a float32
            scale for each token and head (see `ras_kernels.quantize_tokens_`). Steps of all tokens
            stay as they are; partial ones attend to what the codes stand for.
        max_cache_bytes: The most that a run's keys and values, and the masks that go with them, may
            take up on the device. How they change (`kv_correction`) is kept where there is room
            for it; where there is none for keys and values themselves, steps are whole. None sets
            no limit.
        mask_margin: By how many tokens the regions that `mask` marks, or that an edit changes, are
            widened, at least 0.
        preserve: Whether the final latents of an edit are the picture's beside the mask, or
            beside the regions that the edit changes (see `ras.put_back` for the pixels).

    Raises:
        ValueError, TypeError: A value that is out of its range or of a wrong type.
    """

    speedup: float | None = None
    plan: Plan | None = None
    sample_ratio: float | str | None = None
    error_reset_steps: tuple[int | float, ...] | None = None
    scheduler_start_step: int | None = None
    scheduler_end_step: int | None = None
    skip_num_step: int = 0
    skip_num_step_length: int = 0
    metric: str = "drift"
    high_ratio: float = 0.3
    starvation_scale: float = 1.0
    extrapolation: float | None = None
    kv_correction: bool = True
    reuse_text: bool = False
    keep_caches: bool = False
    cache_dtype: torch.dtype | None = None
    max_cache_bytes: int | None = None
    mask_margin: int = 1
    preserve: bool = False

    def __post_init__(self) -> None:
        if self.speedup is not None:
            check_number("speedup", self.speedup)
            if not 1 <= self.speedup < math.inf:
                raise ValueError(
                    f"speedup must be at least 1, got {shown(self.speedup)}; 1 is dense"
                )
        if self.plan is not None:
            if self.speedup is not None or self.sample_ratio is not None:
                raise ValueError(
                    "plan says what each step computes; leave out speedup and sample_ratio"
                )
            object.__setattr__(self, "plan", as_plan(self.plan))
        edited = isinstance(self.sample_ratio, str) and self.sample_ratio == EDITED
        if self.sample_ratio is not None and not edited:
            check_number("sample_ratio", self.sample_ratio)
            if isinstance(self.sample_ratio, str) or not 0 < self.sample_ratio <= 1:
                raise ValueError(
                    f"sample_ratio must be in (0, 1], got {shown(self.sample_ratio)}; 1 computes "
                    "all tokens"
                )
        if self.error_reset_steps is not None:
            if isinstance(self.error_reset_steps, str | bytes) or not isinstance(
                self.error_reset_steps, Iterable
            ):
                raise TypeError(
                    "error_reset_steps must be a sequence of steps, got "
                    f"{shown(self.error_reset_steps)}; () means none"
                )
            resets = tuple(self.error_reset_steps)
            for reset in resets:
                _reset(reset)
            object.__setattr__(self, "error_reset_steps", resets)
        if not isinstance(self.metric, str) or self.metric not in SELECTIONS:
            raise ValueError(
                f"metric must be one of {', '.join(SELECTIONS)}, got {shown(self.metric)}"
            )
        for name in ("high_ratio", "extrapolation"):
            value = getattr(self, name)
            if value is None and name == "extrapolation":
                continue
            check_number(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {shown(value)}")
        check_number("starvation_scale", self.starvation_scale)
        if not 0 <= self.starvation_scale < math.inf:
            raise ValueError(
                "starvation_scale must be at least 0 and finite, got "
                f"{shown(self.starvation_scale)}"
            )
        for name in ("scheduler_start_step", "scheduler_end_step"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0)
        for name in ("kv_correction", "reuse_text", "keep_caches", "preserve"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        kinds = f"{', '.join(map(str, CODES))}, or None for the model's own dtype"
        if self.cache_dtype is not None:
            check_kind("cache_dtype", self.cache_dtype, torch.dtype, kinds)
            if self.cache_dtype not in CODES:
                raise ValueError(f"cache_dtype must be {kinds}; got {self.cache_dtype}")
        if self.max_cache_bytes is not None:
            check_count("max_cache_bytes", self.max_cache_bytes, 0, 2**63 - 1)
        check_count("mask_margin", self.mask_margin, 0)
        check_whole("skip_num_step", self.skip_num_step)
        check_count("skip_num_step_length", self.skip_num_step_length, 0)
        if self.skip_num_step and not self.skip_num_step_length:
            raise ValueError(
                f"skip_num_step={self.skip_num_step} needs skip_num_step_length, the number of "
                "steps after which that many more tokens are dropped"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> RASConfig:
        """The method of arXiv 2502.10389 with its settings for SD3, whatever the defaults become.

        Cached noise, keys and values are held as they are, and the same number of tokens is
        dropped in every sparse step unless `skip_num_step` says otherwise.
        """
        settings: dict[str, Any] = dict(
            sample_ratio=0.5,
            error_reset_steps=PAPER_RESETS,
            scheduler_start_step=PAPER_START,
            metric="std",
            high_ratio=0.3,
            starvation_scale=1.0,
            extrapolation=0.0,
            kv_correction=False,
            reuse_text=False,
        )
        return cls(**(settings | overrides))

    @classmethod
    def regione(cls, **overrides: Any) -> RASConfig:
        """What can be said here of RegionE (arXiv 2510.25590), for edits in 28 steps.

        Six steps are dense, which tell what is edited; what is not goes on in a straight line, and
        the regions that are take all steps over cached keys and values, the text's among them, but
        for a dense one in the middle and two at the end. Left out are its cache of velocities in
        edited regions, and references behind these, which walk here.
        """
        settings: dict[str, Any] = dict(
            sample_ratio=EDITED,
            scheduler_start_step=6,
            scheduler_end_step=25,
            error_reset_steps=(16,),
            extrapolation=0.0,
            kv_correction=False,
            reuse_text=True,
        )
        return cls(**(settings | overrides))

    @classmethod
    def spotedit(cls, **overrides: Any) -> RASConfig:
        """What can be said here of SpotEdit (arXiv 2512.22323), for edits in 28 steps.

        Four steps are dense, which tell what is edited; what is not ends as the picture, and the
        regions that are take all other steps over cached keys and values, but for a dense one now
        and then. Left out are its perceptual score, for which latents serve here, and the mixing of
        cached keys and values with those of the picture.
        """
        settings: dict[str, Any] = dict(
            sample_ratio=EDITED,
            scheduler_start_step=4,
            error_reset_steps=(10, 16, 22),
            extrapolation=0.0,
            kv_correction=False,
            preserve=True,
        )
        return cls(**(settings | overrides))


def _reset(value: int | float) -> None:
    check_number("error_reset_steps", value)
    if isinstance(value, Integral):
        check_count("error_reset_steps", int(value), 0)
    elif not 0 < value < 1:
        raise ValueError(
            f"error_reset_steps holds {shown(value)}, which is neither a whole step nor a fraction "
            "of the run in (0, 1)"
        )
