"""One enabled pipeline: which calls of its models compute what, and what regions come next."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .beginning import begin_late, begin_run, by_whole_steps, layout_of, masked, may_be_partial
from .branch import Call, form_of
from .branches import Branches
from .clock import is_set
from .config import RASConfig
from .follow import begin_edit, preserve
from .layout import Layout
from .log import tell_of_run, tell_of_step
from .mount import Mount
from .observing import observe
from .origin import Origin
from .references import gain_of_references
from .run import Run
from .scope import Settings, goes_by_pictures, in_block
from .stats import Stats
from .tokens import compute_dtype, for_batch
from .warned import Warned

MOST_CALLS = 4, 16
"""Calls in a step, of one form and in all: no pipeline's guidance makes more, so that further ones
tell that steps are not seen."""


class Session:
    """What `enable` begins and `disable` ends, and the run under way.

    Args:
        mounts: Of the denoisers, which other pipelines may share.
        settings: Of runs outside of blocks that have their own (`ras.settings`).
        scheduler: Whose `step` gets the guided noise, unless there is a pipeline, which has one.
        pipe: The pipeline, or None.

    Attributes:
        origin: What runs come from.
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
        self.origin = Origin(pipe, scheduler)
        self._branches = Branches(settings.config)
        self._runs = 0
        self._warn = Warned()
        self._form: Any = None  # of the last call
        self._unseen_attention = False
        self.learnt: str | None = None  # by `ras.learn`

    # --- on and off ---------------------------------------------------------------------------

    def attach(self) -> None:
        for mount in self.mounts:
            mount.add(self)
        self.origin.watch(self._after_step, self.end_of_call)

    def detach(self) -> None:
        """Take off whatever is still ours."""
        for mount in self.mounts:
            mount.remove(self)
        self._branches.clear()
        self.run = None
        self.origin.remove()

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

    # --- whose calls these are ----------------------------------------------------------------

    def expects_calls(self) -> bool:
        """Whether a call in this thread that no pipeline makes may be of a run of this session."""
        scheduler = self.origin.follow()
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
        run, timesteps = self.run, getattr(self.origin.scheduler, "timesteps", None)
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
        scheduler = self.origin.follow()
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
            begin_edit(run, mount.family, layout, latents, self.origin.masks, self._warn)
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
            tell_of_step(run, layout, skip=skip, rows=rows, text_stays=stays)
        return call

    def _layout(self, mount: Mount, form: Any, inputs: Mapping[str, Any], scheduler: Any) -> Layout:
        """The layout of a call's tokens, found once in a run: some are told by values."""
        run = self.run
        same = run is not None and run.timesteps is scheduler.timesteps and not run.over
        if run is not None and same and form in run.layouts:
            return run.layouts[form]
        by_picture = goes_by_pictures(self.settings, self.origin.pipeline)
        return layout_of(mount, inputs, self.settings, by_picture=by_picture, warn=self._warn)

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
        settings = self.settings
        self._branches.use(settings.config)
        regions = self.masked(layout)
        self.run = run = begin_run(
            settings, self.mounts, scheduler, layout, batch, timestep, regions, self._warn
        )
        self._runs += 1
        tell_of_run(self._runs, run)
        return run

    def masked(self, layout: Layout) -> Tensor | None:
        """The regions under the mask, `(S, k)`, or None without one."""
        masks = self.origin.masks
        return masked(self.settings, None if masks is None else masks.mask, layout)

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
            self._forget()
            self._branches.clear()
            by_whole_steps(run, self.origin.scheduler, self._warn)
            return None
        run.active = mount.agreed(run.active)
        goes_on = known and (begins or branch.rows is not None)
        branch.rows = for_batch(run.active, len(latents)) if goes_on else None
        if branch.skips:
            gain = branch.tokens.gain(run.sigma, extrapolation)
        else:
            gain = branch.tokens.expect(branch.rows, run.sigma, extrapolation)
        reference_gain = (
            gain_of_references(run, branch, layout, known) if layout.references else None
        )
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

    def _regions(self, run: Run, mount: Mount) -> bool:
        """Whether a call may have partial steps; each hook and processor is in its place then."""
        if self._unseen_attention or not may_be_partial(run, mount, self._warn):
            return False
        if mount.put_in_place():
            self._forget()  # a new one knows of no earlier step
        return True

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
        run, scheduler = self.run, self.origin.follow()
        if run is None or run.over or run.timesteps is not scheduler.timesteps:
            return
        step, sigma, first = run.step, run.sigma, run.stage % run.clock.order == 0
        if not run.advance(scheduler):
            return
        if run.stage == 1:
            if run.first_index not in (None, run.clock.begin):
                self._forget()  # what the first call gave is noted at another noise level
                begin_late(run, scheduler)
                sigma = run.clock.stages[0]
            if run.planned.warning is not None:
                self._warn("plan", run.planned.warning)
        run.tally.samples = len(noise)
        tokens = observe(run, noise, sample, sigma, scheduler, self._warn, first=first)
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
                if run.planned.config.preserve:
                    preserve(run, edit, output[0])
        elif (
            tokens is not None
            and run.selection is not None
            and run.observed
            and 0 < run.count < run.planned.layout.tokens
        ):
            run.active = run.selection.choose(tokens, run.count, run.sigma)

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
        held = self._branches.held + run.tensors
        run.tally.cache_bytes = max(run.tally.cache_bytes, sum(tensor.nbytes for tensor in held))

    def end_of_call(self) -> None:
        """Let go of what a run has kept; called when a pipeline returns, or breaks off."""
        self._forget()
        run = self.run
        if run is not None:
            run.selection = run.carry = run.edit = None
        if self.origin.masks is not None:  # the next run may be another pipeline's
            self.origin.masks.mask = self.origin.masks.picture = None

    def stats(self) -> Stats:
        told = tuple(self._warn.messages.values())
        if self.run is None:
            return Stats(self.config, learnt=self.learnt, warnings=told)
        self._note_bytes()
        planned = self.run.planned
        found = self.run.tally.stats(planned.config, self._runs, planned.plan, told)
        return dataclasses.replace(found, learnt=self.learnt)
