"""All that `enable` puts on a transformer and its scheduler, and takes off again.

It stays there while others change the model: peft wraps modules; `fuse_qkv_projections` and
`load_ip_adapter` set processors; offloading and compilation replace `forward`.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ras_kernels

from .branch import Call
from .families import Family
from .layout import Layout
from .site import KVCache, RASAttnProcessor, Walk

if TYPE_CHECKING:
    from .session import Session

Answer = tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], Any]]
SESSION = "_ras_session"  # on a transformer, while enabled
RESET = "_reset_stateful_cache"  # what pipelines call on their components when they return


class Mount:
    """One transformer of an enabled model, and the call of it under way."""

    def __init__(self, transformer: Any, family: Family, session: Session) -> None:
        self.transformer, self.family = transformer, family
        self.call: Call | None = None  # None: RAS stands aside
        self._session = session
        self._parameters = list(inspect.signature(transformer.forward).parameters)
        self._hooks: list[HookSlot] = []
        self._layers: list[ProcessorSlot] = []
        self._handles: list[Any] = []
        self._forward: ForwardSlot | None = None
        if family.regions:
            self._hooks = [
                HookSlot(transformer, family.enter, self._enter),
                HookSlot(transformer, family.leave, self._leave),
            ]
            processor = family.processor
            assert processor is not None
            self._layers = [
                ProcessorSlot(attn, processor, lambda: self._walk)
                for attn in family.attention_layers(transformer)
            ]

    # --- on and off ---------------------------------------------------------------------------

    def attach(self) -> None:
        transformer = self.transformer
        setattr(transformer, SESSION, self._session)
        setattr(transformer, RESET, self._end_of_call)
        self._handles = [
            transformer.register_forward_pre_hook(self._before_call, with_kwargs=True),
            transformer.register_forward_hook(self._after_call, always_call=True),
        ]
        self._forward = ForwardSlot(transformer, _answer)
        self.put_in_place()

    def detach(self) -> None:
        """Take off whatever is still ours."""
        self.call = None
        for part in (*self._handles, *self._hooks, *self._layers, self._forward):
            part.remove()
        self._forward = None
        forget_fused_originals(self.transformer)
        delattr(self.transformer, SESSION)
        delattr(self.transformer, RESET)

    def obstacle(self) -> str | None:
        """The name of an attention processor that RAS cannot stand in for."""
        return next(filter(None, (layer.obstacle() for layer in self._layers)), None)

    def put_in_place(self) -> bool:
        """Have every hook and processor be ours where they can be, and say if any was not."""
        if self.obstacle() is not None:
            return False
        slots: list[HookSlot | ProcessorSlot] = [*self._hooks, *self._layers]
        return any([slot.put_in_place() for slot in slots])

    # --- a call of the transformer ------------------------------------------------------------

    @property
    def _walk(self) -> Walk | None:
        return None if self.call is None else self.call.walk

    def new_caches(self, batch: int, layout: Layout, **kind: Any) -> list[KVCache]:
        """A cache for each layer; `kind` is what `ProcessorSlot.new_cache` takes besides."""
        return [layer.new_cache(batch, layout, **kind) for layer in self._layers]

    @torch.compiler.disable
    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide how the tokens of this call go, before any of them enters."""
        if module is not self.transformer:
            return None
        self.call = None
        if self._forward is not None:
            self._forward.before_call()
        inputs = {**dict(zip(self._parameters, args)), **kwargs}
        self.call = call = self._session.begin_call(self, inputs)
        if call is None or call.walk is None or call.skip:
            return None
        for layer, cache in zip(self._layers, call.branch.caches):
            layer.use(cache)
        active, reuse_text = call.walk.active, call.walk.reuse_text
        if active is None:
            return None
        gathered = self.family.gather_inputs(inputs, active, reuse_text=reuse_text)
        return ((), {**inputs, **gathered}) if gathered else None

    def answer(self) -> Answer | None:
        """What makes the output of a call that computes nothing, or None for one that does."""
        if self._forward is not None:
            self._forward.reached = True
        if self.call is None or not self.call.skip:
            return None
        return self.call.predictor(), self.call.finish

    @torch.compiler.disable
    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self.transformer:
            return
        call, self.call = self.call, None
        if call is not None:
            for layer in self._layers:
                layer.use(None)
        if output is None:  # it failed, maybe before it came to anything
            self._session.call_failed()
        elif self._forward is not None:  # unless the call has switched us off
            self._forward.after_call()
            if call is not None:
                call.end(output)

    def _enter(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Let the active tokens alone go on."""
        walk = self._walk
        if walk is None or walk.active is None:
            return output
        return self.family.gather_entered(output, walk.active)

    def _leave(self, module: nn.Module, args: Any, noise: Tensor) -> Tensor:
        """Merge the fresh noise into the branch's cached one; never hand out the cache itself."""
        walk = self._walk
        if walk is None:
            return noise
        if walk.rows is not None and walk.whole:
            noise = ras_kernels.gather_tokens(noise, walk.rows)
        return walk.held.merge(noise, walk.rows, walk.gain)

    def _end_of_call(self, *args: Any, **kwargs: Any) -> None:
        """Do what a pipeline wants when it returns, from an interrupted run too."""
        self._session.end_of_call()
        inherited = getattr(type(self.transformer), RESET, None)
        if inherited is not None:
            inherited(self.transformer, *args, **kwargs)


@torch.compiler.disable
def _answer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer | None:
    session = vars(transformer).get(SESSION)
    mount = None if session is None else session.mount_of(transformer)
    return None if mount is None else mount.answer()


class HookSlot:
    """A forward hook on the submodule that is at `path`, whichever module that may be."""

    def __init__(self, transformer: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        self._transformer, self._path, self._hook = transformer, path, hook
        self._module: nn.Module | None = None
        self._handle: Any = None

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        module = self._transformer.get_submodule(self._path)
        if module is self._module:
            return False
        self.remove()
        self._module, self._handle = module, module.register_forward_hook(self._hook)
        return True

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class ProcessorSlot:
    """Our processor in one attention layer, around whichever processor is there."""

    def __init__(
        self, attn: Any, kind: type[RASAttnProcessor], walk: Callable[[], Walk | None]
    ) -> None:
        self._attn, self._kind, self._walk = attn, kind, walk
        self._ours: RASAttnProcessor | None = None

    def obstacle(self) -> str | None:
        """The name of a processor that does what ours does not."""
        original = _original(self._attn.processor)
        return None if type(original) in self._kind.replaces else type(original).__name__

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        if self._ours is not None and self._attn.processor is self._ours:
            return False
        self._ours = self._kind(_original(self._attn.processor), self._walk)
        self._attn.set_processor(self._ours)
        return True

    def remove(self) -> None:
        if isinstance(self._attn.processor, RASAttnProcessor):
            self._attn.set_processor(_original(self._attn.processor))

    def new_cache(
        self, batch: int, layout: Layout, dtype: torch.dtype, device: torch.device, *, carries: bool
    ) -> KVCache:
        """Room for the layer's keys and values of all tokens."""
        attn, size = self._attn, self._attn.inner_dim // self._attn.heads
        shape = batch, layout.tokens, attn.inner_kv_dim // size, size
        joint = attn.added_kv_proj_dim is not None
        return KVCache(shape, layout.text if joint else 0, dtype, device, carries=carries)

    def use(self, cache: KVCache | None) -> None:
        """Keep keys and values there, until something else is said."""
        if self._ours is not None:
            self._ours.cache = cache


class ForwardSlot:
    """A method on a transformer that may answer a call in the place of its `forward`.

    A forward hook cannot keep the blocks from running. Offloading and compilation put things in
    the same place; what was there is called through to, and is back after `remove`, unless
    somebody has put another thing on top since.
    """

    def __init__(self, transformer: nn.Module, answer: Callable[..., Answer | None]) -> None:
        """`answer(transformer, args, kwargs)` returns None for `forward`, or two functions.

        The first makes tensors, the second an output of them. Compilers look into the first alone,
        as into `forward`: some refuse a call in which there is nothing for them.
        """
        self._transformer, self._answer = transformer, answer
        self._found: Any = None
        self.reached = False
        """For `answer` to set: whether the call under way has come here."""
        self._put()

    def _put(self) -> None:
        transformer, answer = self._transformer, self._answer
        self._before = before = vars(transformer).get("forward")
        of = weakref.ref(transformer)  # a deep copy has this function too

        @torch.compiler.disable(recursive=False)
        @functools.wraps(type(transformer).forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            answered = answer(self, args, kwargs)
            if answered is not None:
                predict, finish = answered
                return finish(predict())
            if before is None or self is not of():
                return type(self).forward(self, *args, **kwargs)
            return before(*args, **kwargs)

        self._ours = types.MethodType(forward, transformer)
        transformer.forward = self._ours

    def before_call(self) -> None:
        """Note what is in the place of `forward` when the transformer is called."""
        self._found, self.reached = vars(self._transformer).get("forward"), False

    def after_call(self) -> None:
        """Put it back if the call went past it, or took it off.

        Pipelines take model offloading off and put it on again when they return, and group
        offloading with streams changes its hooks in the first call: both set `forward` to what it
        was before they came.
        """
        now = vars(self._transformer).get("forward")
        if now is not self._ours and not (self.reached and now is self._found):
            self._put()

    def remove(self) -> None:
        if vars(self._transformer).get("forward") is not self._ours:
            return
        del self._transformer.forward
        if self._before is not None:
            self._transformer.forward = self._before


def forget_fused_originals(transformer: nn.Module) -> None:
    """Take our processors out of what `unfuse_qkv_projections` is going to put back."""
    saved = getattr(transformer, "original_attn_processors", None)
    if isinstance(saved, dict):
        for name, processor in saved.items():
            saved[name] = _original(processor)


def _original(processor: Any) -> Any:
    """The processor beneath ours."""
    while isinstance(processor, RASAttnProcessor):
        processor = processor.original
    return processor


class StepWatch:
    """Tells `observe` the noise of each step of one scheduler, once the step is done.

    The scheduler's own `step` is called through a method on the instance, which `copy.deepcopy`
    binds to the copy; a copy is not observed.
    """

    def __init__(self, scheduler: Any, observe: Callable[[Tensor], None]) -> None:
        self.scheduler = scheduler
        self._before = vars(scheduler).get("step")
        self._observer = _Observer(scheduler, observe)
        step = _observed_step(type(scheduler), self._observer, self._before)
        self._step = types.MethodType(step, scheduler)
        scheduler.step = self._step

    def remove(self) -> None:
        """Take the method off; if somebody has put another on top of it, it only passes on."""
        self._observer.tell = None
        if vars(self.scheduler).get("step") is not self._step:
            return
        del self.scheduler.step
        covered = getattr(self._before, "observer", None)
        if self._before is not None and (covered is None or covered.tell is not None):
            self.scheduler.step = self._before


class _Observer:
    """Whom to tell of which scheduler's steps. It keeps neither alive: copies refer to it too."""

    def __init__(self, scheduler: Any, observe: Callable[[Tensor], None]) -> None:
        self.of = weakref.ref(scheduler)
        self.tell: weakref.WeakMethod | None = weakref.WeakMethod(observe)

    def __call__(self, scheduler: Any, noise: Tensor) -> None:
        observe = None if self.tell is None else self.tell()
        if observe is not None and scheduler is self.of():
            observe(noise)


def _observed_step(
    scheduler_type: Any, observer: _Observer, before: Callable[..., Any] | None
) -> Callable[..., Any]:
    @functools.wraps(scheduler_type.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is None or self is not observer.of():
            output = type(self).step(self, *args, **kwargs)
        else:
            output = before(*args, **kwargs)
        observer(self, args[0] if args else kwargs["model_output"])
        return output

    step.observer = observer  # type: ignore[attr-defined]
    return step
