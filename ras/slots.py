"""What stands in one place of a transformer or a scheduler, and can be taken off again.

It stays there while others change the model: peft wraps modules; `fuse_qkv_projections` and
`load_ip_adapter` set processors; offloading and compilation replace `forward`.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout, Rows
from .seam import can_redirect, redirect
from .site import KVCache, RASAttnProcessor, Site, Walk

Answer = tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], Any]]
Observe = Callable[[Tensor, Any, Any], None]


class HookSlot:
    """A forward hook on the submodule that is at `path`, whichever module that may be."""

    def __init__(
        self, transformer: nn.Module, path: str, hook: Callable[..., Any], *, before: bool = False
    ) -> None:
        self._transformer, self._path, self._hook, self._before = transformer, path, hook, before
        self._module: nn.Module | None = None
        self._handle: Any = None

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        module = self._transformer.get_submodule(self._path)
        if module is self._module:
            return False
        self.remove()
        self._module = module
        if self._before:
            self._handle = module.register_forward_pre_hook(self._hook, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(self._hook)
        return True

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class ProcessorSlot:
    """Our processor in one attention layer, around whichever processor is there."""

    def __init__(
        self,
        attn: Any,
        rows: Rows,
        kind: Callable[[], type[RASAttnProcessor] | None],
        walk: Callable[[], Walk | None],
    ) -> None:
        """`rows` are of the layer's keys; `kind` tells the processor's class, None the seam."""
        self._attn, self._rows, self._kind = attn, rows, kind
        self._site = Site(walk)
        self._ours: Any = None
        self._made_by: type[RASAttnProcessor] | None = None

    def obstacle(self) -> str | None:
        """The name of a processor that does what ours does not."""
        original, kind = _original(self._attn.processor), self._kind()
        fits = can_redirect(original) if kind is None else type(original) in kind.replaces
        return None if fits else type(original).__name__

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        kind = self._kind()
        ours = self._ours is not None and self._attn.processor is self._ours
        if ours and self._made_by is kind:
            return False
        self._made_by = kind
        self._ours = (kind or redirect)(_original(self._attn.processor), self._site)
        self._attn.set_processor(self._ours)
        return True

    def remove(self) -> None:
        if isinstance(self._attn.processor, RASAttnProcessor):
            self._attn.set_processor(_original(self._attn.processor))

    def new_cache(
        self,
        batch: int,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        ranks: int = 1,
        **options: Any,
    ) -> KVCache:
        """Room for the layer's keys and values of all tokens, where it computes.

        `device` is where it does if nobody says so, `ranks` share its heads, and the options are
        those of a `KVCache`.
        """
        heads, size = heads_of_keys(self._attn)
        heads //= ranks
        text = layout.text if self._rows is Rows.JOINT else 0
        shape = batch, layout.tokens, heads, size
        device = device_of(self._attn, device)
        return KVCache(shape, layout.references, text, dtype, device, **options)

    def use(self, cache: KVCache | None) -> None:
        """Keep keys and values there, until something else is said."""
        self._site.cache, self._site.reached = cache, False

    @property
    def reached(self) -> bool:
        """Whether attention came by since `use`."""
        return self._site.reached


def device_of(layer: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a layer computes, as the hooks of a `device_map` say."""
    found = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return otherwise if found is None else torch.device(found)


def heads_of_keys(attn: Any) -> tuple[int, int]:
    """How many heads of keys an attention layer projects to, and the size of one."""
    heads = getattr(attn, "heads", None) or attn.num_heads
    size = getattr(attn, "head_dim", None) or attn.inner_dim // heads
    groups = getattr(attn, "num_kv_heads", None)
    return groups or getattr(attn, "inner_kv_dim", heads * size) // size, size


class ForwardSlot:
    """A method on a transformer that may answer a call in the place of its `forward`.

    A forward hook cannot keep the blocks from running. Offloading and compilation put things in
    the same place; what was there is called through to, and is back after `remove`, unless
    somebody has put another thing on top since.
    """

    def __init__(
        self,
        transformer: nn.Module,
        answer: Callable[..., Answer | None],
        interrupted: Callable[[], None],
    ) -> None:
        """`answer(transformer, args, kwargs)` returns None for `forward`, or two functions.

        The first makes tensors, the second an output of them. Compilers look into the first alone,
        as into `forward`: some refuse a call in which there is nothing for them. `interrupted` is
        called where something ends a call that forward hooks do not hear of, Ctrl-C above all.
        """
        self._transformer, self._answer, self._interrupted = transformer, answer, interrupted
        self._found: Any = None
        self.reached = False
        """For `answer` to set: whether the call under way has come here."""
        self._put()

    def _put(self) -> None:
        transformer, answer, interrupted = self._transformer, self._answer, self._interrupted
        self._before = before = vars(transformer).get("forward")
        of = weakref.ref(transformer)  # a deep copy has this function too

        @torch.compiler.disable(recursive=False)
        @functools.wraps(type(transformer).forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ours = self is of()
            try:
                answered = answer(self, args, kwargs)
                if answered is not None:
                    predict, finish = answered
                    return finish(predict())
                if before is None or not ours:
                    return type(self).forward(self, *args, **kwargs)
                return before(*args, **kwargs)
            except BaseException as error:
                if ours and not isinstance(error, Exception):
                    interrupted()
                raise

        if before is not None:
            forward.__wrapped__ = before  # for whoever asks what is beneath
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

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without it, for a `with` block, unless somebody has put another thing on top."""
        on_top = vars(self._transformer).get("forward") is self._ours
        self.remove()
        try:
            yield
        finally:
            if on_top:
                self._transformer.forward = self._ours

    def remove(self) -> None:
        if vars(self._transformer).get("forward") is not self._ours:
            return
        del self._transformer.forward
        if self._before is not None:
            self._transformer.forward = self._before


def take_off_hooks(module: nn.Module, owner: object) -> None:
    """Take off the forward hooks that are methods of `owner`."""
    kinds = {
        "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
        "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    }
    for name, flags in kinds.items():
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if _owner(hook) is owner]:
            for held in (name, *flags):
                getattr(module, held).pop(key, None)


def _owner(hook: Any) -> Any:
    return getattr(getattr(hook, "func", hook), "__self__", None)


def forget_fused_originals(transformer: nn.Module) -> None:
    """Take our processors out of what `unfuse_qkv_projections` is going to put back."""
    saved = getattr(transformer, "original_attn_processors", None)
    if isinstance(saved, dict):
        for name, processor in saved.items():
            saved[name] = _original(processor)


def _original(processor: Any) -> Any:
    """The processor beneath ours."""
    while isinstance(processor, RASAttnProcessor):
        processor = processor.ras_original
    return processor


class StepWatch:
    """Tells `observe` the noise of each step of one scheduler, once the step is done, the sample
    that it was predicted of, and what the step returns.

    The scheduler's own `step` is called through a method on the instance, which `copy.deepcopy`
    binds to the copy; a copy is not observed.
    """

    def __init__(self, scheduler: Any, observe: Observe) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._before = vars(scheduler).get("step")
        self._observer = _Observer(scheduler, observe)
        self._step = _observed_step(type(scheduler), self._observer, self._before)
        scheduler.step = types.MethodType(self._step, scheduler)

    @property
    def scheduler(self) -> Any:
        """As long as there is one."""
        return self._scheduler()

    def remove(self) -> None:
        """Take the method off; if somebody has put another on top of it, it only passes on."""
        self._observer.tell = None
        scheduler = self.scheduler
        if scheduler is None:
            return
        if getattr(vars(scheduler).get("step"), "__func__", None) is not self._step:
            return
        del scheduler.step
        covered = getattr(self._before, "observer", None)
        if self._before is not None and (covered is None or covered.tell is not None):
            scheduler.step = self._before


class _Observer:
    """Whom to tell of which scheduler's steps. It keeps neither alive: copies refer to it too."""

    def __init__(self, scheduler: Any, observe: Observe) -> None:
        self.of = weakref.ref(scheduler)
        self.tell: weakref.WeakMethod | None = weakref.WeakMethod(observe)

    def __call__(self, scheduler: Any, noise: Tensor, sample: Any, after: Any) -> None:
        observe = None if self.tell is None else self.tell()
        if observe is not None and scheduler is self.of():
            observe(noise, sample, after)


def _observed_step(
    scheduler_type: Any, observer: _Observer, before: Callable[..., Any] | None
) -> Callable[..., Any]:
    @functools.wraps(scheduler_type.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is None or self is not observer.of():
            output = type(self).step(self, *args, **kwargs)
        else:
            output = before(*args, **kwargs)
        noise = args[0] if args else kwargs["model_output"]
        sample = args[2] if len(args) > 2 else kwargs.get("sample")
        observer(self, noise, sample, output)
        return output

    step.observer = observer  # type: ignore[attr-defined]
    return step
