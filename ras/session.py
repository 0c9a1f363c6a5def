"""One enabled pipeline: which calls of its models compute what, and what regions come next."""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .branch import Branch, Call, form_of
from .branches import Branches
from .callers import calling_pipeline
from .clock import Clock, is_set, read_clock
from .config import EDITED, RASConfig
from .fingerprint import of_model, of_run
from .follow import begin, can_follow, follow, may_follow, preserve
from .layout import Layout
from .log import logger
from .loops import LoopWatch
from .masks import MaskWatch, masked_regions
from .mount import Mount
from .others import cache_on
from .plan import DENSE, SKIP, Reuse, RunPlan
from .policy.carry import Carry
from .policy.planner import FEW, plan_run, without_partial_steps
from .policy.selection import Selection
from .references import references_under
from .run import Run
from .scope import (
    Settings,
    asks_for_partial_steps,
    goes_by_pictures,
    in_block,
    may_be_masked,
)
from .slots import StepWatch
from .stats import Stats, Tally
from .tokens import compute_dtype, for_batch

MOST_CALLS = 4, 16
"""Calls in a step, of one form and in all: no pipeline's guidance makes more, so that further ones
tell that steps are not seen."""


class RASWarning(UserWarning):
    """RAS does other than it was asked for; the message says what it does instead."""


class Session:
    """What `enable` begins and `disable` ends, and the run under way.

    Args:
        mounts: Of the denoisers, which other pipelines may share.
        settings: Of runs outside of blocks that have their own (`ras.settings`).
        scheduler: Whose `step` gets the guided noise, unless there is a pipeline, which has one.
        pipe: The pipeline, or None.
    """

    def __init__(
        self,
        mounts: Sequence[Mount],
        settings: Settings,
        *,
        scheduler: Any,
        pipe: Any,
    ) -> None:
        self._settings = settings
        self.mounts = mounts
        self.run: Run | None = None
        self._mask_watch: MaskWatch | None = None
        self._loop_watch: LoopWatch | None = None
        self._scheduler = weakref.ref(scheduler if pipe is None else pipe.scheduler)
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._watch: StepWatch | None = None
        self._branches = Branches(settings.config)
        self._runs = 0
        self._warnings: dict[str, str] = {}
        self._form: Any = None  # of the last call
        self._unseen_attention = False
        self.learnt: str | None = None  # by `ras.learn`

    # --- on and off ---------------------------------------------------------------------------

    def attach(self) -> None:
        for mount in self.mounts:
            mount.add(self)
        if hasattr(self.pipeline, "prepare_mask_latents"):
            self._mask_watch = MaskWatch(self.pipeline)
        if hasattr(self.pipeline, "progress_bar"):
            self._loop_watch = LoopWatch(self.pipeline, self.end_of_call)
        self._follow_scheduler()

    def detach(self) -> None:
        """Take off whatever is still ours."""
        for mount in self.mounts:
            mount.remove(self)
        self._branches.clear()
        self.run = None
        for watch in (self._watch, self._mask_watch, self._loop_watch):
            if watch is not None:
                watch.remove()

    def replan(self, config: RASConfig) -> None:
        """Plan runs by other settings from now on, and tell of none that has been."""
        self._settings = self._settings._replace(config=config)
        self._forget()
        self.run = None

    @property
    def settings(self) -> Settings:
        """Those of a run that this thread begins."""
        return in_block(self) or self._settings

    @property
    def config(self) -> RASConfig:
        """Of the settings."""
        return self.settings.config

    @property
    def may_be_masked(self) -> bool:
        """Whether a mask is given, or a pipeline's own is watched for."""
        return may_be_masked(self.settings, self.pipeline)

    @property
    def goes_by_pictures(self) -> bool:
        """Whether plans are made by what a call is given: a mask, or a picture to edit."""
        return goes_by_pictures(self.settings, self.pipeline)

    def _follow_scheduler(self) -> Any:
        """Watch the scheduler in use, and return it."""
        scheduler = self.scheduler
        if scheduler is not None and (
            self._watch is None or self._watch.scheduler is not scheduler
        ):
            if self._watch is not None:
                self._watch.remove()
            self._scheduler = weakref.ref(scheduler)
            self._watch = StepWatch(scheduler, self._after_step)
        return scheduler

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind."""
        if kind not in self._warnings:
            self._warnings[kind] = message
            warnings.warn(message, RASWarning, stacklevel=2)

    # --- whose calls these are ----------------------------------------------------------------

    @property
    def pipeline(self) -> Any | None:
        """The enabled pipeline, as long as there is one."""
        return None if self._pipe is None else self._pipe()

    @property
    def scheduler(self) -> Any | None:
        """The one in use, as long as there is one."""
        pipe = self.pipeline
        return self._scheduler() if pipe is None else pipe.scheduler

    @property
    def is_bare(self) -> bool:
        """Whether no pipeline was enabled, or it is gone."""
        return self.pipeline is None

    def expects_calls(self) -> bool:
        """Whether a call in this thread that no pipeline makes may be of a run of this session."""
        scheduler = self._follow_scheduler()
        if scheduler is None or not is_set(scheduler):
            return False
        run = self.run
        if run is None or run.timesteps is not scheduler.timesteps or run.over or self.is_here():
            return True
        self._warn(
            "thread",
            "a thread calls the transformer while a run of another thread is under way: these "
            "calls are dense, as a loop by hand is known by its thread",
        )
        return False

    @property
    def has_ended(self) -> bool:
        """Whether the scheduler's last run has been made."""
        run, timesteps = self.run, getattr(self.scheduler, "timesteps", None)
        return run is not None and run.over and run.timesteps is timesteps

    def is_here(self) -> bool:
        """Whether the last run, if there was one, is of this thread."""
        run = self.run
        return run is None or run.thread == threading.get_ident()

    def tell_of_others(self, pipe: Any) -> None:
        """Warn that a pipeline shares the transformer and is not enabled."""
        self._warn(
            f"others {type(pipe).__name__}",
            f"a {type(pipe).__name__} calls the transformer of an enabled pipeline and is not "
            "enabled itself, so that its runs are dense; call ras.enable on it, too",
        )

    def tell_of_doubt(self) -> None:
        """Warn that calls may be of more than one run."""
        self._warn(
            "doubt",
            "a loop by hand calls the transformer while the timesteps of several enabled "
            "schedulers are set, so that it is dense; set those of its own alone",
        )

    # --- a call of a transformer --------------------------------------------------------------

    def begin_call(self, mount: Mount, inputs: dict[str, Any]) -> Call | None:
        """Decide how the tokens of a call go; None lets the transformer be."""
        if torch.is_grad_enabled():
            self._forget()
            self._warn(
                "gradients",
                "gradients are enabled, so that all is computed densely; call the transformer "
                "under torch.no_grad()",
            )
            return None
        scheduler = self._follow_scheduler()
        if scheduler is None or not is_set(scheduler):
            return None  # a call outside of any run
        self._form = form = mount.key, form_of(inputs), mount.family.lengths(inputs)
        layout = self._layout(mount, form, inputs, scheduler)
        latents = mount.family.latents_of(inputs)
        batch = 1 if latents is None or not layout.grid else len(latents)
        run = self._current_run(scheduler, layout, batch, inputs.get("timestep"))
        run.layouts[form] = layout
        leads = not run.calls
        if leads and not run.stage:
            self._begin_edit(run, mount, layout, latents)
        call = self._call(run, mount, form, layout, inputs)
        walk = None if call is None else call.walk
        skip = call is not None and call.skip
        rows = None if walk is None or skip else walk.active
        stays = skip or (rows is not None and walk is not None and walk.reuse_text)
        under = 0 if rows is None else layout.under(rows.shape[1])
        run.tally.count(batch, layout, skip=skip, rows=rows, under=under, text_stays=stays)
        if leads or not run.observed:
            run.family = mount.family
            run.leader = None if call is None else call.branch
            step = run.step if run.observed else None
            run.tally.lead(step, skip=skip, active=None if rows is None else run.active)
            if logger.isEnabledFor(logging.DEBUG):
                _tell(run, layout, skip=skip, rows=rows, text_stays=stays)
        return call

    def _begin_edit(self, run: Run, mount: Mount, layout: Layout, latents: Any) -> None:
        """Have a run know the picture that it edits, if it is asked to."""
        watch, config = self._mask_watch, run.planned.config
        beside = None if watch is None else watch.picture
        if watch is not None:
            watch.picture = None  # which nobody needs any more
        if not (run.follows_edit or config.preserve):
            return
        run.edit = begin(run, mount.family, layout, latents, config.mask_margin, beside)
        run.follows_edit = run.follows_edit and run.edit is not None
        if run.edit is None and config.preserve:
            self._warn(
                "preserve",
                "there is no picture of the image's shape among the model's inputs that could be "
                "preserved",
            )

    def _layout(self, mount: Mount, form: Any, inputs: Mapping[str, Any], scheduler: Any) -> Layout:
        """The layout of a call's tokens, found once in a run; without a grid, one of whole steps.

        Some families' are told by tensors alone, which have to be read.
        """
        run, family = self.run, mount.family
        same = run is not None and run.timesteps is scheduler.timesteps and not run.over
        if run is not None and same and form in run.layouts:
            return run.layouts[form]
        if not family.regions:
            return Layout()
        spread = mount.obstacle_of_ranks(by_picture=self.goes_by_pictures)
        obstacle = spread or family.obstacle(mount.transformer, inputs)
        layout = Layout() if obstacle else family.layout(mount.transformer, inputs)
        if not layout.grid and (spread or asks_for_partial_steps(self.settings)):
            told = obstacle or "its tokens are not a grid"
            self._warn("layout", f"there are no partial steps in this run: {told}")
        return layout

    def _current_run(
        self, scheduler: Any, layout: Layout, batch: int, timestep: Tensor | None
    ) -> Run:
        """The run that a call belongs to: a new one if the scheduler has new timesteps."""
        last = self.run
        if (
            last is not None
            and last.timesteps is scheduler.timesteps
            and (last.planned.layout.grid == layout.grid or not layout.grid)
            and not last.over
        ):
            return last
        self._forget()
        config, given = self.settings
        self._branches.use(config)
        clock, masked = read_clock(scheduler, timestep), self.masked(layout)
        if masked is not None and batch % len(masked):
            raise ValueError(
                f"mask is of {len(masked)} samples and the run of {batch}, guidance's copies "
                "included; give one mask, or one for each sample"
            )
        planned = self._plan(config, clock, layout, masked)
        masked = None if masked is None else masked.to(scheduler.timesteps.device)
        self.run = run = Run(scheduler.timesteps, clock, planned, masked, Tally(layout, batch))
        looks = given is None and masked is None
        run.follows_edit = looks and may_follow(planned, clock)
        if looks and config.sample_ratio == EDITED and not can_follow(planned, clock):
            self._warn(
                "edit",
                "there is no picture of the image's shape among the model's inputs, or nothing to "
                "tell what is edited by, so that steps are whole",
            )
        run.regions = planned.partial or run.follows_edit
        if planned.reuse is Reuse.MEASURED:
            run.carry = Carry(1.0 if clock.steps >= FEW else 0.0)
        self._runs += 1
        signs = "".join({DENSE: "#", SKIP: "."}.get(share, "+") for share in planned.plan.shares)
        logger.info("run %d: %s, speed-up %.2f", self._runs, signs, planned.speedup)
        self._look_around(run)
        return run

    def _look_around(self, run: Run) -> None:
        """Have a run be as dense as what others have put on the transformers since asks for."""
        caches = list(filter(None, (cache_on(mount.transformer) for mount in self.mounts)))
        if caches and not run.planned.dense:
            run.observed = False
            self._warn(
                "cache",
                f"{caches[0]} decides by itself what is computed, so that the run is dense; take "
                "it off, or ras.disable",
            )
        if run.regions:
            changes = filter(None, (mount.change_of_rows() for mount in self.mounts))
            run.obstacle = next(changes, None)

    def _plan(
        self, config: RASConfig, clock: Clock, layout: Layout, masked: Tensor | None
    ) -> RunPlan:
        count = None if masked is None else masked.shape[1]
        return plan_run(config, clock, layout, count, self._here(config, layout))

    def _here(self, config: RASConfig, layout: Layout) -> tuple[tuple[str, Any], ...]:
        """What plans may have been made for."""
        if not (config.plan and config.plan.made_for):
            return ()
        guidance = getattr(calling_pipeline(), "guidance_scale", None)
        return tuple({**of_model({}, self.scheduler), **of_run(layout.grid, guidance)}.items())

    def masked(self, layout: Layout) -> Tensor | None:
        """The regions under the mask, `(S, k)`, or None without one."""
        config, mask = self.settings
        if mask is None and self._mask_watch is not None:
            mask = self._mask_watch.mask
        if mask is None or mask is False or not layout.grid:
            return None
        return masked_regions(mask, layout.grid, config.mask_margin)

    def _call(
        self, run: Run, mount: Mount, form: Any, layout: Layout, inputs: dict[str, Any]
    ) -> Call | None:
        """The call under way, its branch and what walks; None where all is dense."""
        regions = run.regions and bool(layout.grid) and self._regions(run, mount)
        rotary = mount.family.rotary(inputs) if regions else None
        latents = mount.family.latents_of(inputs)
        dtype = compute_dtype(latents)
        ordinal = run.calls[form]
        run.calls[form] += 1
        if (run.planned.dense and not run.follows_edit) or not run.observed:
            return None
        calls = run.calls.total()
        if ordinal >= MOST_CALLS[0] or calls > MOST_CALLS[1]:
            self._forget()
            run.observed = False
            self._warn(
                "unseen",
                f"the transformer was called {calls} times with no step of the enabled scheduler "
                "between, so that the run is dense: hand the noise to that scheduler",
            )
            return None
        kind = dtype, rotary, regions, layout, run.planned.reuse
        branch = self._branches[(*form, ordinal, *kind)]
        begins, branch.step = branch.step != run.step, run.step
        known = branch.begun
        # All stages of a step are of one kind.
        branch.skips = known and not run.count and (begins or branch.skips)
        extrapolation, reuse = run.planned.extrapolation[run.step], run.planned.reuse
        made = partial(Call, branch, run.sigma, extrapolation, reuse)
        if run.carry is not None and run.carry.share is not None:
            branch.carry_by(run.carry.share)
        if not regions:
            return made()
        family = mount.family
        whole = family.whole is not None and bool(inputs.get(family.whole))
        assert latents is not None and dtype is not None
        if known:
            room = not begins or self._branches.fit()
        else:
            room = self._branches.make_room(
                branch, mount, latents, dtype, layout, reuse=reuse, caches=not whole
            )
        if not room:
            self._go_on_by_whole_steps(run)
            return None
        run.active = mount.agreed(run.active)
        goes_on = known and (begins or branch.rows is not None)
        branch.rows = for_batch(run.active, len(latents)) if goes_on else None
        if branch.skips:
            gain = branch.tokens.gain(run.sigma, extrapolation)
        else:
            gain = branch.tokens.expect(branch.rows, run.sigma, extrapolation)
        reference_gain = self._references(run, branch, layout, known) if layout.references else None
        walk = mount.walk(
            branch,
            layout,
            gain,
            reference_gain=reference_gain,
            shared=run.active is None or len(run.active) == 1,
            whole=whole,
            reuse_text=run.planned.config.reuse_text,
        )
        return made(walk, partial(family.unpack, transformer=mount.transformer, grid=layout.grid))

    def _references(self, run: Run, branch: Branch, layout: Layout, known: bool) -> Tensor | None:
        """Decide which references walk in a call, and how keys and values of the others go on."""
        times, latents = branch.reference_times, branch.tokens.noise
        if not known:
            times.allocate((len(latents), layout.references), latents.device)
        if branch.skips:
            return None
        rows = branch.rows
        branch.references = None if rows is None else references_under(rows, layout)
        if rows is None or branch.references is not None:
            times.note(branch.references, run.sigma, first=not known)
        gain = times.line(run.sigma)
        return gain if run.planned.extrapolation[run.step] else torch.zeros_like(gain)

    def _regions(self, run: Run, mount: Mount) -> bool:
        """Whether a call may have partial steps; each hook and processor is in its place then."""
        if not mount.family.regions or self._unseen_attention:
            return False
        obstacle = mount.obstacle()
        if obstacle is not None:
            self._warn(
                "processor",
                f"partial steps are dense while a layer's attention processor is {obstacle}, "
                "which RAS cannot stand in for",
            )
            return False
        if run.obstacle is not None:
            self._warn(
                "rows",
                f"partial steps are dense with {run.obstacle}, as it may want the rows of all "
                "tokens",
            )
            return False
        if mount.put_in_place():
            self._forget()  # a new one knows of no earlier step
        return True

    def _go_on_by_whole_steps(self, run: Run) -> None:
        """Plan a run anew that cannot keep its keys and values."""
        self._forget()
        self._branches.clear()
        config = run.planned.config
        here = self._here(config, run.planned.layout)
        run.planned = without_partial_steps(run.planned, run.clock, here)
        run.regions, run.edit = False, None
        self._warn(
            "memory",
            f"keys and values take more than max_cache_bytes={config.max_cache_bytes}, so "
            "that steps are whole",
        )

    def attention_missed(self, *, again: bool) -> None:
        """Let partial steps be, where a layer's attention went another way.

        Args:
            again: Whether the call is going to be made again, in its own place.
        """
        run = self.run
        if again and run is not None:
            run.calls[self._form] -= 1
        self._unseen_attention = True
        self._forget()
        self._warn(
            "attention",
            "partial steps are dense, since the attention of some layers is not where RAS looks "
            "for it",
        )

    # --- a step of the scheduler --------------------------------------------------------------

    def _after_step(self, noise: Tensor, sample: Any, output: Any) -> None:
        """Choose the regions of the next step on the guided noise of this one."""
        run, scheduler = self.run, self._follow_scheduler()
        if run is None or run.over or run.timesteps is not scheduler.timesteps:
            return
        step, sigma, first = run.step, run.sigma, run.stage % run.clock.order == 0
        config = run.planned.config
        if not run.advance(scheduler):
            return
        if run.stage == 1:
            if run.first_index not in (None, run.clock.begin):
                self._begin_late(run, scheduler)
                sigma = run.clock.stages[0]
            if run.planned.warning is not None:
                self._warn("plan", run.planned.warning)
        run.tally.samples = len(noise)
        packed = self._tokens_of(run, noise)
        leader, tokens = run.leader, None if packed is None else packed[0]
        if run.carry is not None and first and leader is not None and not run.planned.dense:
            dense = not leader.skips and leader.rows is None
            run.carry.observe(noise, sigma, dense=dense)
        if packed is not None and first and leader is not None and not leader.skips:
            if run.selection is None:
                run.selection = Selection(config, packed[1], run.masked)
            run.selection.observe(packed[0], None if leader.rows is None else run.active, sigma)
        if run.edit is not None and first:
            dense = leader is None or (not leader.skips and leader.rows is None)
            here = self._here(config, run.planned.layout)
            follow(run, run.edit, config, here, noise, sample if dense else None, sigma)
        if run.step == step and not run.over:
            return  # a second-order step is not done before its second stage
        run.active = None
        self._note_bytes()
        self._branches.after_step(step)
        if run.over:
            self._forget()
            edit = run.edit
            run.selection = run.carry = run.edit = None
            if edit is not None:
                run.tally.edited = edit.regions
                if config.preserve:
                    preserve(run, edit, output[0])
        elif (
            tokens is not None
            and run.selection is not None
            and run.observed
            and 0 < run.count < run.planned.layout.tokens
        ):
            run.active = run.selection.choose(tokens, run.count, run.sigma)

    def _tokens_of(self, run: Run, noise: Tensor) -> tuple[Tensor, int] | None:
        """The guided noise as a row for each token, `(S, N, C)`, and the pixels of a token.

        None where no regions are chosen by it.
        """
        if not run.regions or run.family is None:
            return None
        packed = run.family.pack(noise, run.planned.layout.grid)
        if packed is None:
            self._warn(
                "noise",
                f"the scheduler's noise, {tuple(noise.shape)}, is not that of all "
                f"{run.planned.layout.tokens} tokens, so that partial steps are dense",
            )
        return packed

    def _begin_late(self, run: Run, scheduler: Any) -> None:
        """Plan anew a run that has left out the first timesteps, as its first step tells.

        Nobody has told the scheduler before, and what the first call gave is noted at another
        noise level.
        """
        self._forget()
        run.clock = read_clock(scheduler, begin=run.first_index)
        run.planned = self._plan(run.planned.config, run.clock, run.planned.layout, run.masked)
        run.regions = run.regions or run.planned.partial

    def call_failed(self) -> None:
        """Reuse nothing, as there is no telling how far a call came; it does not count as made."""
        self._forget()
        run = self.run  # another thread may take RAS off
        if run is not None:
            run.calls.clear()

    # --- what is kept -------------------------------------------------------------------------

    def _forget(self) -> None:
        """Reuse nothing of what was, so that the next step is dense."""
        self._note_bytes()
        run = self.run
        if run is not None:
            run.leader = None
        self._branches.forget()

    def _note_bytes(self) -> None:
        run = self.run
        if run is None:
            return
        held = self._branches.held
        held += [] if run.selection is None else run.selection.tensors
        held += [] if run.carry is None else run.carry.tensors
        held += [] if run.edit is None else run.edit.tensors
        run.tally.cache_bytes = max(run.tally.cache_bytes, sum(tensor.nbytes for tensor in held))

    def end_of_call(self) -> None:
        """Let go of what a run has kept; called when a pipeline returns, or breaks off."""
        self._forget()
        run = self.run
        if run is not None:
            run.selection = run.carry = run.edit = None
        if self._mask_watch is not None:  # the next run may be another pipeline's
            self._mask_watch.mask = self._mask_watch.picture = None

    def stats(self) -> Stats:
        told = tuple(self._warnings.values())
        if self.run is None:
            return Stats(self.config, learnt=self.learnt, warnings=told)
        self._note_bytes()
        planned = self.run.planned
        found = self.run.tally.stats(planned.config, self._runs, planned.plan, told)
        return dataclasses.replace(found, learnt=self.learnt)


def _tell(run: Run, layout: Layout, *, skip: bool, rows: Tensor | None, text_stays: bool) -> None:
    """Log what a step does, by what the host knows."""
    if skip or rows is None:
        told = ["nothing" if skip else "all tokens"]
    else:
        count = rows.shape[1]
        told = [f"{count} of {layout.tokens} tokens"]
        told += [f"{layout.under(count)} of {layout.references} references"] * bool(layout.pictures)
        told += ["no text"] * text_stays
    step = f"step {run.step} of {run.clock.steps} at {run.sigma:.3f}"
    logger.debug("%s: %s", step, ", ".join(told))
