"""One controller per enabled model: it decides which tokens walk, and chooses the next ones."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

import ras_kernels

from .adapters import Adapter
from .attention import Walk, normal_empty
from .config import RASConfig
from .report import Stats
from .run import Run
from .scheduler import StepWatch
from .slots import HookSlot, ProcessorSlot, forget_fused_originals

_CONTROLLER = "_ras_controller"  # on the transformer, while enabled
_RESET = "_reset_stateful_cache"  # what pipelines call on their components when they return


class RASWarning(UserWarning):
    """RAS does less than it was asked for: what it warns of is computed densely."""


class Controller:
    """Everything that `enable` puts on a model, and the run under way."""

    def __init__(
        self,
        transformer: Any,
        adapter: Adapter,
        config: RASConfig,
        *,
        scheduler: Any,
        pipe: Any,
    ) -> None:
        self._transformer = transformer
        self._adapter = adapter
        self._config = config
        self._scheduler = scheduler
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._parameters = list(inspect.signature(transformer.forward).parameters)
        self._hooks = [
            HookSlot(transformer, adapter.enter, self._enter),
            HookSlot(transformer, adapter.leave, self._leave),
        ]
        self._layers = [
            ProcessorSlot(attn, adapter.processor, lambda: self._walk)
            for attn in adapter.attention_layers(transformer)
        ]
        self._handles: list[Any] = []
        self._watch: StepWatch | None = None
        self._walk: Walk | None = None  # of the call under way; None: RAS stands aside
        self._run: Run | None = None
        self._runs = 0
        self._warnings: dict[str, str] = {}

    # --- on and off ---------------------------------------------------------------------------

    @staticmethod
    def of(transformer: nn.Module) -> Controller | None:
        """The controller of an enabled transformer."""
        return vars(transformer).get(_CONTROLLER)

    def obstacle(self) -> str | None:
        """The name of an attention processor that RAS cannot stand in for."""
        return next(filter(None, (layer.obstacle() for layer in self._layers)), None)

    def attach(self) -> None:
        setattr(self._transformer, _CONTROLLER, self)
        setattr(self._transformer, _RESET, self._end_of_call)
        self._handles = [
            self._transformer.register_forward_pre_hook(self._before_call, with_kwargs=True),
            self._transformer.register_forward_hook(self._after_call, always_call=True),
        ]
        self._put_in_place()
        self._follow_scheduler()

    def detach(self) -> None:
        """Take off whatever is still ours."""
        self._free()
        self._walk = self._run = None
        for part in (*self._handles, *self._hooks, *self._layers, self._watch):
            part.remove()
        forget_fused_originals(self._transformer)
        delattr(self._transformer, _CONTROLLER)
        delattr(self._transformer, _RESET)

    def _put_in_place(self) -> None:
        """See to it that every hook and processor is ours; a new one knows of no earlier step."""
        slots: list[HookSlot | ProcessorSlot] = [*self._hooks, *self._layers]
        if any([slot.put_in_place() for slot in slots]):
            self._free()

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

    # --- a call of the transformer ------------------------------------------------------------

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide how the tokens of this call go, before any of them enters."""
        self._walk = None
        inputs = {**dict(zip(self._parameters, args)), **kwargs}
        grid = self._grid(inputs["hidden_states"])
        if torch.is_grad_enabled():
            self._free()
            self._warn(
                "gradients",
                "gradients are enabled, so that all is computed densely; call the transformer "
                "under torch.no_grad()",
            )
            return None
        batch, branch = len(inputs["hidden_states"]), self._adapter.branch(inputs)
        run = self._current_run(self._follow_scheduler(), grid, batch)
        walk = self._choose_walk(run, branch, inputs)
        active = None if walk is None else walk.active
        run.count(active, batch, self._adapter.text_tokens(inputs), main=not branch)
        self._walk = walk
        if active is None:
            return None
        gathered = self._adapter.gather_inputs(inputs, active)
        return ((), {**inputs, **gathered}) if gathered else None

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        self._walk = None

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        patch, (height, width) = self._transformer.config.patch_size, latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"the latents' height and width, {height}x{width}, must be multiples of the "
                f"transformer's patch size {patch}"
            )
        return height // patch, width // patch

    def _current_run(self, scheduler: Any, grid: tuple[int, int], batch: int) -> Run:
        """The run that this call belongs to: a new one if the scheduler has new timesteps."""
        last = self._run
        goes_on = last is not None and last.timesteps is scheduler.timesteps and last.grid == grid
        if last is not None and goes_on and not last.over:
            return last
        self._free()
        self._run = run = Run.of(self._config, scheduler, grid, batch)
        self._runs += 1
        if run.dense and self._config.sample_ratio < 1:
            self._warn(
                "dense",
                f"none of this run's {len(run.plan)} steps can be sparse, so that all are dense: "
                f"the first that may be is scheduler_start_step="
                f"{self._config.scheduler_start_step}",
            )
        return run

    def _choose_walk(
        self, run: Run, branch: tuple[int, ...], inputs: dict[str, Any]
    ) -> Walk | None:
        if run.dense or run.unseen:
            return None
        obstacle = self.obstacle()
        if obstacle is not None:
            self._free()
            self._warn(
                "processor",
                f"calls are dense while a layer's attention processor is {obstacle}, which RAS "
                "cannot stand in for",
            )
            return None
        self._put_in_place()
        if branch in run.branches:
            self._free()
            run.unseen = True
            self._warn(
                "unseen",
                "the transformer was called twice with no step of the enabled scheduler between, "
                "so that the run is dense: hand the noise to that scheduler, and both guidance "
                "branches to one call of the transformer",
            )
            return None
        run.branches.add(branch)
        batch = len(inputs["hidden_states"])
        if branch:
            return Walk(branch, None if run.rows is None else _for_batch(run.active, batch))
        key = (batch, self._adapter.text_tokens(inputs), self._adapter.positions(inputs))
        fits = _same(key, run.key)
        if not fits:
            self._free()
            run.key = key
        begins = run.begun != run.step
        sparse = fits and (begins or run.rows is not None)  # all stages of a step are of one kind
        run.rows = _for_batch(run.active, batch) if sparse else None
        return Walk(branch, run.rows)

    def _enter(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Only the active tokens go on."""
        if self._walk is None or self._walk.active is None:
            return output
        return self._adapter.gather_entered(output, self._walk.active)

    def _leave(self, module: nn.Module, args: Any, noise: Tensor) -> Tensor:
        """Merge the fresh noise into the branch's cached one; never hand out the cache itself."""
        walk, run = self._walk, self._run
        if walk is None or run is None:
            return noise
        cached = run.noise.get(walk.branch)
        if walk.rows is not None and cached is not None and len(cached) == len(noise):
            fresh = noise if walk.main else ras_kernels.gather_tokens(noise, walk.rows)
            return ras_kernels.merge_noise_(cached, walk.rows, fresh)
        if cached is None or (cached.shape, cached.dtype) != (noise.shape, noise.dtype):
            run.noise[walk.branch] = cached = normal_empty(noise, noise.shape)
        cached.copy_(noise)
        return noise

    # --- a step of the scheduler --------------------------------------------------------------

    def _after_step(self, noise: Tensor) -> None:
        """Choose the regions of the next step on the guided noise of this one."""
        run = self._run
        if run is None or run.over or run.timesteps is not self._follow_scheduler().timesteps:
            return
        run.branches.clear()
        run.samples = len(noise)
        run.stages += 1
        if run.stages % run.order:
            return  # a second-order step is not done before its second stage
        was_dense, run.rows, run.active = run.rows is None, None, None
        if run.over:
            self._free()
        elif run.plan[run.step] < run.regions and not run.unseen:
            scores = ras_kernels.region_scores(
                noise, self._transformer.config.patch_size, self._config.metric
            )
            if was_dense or run.ages is None or run.ages.shape != scores.shape:
                run.ages = torch.zeros_like(scores, dtype=torch.int32)
            run.active, run.ages = ras_kernels.select_regions(
                scores,
                run.ages,
                run.plan[run.step],
                high_ratio=self._config.high_ratio,
                starvation_scale=self._config.starvation_scale,
            )

    # --- what is kept -------------------------------------------------------------------------

    def _free(self) -> None:
        """Drop keys, values and noise, so that the next step is dense."""
        self._note_bytes()
        for layer in self._layers:
            layer.clear()
        if self._run is not None:
            self._run.key = self._run.rows = None
            self._run.noise.clear()

    def _note_bytes(self) -> None:
        if self._run is not None:
            held = sum(layer.nbytes for layer in self._layers)
            held += sum(cached.nbytes for cached in self._run.noise.values())
            self._run.cache_bytes = max(self._run.cache_bytes, held)

    def _end_of_call(self, *args: Any, **kwargs: Any) -> None:
        """What a pipeline calls when it returns, from an interrupted run too."""
        self._free()
        inherited = getattr(type(self._transformer), _RESET, None)
        if inherited is not None:
            inherited(self._transformer, *args, **kwargs)

    def stats(self) -> Stats:
        told = tuple(self._warnings.values())
        if self._run is None:
            return Stats(self._config, warnings=told)
        self._note_bytes()
        return self._run.stats(self._runs, told)


def _for_batch(active: Tensor | None, batch: int) -> Tensor | None:
    """The samples' rows for all guidance copies, which pipelines stack copy by copy."""
    if active is None or batch % len(active):
        return None
    return active.repeat(batch // len(active), 1)


def _same(key: tuple[Any, ...], other: tuple[Any, ...] | None) -> bool:
    return other is not None and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(key, other)
    )
