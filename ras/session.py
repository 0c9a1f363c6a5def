"""One enabled model: which of its calls compute what, and what regions come next."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .branch import Branch, Call, form_of
from .clock import is_set, read_clock
from .config import RASConfig
from .families import Family
from .layout import Layout
from .masks import MaskWatch, masked_regions
from .mount import SESSION, Mount, StepWatch
from .policy.planner import plan_run
from .policy.selection import Selection
from .run import Run
from .site import Walk
from .stats import Stats, Tally

MOST_CALLS = 4, 16
"""Calls in a step, of one form and in all: no pipeline's guidance makes more, so that further ones
tell that steps are not seen."""


class RASWarning(UserWarning):
    """RAS does other than it was asked for; the message says what it does instead."""


class Session:
    """What `enable` begins and `disable` ends, and the run under way.

    Args:
        transformers: The denoisers, each with its record.
        config: The settings.
        scheduler: Whose `step` gets the guided noise, unless there is a pipeline, which has one.
        pipe: The pipeline, or None.
        mask: `(S, 1, height, width)`, None for an inpainting pipeline's own, or False.
    """

    def __init__(
        self,
        transformers: Iterable[tuple[nn.Module, Family]],
        config: RASConfig,
        *,
        scheduler: Any,
        pipe: Any,
        mask: Tensor | Literal[False] | None,
    ) -> None:
        self.config = config
        self.mounts = [Mount(transformer, family, self) for transformer, family in transformers]
        self.run: Run | None = None
        self.mask = None if mask is False else mask
        self._watches_mask = mask is None and hasattr(pipe, "prepare_mask_latents")
        self._mask_watch: MaskWatch | None = None
        self._scheduler = scheduler
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._watch: StepWatch | None = None
        self._branches: dict[Any, Branch] = {}
        self._runs = 0
        self._warnings: dict[str, str] = {}

    # --- on and off ---------------------------------------------------------------------------

    @staticmethod
    def of(transformer: nn.Module) -> Session | None:
        """The session of an enabled transformer."""
        session = vars(transformer).get(SESSION)
        # A deep copy of an enabled transformer is not enabled.
        found = None if session is None else session.mount_of(transformer)
        return None if found is None else session

    def mount_of(self, transformer: object) -> Mount | None:
        return next((mount for mount in self.mounts if mount.transformer is transformer), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Itself: the hooks of a deep copy of a transformer lead here, and do nothing."""
        return self

    def attach(self) -> None:
        for mount in self.mounts:
            mount.attach()
        if self._watches_mask and self._pipe is not None:
            self._mask_watch = MaskWatch(self._pipe())
        self._follow_scheduler()

    def detach(self) -> None:
        """Take off whatever is still ours."""
        self._branches.clear()
        self.run = None
        for part in self.mounts:
            part.detach()
        if self._watch is not None:
            self._watch.remove()
        if self._mask_watch is not None:
            self._mask_watch.remove()

    def _follow_scheduler(self) -> Any:
        """Watch the scheduler in use, and return it."""
        pipe = None if self._pipe is None else self._pipe()
        if pipe is not None:  # a pipeline made of this one's parts may have taken its place
            self._scheduler = pipe.scheduler
        if self._watch is None or self._watch.scheduler is not self._scheduler:
            if self._watch is not None:
                self._watch.remove()
            self._watch = StepWatch(self._scheduler, self._after_step)
        return self._scheduler

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind."""
        if kind not in self._warnings:
            self._warnings[kind] = message
            warnings.warn(message, RASWarning, stacklevel=2)

    # --- a call of a transformer --------------------------------------------------------------

    def begin_call(self, mount: Mount, inputs: dict[str, Any]) -> Call | None:
        """Decide how the tokens of a call go; None lets the transformer be."""
        layout = mount.family.layout(mount.transformer, inputs)
        if torch.is_grad_enabled():
            self._forget()
            self._warn(
                "gradients",
                "gradients are enabled, so that all is computed densely; call the transformer "
                "under torch.no_grad()",
            )
            return None
        scheduler = self._follow_scheduler()
        if not is_set(scheduler):
            return None  # a call outside of any run
        batch = len(inputs["hidden_states"]) if layout.grid else 1
        run = self._current_run(scheduler, layout, batch, inputs.get("timestep"))
        leads = not run.calls
        call = self._call(run, mount, layout, inputs)
        walk = None if call is None else call.walk
        skip = call is not None and call.skip
        rows = None if walk is None or skip else walk.active
        stays = skip or (rows is not None and self.config.reuse_text)
        run.tally.count(batch, skip=skip, rows=rows, text_stays=stays)
        if leads or not run.observed:
            run.leader = None if call is None else call.branch
            step = run.step if run.observed else None
            run.tally.lead(step, skip=skip, active=None if rows is None else run.active)
        return call

    def _current_run(
        self, scheduler: Any, layout: Layout, batch: int, timestep: Tensor | None
    ) -> Run:
        """The run that a call belongs to: a new one if the scheduler has new timesteps."""
        last = self.run
        if (
            last is not None
            and last.timesteps is scheduler.timesteps
            and last.planned.layout.grid == layout.grid
            and not last.over
        ):
            return last
        self._forget()
        clock, masked = read_clock(scheduler, timestep), self.masked(layout)
        count = None if masked is None else masked.shape[1]
        planned = plan_run(self.config, clock, layout, count)
        masked = None if masked is None else masked.to(scheduler.timesteps.device)
        self.run = Run(scheduler.timesteps, clock, planned, masked, Tally(layout, batch))
        self._runs += 1
        return self.run

    def masked(self, layout: Layout) -> Tensor | None:
        """The regions under the mask, `(S, k)`, or None without one."""
        mask = self.mask if self._mask_watch is None else self._mask_watch.mask
        if mask is None or not layout.grid:
            return None
        return masked_regions(mask, layout.grid, self.config.mask_margin)

    def _call(self, run: Run, mount: Mount, layout: Layout, inputs: dict[str, Any]) -> Call | None:
        """The call under way, its branch and what walks; None where all is dense."""
        regions = run.planned.partial and self._regions(mount)
        rotary = mount.family.rotary(inputs) if regions else None
        form = id(mount), form_of(inputs), _compute_dtype(inputs), rotary, regions
        ordinal = run.calls[form]
        run.calls[form] += 1
        if run.planned.dense or not run.observed:
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
        branch = self._branches.setdefault((*form, ordinal), Branch())
        begins, branch.step = branch.step != run.step, run.step
        known = branch.begun
        # All stages of a step are of one kind.
        branch.skips = known and not run.count and (begins or branch.skips)
        extrapolation, extrapolates = run.planned.extrapolation[run.step], run.planned.extrapolates
        made = partial(Call, branch, run.sigma, extrapolation, extrapolates)
        if not regions:
            return made()
        latents = inputs["hidden_states"]
        whole = mount.family.whole is not None and bool(inputs.get(mount.family.whole))
        if not known:
            self._make_room(branch, mount, layout, inputs, extrapolates, caches=not whole)
        goes_on = known and (begins or branch.rows is not None)
        branch.rows = _for_batch(run.active, len(latents)) if goes_on else None
        if branch.skips:
            gain = branch.tokens.gain(run.sigma, extrapolation)
        else:
            gain = branch.tokens.expect(branch.rows, run.sigma, extrapolation)
        walk = Walk(branch.tokens, branch.rows, gain, whole, self.config.reuse_text)
        unpack = partial(mount.family.unpack, transformer=mount.transformer, grid=layout.grid)
        return made(walk, unpack)

    def _regions(self, mount: Mount) -> bool:
        """Whether a call may have partial steps; each hook and processor is in its place then."""
        if not mount.family.regions:
            return False
        obstacle = mount.obstacle()
        if obstacle is not None:
            self._warn(
                "processor",
                f"partial steps are dense while a layer's attention processor is {obstacle}, "
                "which RAS cannot stand in for",
            )
            return False
        if mount.put_in_place():
            self._forget()  # a new one knows of no earlier step
        return True

    def _make_room(
        self,
        branch: Branch,
        mount: Mount,
        layout: Layout,
        inputs: Mapping[str, Any],
        extrapolates: bool,
        *,
        caches: bool,
    ) -> None:
        """Make room for a branch's noise, and for its keys and values if it is to keep them."""
        latents, dtype = inputs["hidden_states"], _compute_dtype(inputs)
        assert dtype is not None
        channels = mount.transformer.config.patch_size**2 * mount.transformer.out_channels
        branch.tokens.allocate(
            (len(latents), layout.tokens, channels),
            dtype,
            latents.device,
            extrapolates=extrapolates,
        )
        if not caches:
            return
        if branch.caches:
            for cache in branch.caches:
                cache.reset()
            return
        branch.caches = mount.new_caches(
            len(latents),
            layout,
            dtype=dtype,
            device=latents.device,
            carries=self.config.kv_correction and extrapolates,
        )
        if self.config.keep_caches:  # tell compilers: CUDA graphs may write to it
            for tensor in branch.held:
                torch._dynamo.mark_static_address(tensor, guard=False)

    # --- a step of the scheduler --------------------------------------------------------------

    def _after_step(self, noise: Tensor) -> None:
        """Choose the regions of the next step on the guided noise of this one."""
        run, scheduler = self.run, self._follow_scheduler()
        if run is None or run.over or run.timesteps is not scheduler.timesteps:
            return
        step, sigma, first = run.step, run.sigma, run.stage % run.clock.order == 0
        if not run.advance(scheduler):
            return
        if run.stage == 1:
            if run.first_index not in (None, run.clock.begin):
                self._begin_late(run, scheduler)
                sigma = run.clock.stages[0]
            if run.planned.warning is not None:
                self._warn("plan", run.planned.warning)
        run.tally.samples = len(noise)
        tokens, mount = None, self.mounts[0]
        if run.planned.partial:
            tokens = mount.family.pack(noise, mount.transformer)
        if tokens is not None and first and run.leader is not None and not run.leader.skips:
            if run.selection is None:
                run.selection = Selection(self.config, mount.family.pixels(mount.transformer))
            rows = None if run.leader.rows is None else run.active
            run.selection.observe(tokens, rows, sigma)
        if run.step == step and not run.over:
            return  # a second-order step is not done before its second stage
        run.active = None
        self._let_go_of_branches(step)
        if run.over:
            self._forget()
            run.selection = None
        elif (
            tokens is not None
            and run.selection is not None
            and run.observed
            and 0 < run.count < run.planned.layout.tokens
        ):
            run.active = run.selection.choose(tokens, run.count, run.sigma, run.masked)

    def _begin_late(self, run: Run, scheduler: Any) -> None:
        """Plan anew a run that has left out the first timesteps, as its first step tells.

        Nobody has told the scheduler before, and what the first call gave is noted at another
        noise level.
        """
        self._forget()
        run.clock = read_clock(scheduler, begin=run.first_index)
        count = None if run.masked is None else run.masked.shape[1]
        run.planned = plan_run(self.config, run.clock, run.planned.layout, count)

    def _let_go_of_branches(self, step: int) -> None:
        """Free those not called in a step: guidance has ended, or another transformer goes on."""
        self._note_bytes()
        if not self.config.keep_caches or step == 0:
            called = {name: each for name, each in self._branches.items() if each.step == step}
            self._branches = called
        for branch in self._branches.values():
            branch.rows = None
            if branch.step != step:
                branch.forget()

    def call_failed(self) -> None:
        """Reuse nothing, as there is no telling how far a call came; it does not count as made."""
        self._forget()
        if self.run is not None:
            self.run.calls.clear()

    # --- what is kept -------------------------------------------------------------------------

    def _forget(self) -> None:
        """Reuse nothing of what was, so that the next step is dense."""
        self._note_bytes()
        if self.run is not None:
            self.run.leader = None
        if not self.config.keep_caches:
            self._branches.clear()
        for branch in self._branches.values():
            branch.forget()

    def _note_bytes(self) -> None:
        if self.run is None:
            return
        selection = self.run.selection
        held = [] if selection is None else selection.tensors
        for branch in self._branches.values():
            held += branch.held if branch.begun else []
        tally = self.run.tally
        tally.cache_bytes = max(tally.cache_bytes, sum(tensor.nbytes for tensor in held))

    def end_of_call(self) -> None:
        """Let go of what a run has kept; pipelines call it when they return."""
        self._forget()
        if self.run is not None:
            self.run.selection = None
        if self._mask_watch is not None:  # the next run may be another pipeline's
            self._mask_watch.mask = None

    def stats(self) -> Stats:
        told = tuple(self._warnings.values())
        if self.run is None:
            return Stats(self.config, warnings=told)
        self._note_bytes()
        return self.run.tally.stats(self.config, self._runs, self.run.planned.plan, told)


def _compute_dtype(inputs: Mapping[str, Any]) -> torch.dtype | None:
    """What a transformer's layers return for its inputs."""
    latents = inputs.get("hidden_states")
    if not isinstance(latents, Tensor):
        return None
    kind = latents.device.type
    if latents.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return latents.dtype
    return torch.get_autocast_dtype(kind)


def _for_batch(active: Tensor | None, batch: int) -> Tensor | None:
    """The samples' rows for all guidance copies, which pipelines stack copy by copy."""
    if active is None or batch % len(active):
        return None
    return active.repeat(batch // len(active), 1)
