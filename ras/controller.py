"""One controller per enabled model: it decides which tokens walk, and chooses the next ones."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

import ras_kernels

from .adapters import Adapter
from .attention import Walk
from .config import RASConfig
from .masks import MaskWatch, masked_regions
from .planner import plan_run
from .report import Stats
from .reuse import HeldNoise
from .run import Run
from .scheduler import StepWatch, noise_levels, of_steps, order_of
from .selection import Selection
from .slots import ForwardSlot, HookSlot, ProcessorSlot, forget_fused_originals

_CONTROLLER = "_ras_controller"  # on the transformer, while enabled
_RESET = "_reset_stateful_cache"  # what pipelines call on their components when they return


class RASWarning(UserWarning):
    """RAS does other than it was asked for; the message says what it does instead."""


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
        mask: Tensor | Literal[False] | None,
    ) -> None:
        self._transformer = transformer
        self._adapter = adapter
        self.config = config
        self._mask = None if mask is False else mask
        self._watches_mask = mask is None
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
        self._forward: ForwardSlot | None = None
        self._mask_watch: MaskWatch | None = None
        self._handles: list[Any] = []
        self._watch: StepWatch | None = None
        self._walk: Walk | None = None  # of the call under way; None: RAS stands aside
        self._run: Run | None = None
        self._noise: dict[tuple[int, ...], HeldNoise] = {}  # by branch
        self._runs = 0
        self._warnings: dict[str, str] = {}

    # --- on and off ---------------------------------------------------------------------------

    @staticmethod
    def of(transformer: nn.Module) -> Controller | None:
        """The controller of an enabled transformer."""
        controller = vars(transformer).get(_CONTROLLER)
        # A deep copy of an enabled transformer is not enabled.
        return controller if controller is not None and controller.serves(transformer) else None

    def serves(self, transformer: object) -> bool:
        return transformer is self._transformer

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """Itself: the hooks of a deep copy of the transformer lead here, and do nothing."""
        return self

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
        self._forward = ForwardSlot(self._transformer, _answer)
        pipe = None if self._pipe is None else self._pipe()
        if self._watches_mask and hasattr(pipe, "prepare_mask_latents"):
            self._mask_watch = MaskWatch(pipe)
        self._put_in_place()
        self._follow_scheduler()

    def detach(self) -> None:
        """Take off whatever is still ours."""
        self._drop()
        self._walk = self._run = None
        for part in (*self._handles, *self._hooks, *self._layers, self._forward, self._watch):
            part.remove()
        self._forward = None
        if self._mask_watch is not None:
            self._mask_watch.remove()
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

    @torch.compiler.disable
    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide how the tokens of this call go, before any of them enters."""
        if not self.serves(module):
            return None
        self._walk = None
        if self._forward is not None:
            self._forward.before_call()
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
        text_tokens = self._adapter.text_tokens(inputs)
        run = self._current_run(self._follow_scheduler(), grid, batch, text_tokens)
        self._walk = walk = self._choose_walk(run, branch, inputs)
        run.count(walk, batch, text_tokens)
        if walk is None or walk.skip or walk.active is None:
            return None
        gathered = self._adapter.gather_inputs(inputs, walk.active, reuse_text=walk.reuse_text)
        return ((), {**inputs, **gathered}) if gathered else None

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What makes the output of a call that computes nothing, or None for one that does."""
        if self._forward is not None:
            self._forward.reached = True
        walk, run = self._walk, self._run
        if walk is None or run is None or not walk.skip:
            return None
        inputs = {**dict(zip(self._parameters, args)), **kwargs}
        return partial(self._predicted, walk, run.grid, inputs.get("return_dict", True))

    def _predicted(self, walk: Walk, grid: tuple[int, int], return_dict: bool) -> Any:
        tokens = walk.held.predict(walk.gain)
        noise = self._adapter.image_of(tokens, grid, self._transformer.config.patch_size)
        return Transformer2DModelOutput(sample=noise) if return_dict else (noise,)

    @torch.compiler.disable
    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.serves(module):
            self._walk = None
            # A call that failed may not have come that far; one may have switched us off.
            if output is not None and self._forward is not None:
                self._forward.after_call()

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        patch, (height, width) = self._transformer.config.patch_size, latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"the latents' height and width, {height}x{width}, must be multiples of the "
                f"transformer's patch size {patch}"
            )
        return height // patch, width // patch

    def _current_run(
        self, scheduler: Any, grid: tuple[int, int], batch: int, text_tokens: int
    ) -> Run:
        """The run that this call belongs to: a new one if the scheduler has new timesteps."""
        last = self._run
        goes_on = last is not None and last.timesteps is scheduler.timesteps and last.grid == grid
        if last is not None and goes_on and not last.over:
            return last
        self._free()
        order, sigmas = order_of(scheduler), noise_levels(scheduler)
        regions = math.prod(grid)
        masked = self.masked(grid)
        levels = of_steps(sigmas, order)
        marked = None if masked is None else masked.shape[1]
        plan, complaint = plan_run(self.config, levels, regions, text_tokens, marked)
        if complaint is not None:
            self._warn("plan", complaint)
        self._run = run = Run(
            self.config,
            scheduler.timesteps,
            sigmas,
            grid,
            order,
            plan,
            plan.counts(regions),
            samples=batch,
            masked=None if masked is None else masked.to(scheduler.timesteps.device),
        )
        self._runs += 1
        return run

    def masked(self, grid: tuple[int, int]) -> Tensor | None:
        """The regions under the mask, `(S, k)`, or None without one."""
        mask = self._mask if self._mask_watch is None else self._mask_watch.mask
        return None if mask is None else masked_regions(mask, grid, self.config.mask_margin)

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
        latents: Tensor = inputs["hidden_states"]
        batch, begins = len(latents), run.begun != run.step
        if branch:
            held = self._noise.get(branch)
            known = held is not None and held.begun and len(held.noise) == batch
            rows = _for_batch(run.active, batch) if known and run.rows is not None else None
            return self._walk_of(run, branch, latents, rows, skip=run.skips and known)
        text_tokens = self._adapter.text_tokens(inputs)
        dtype = _compute_dtype(latents)
        key = (batch, text_tokens, dtype, self._adapter.positions(inputs))
        fits = _same(key, run.key)
        if not fits:
            self._free()
            run.key = key
            self._make_room(run, latents, text_tokens)
        # All stages of a step are of one kind.
        partial = fits and (begins or run.rows is not None)
        run.rows = _for_batch(run.active, batch) if partial else None
        run.skips = fits and not run.counts[run.step] and (begins or run.skips)
        return self._walk_of(run, branch, latents, run.rows, skip=run.skips)

    def _make_room(self, run: Run, latents: Tensor, text_tokens: int) -> None:
        """For all layers' keys and values, if they are needed; let go what is of another size."""
        others = [b for b, held in self._noise.items() if held.noise.shape[1] != run.regions]
        for branch in others:
            del self._noise[branch]
        for layer in self._layers:
            if not run.partial:
                layer.clear()
                continue
            layer.allocate(
                len(latents),
                run.regions,
                text_tokens,
                carries=self.config.kv_correction and run.extrapolates,
                dtype=_compute_dtype(latents),
                device=latents.device,
            )
            self._pin(layer.tensors)

    def _walk_of(
        self, run: Run, branch: tuple[int, ...], latents: Tensor, rows: Tensor | None, *, skip: bool
    ) -> Walk:
        """The walk of a call; its noise is noted as predicted anew."""
        held = self._held(run, branch, latents)
        extrapolation = run.extrapolation(run.step)
        if skip:
            gain = held.gain(run.sigma, extrapolation)
        else:
            gain = held.expect(rows, run.sigma, extrapolation)
        return Walk(
            branch,
            held,
            rows,
            gain,
            caches=run.partial,
            skip=skip,
            reuse_text=self.config.reuse_text,
        )

    def _held(self, run: Run, branch: tuple[int, ...], latents: Tensor) -> HeldNoise:
        """Where the branch's noise is kept."""
        held = self._noise.setdefault(branch, HeldNoise())
        if not held.begun or len(held.noise) != len(latents):
            columns = self._transformer.config.patch_size**2 * self._transformer.out_channels
            held.allocate(
                (len(latents), run.regions, columns),
                _compute_dtype(latents),
                latents.device,
                extrapolates=run.extrapolates,
            )
            self._pin(held.tensors)
        return held

    def _enter(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Only the active tokens go on."""
        if self._walk is None or self._walk.active is None:
            return output
        return self._adapter.gather_entered(output, self._walk.active)

    def _leave(self, module: nn.Module, args: Any, noise: Tensor) -> Tensor:
        """Merge the fresh noise into the branch's cached one; never hand out the cache itself."""
        walk = self._walk
        if walk is None:
            return noise
        if walk.rows is not None and not walk.main:
            noise = ras_kernels.gather_tokens(noise, walk.rows)
        return walk.held.merge(noise, walk.rows, walk.gain)

    # --- a step of the scheduler --------------------------------------------------------------

    def _after_step(self, noise: Tensor) -> None:
        """Choose the regions of the next step on the guided noise of this one."""
        run = self._run
        if run is None or run.over or run.timesteps is not self._follow_scheduler().timesteps:
            return
        run.branches.clear()
        run.samples = len(noise)
        if run.stages % run.order == 0 and not run.skips and run.partial:
            if run.selection is None:
                run.selection = Selection(self.config, self._transformer.config.patch_size)
            run.selection.observe(noise, None if run.rows is None else run.active, run.sigma)
        run.stages += 1
        if run.stages % run.order:
            return  # a second-order step is not done before its second stage
        run.rows, run.active, run.skips = None, None, False
        if run.over:
            self._free()
            run.selection = None
        elif 0 < run.counts[run.step] < run.regions and not run.unseen:
            assert run.selection is not None
            run.active = run.selection.choose(noise, run.counts[run.step], run.sigma, run.masked)
            self._note_bytes()

    # --- what is kept -------------------------------------------------------------------------

    def _free(self) -> None:
        """Forget keys, values and noise, so that the next step is dense."""
        self._note_bytes()
        if self._run is not None:
            self._run.key = self._run.rows = None
        if not self.config.keep_caches:
            self._drop()
        for held in self._noise.values():
            held.begun = False

    def _drop(self) -> None:
        for layer in self._layers:
            layer.clear()
        self._noise.clear()

    def _pin(self, tensors: list[Tensor]) -> None:
        """Tell compilers of what stays where it is: CUDA graphs may write to it."""
        if self.config.keep_caches:
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def _note_bytes(self) -> None:
        if self._run is None:
            return
        selection = self._run.selection
        held = [] if selection is None else selection.tensors
        for layer in self._layers if self._run.key else ():
            held += layer.tensors
        for noise in self._noise.values():
            held += noise.tensors if noise.begun else []
        total = sum(tensor.nbytes for tensor in held)
        self._run.cache_bytes = max(self._run.cache_bytes, total)

    def _end_of_call(self, *args: Any, **kwargs: Any) -> None:
        """What a pipeline calls when it returns, from an interrupted run too."""
        self._free()
        if self._run is not None:
            self._run.selection = None
        if self._mask_watch is not None:  # the next run may be another pipeline's
            self._mask_watch.mask = None
        inherited = getattr(type(self._transformer), _RESET, None)
        if inherited is not None:
            inherited(self._transformer, *args, **kwargs)

    def stats(self) -> Stats:
        told = tuple(self._warnings.values())
        if self._run is None:
            return Stats(self.config, warnings=told)
        self._note_bytes()
        return self._run.stats(self._runs, told)


@torch.compiler.disable
def _answer(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    controller = Controller.of(transformer)
    return None if controller is None else controller.answer(args, kwargs)


def _compute_dtype(latents: Tensor) -> torch.dtype:
    """What a transformer's layers return for latents."""
    kind = latents.device.type
    if latents.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return latents.dtype
    return torch.get_autocast_dtype(kind)


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
