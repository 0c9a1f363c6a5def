"""What others have put on a transformer that RAS does not go with, by name.

Two things cannot be told by trying. A cache that decides by itself what a call computes counts
calls, some of which RAS leaves out; and what changes how blocks see their rows may not take some of
them. So whatever is not known to be harmless counts as found.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .parallel import splits_rows

HARMLESS = {  # hooks of diffusers that move and cast weights
    "group_offloading",
    "layer_execution_tracker",
    "layerwise_casting",
    "lazy_leafs",
    "lazy_prefetch_group_offloading",
    "peft_autocast_disable",
}
TRUSTED = {"accelerate", "diffusers", "peft", "ras", "torch"}  # packages whose hooks we know


def cache_on(transformer: nn.Module) -> str | None:
    """What decides by itself what a call of the transformer computes, or None.

    That is any hook of diffusers but the harmless ones, on whichever module, and a `forward` of
    another package's.
    """
    for path, module in transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in ({} if registry is None else registry.hooks).items():
            if name not in HARMLESS and not splits_rows(name, transformer):
                return f"{type(hook).__name__} of diffusers{_at(path)}"
    return _foreign_forward(transformer, transformer)


def change_of_output(module: nn.Module, transformer: nn.Module) -> str | None:
    """What may have a module return other than what its class does, or None.

    That is another package's class, `forward` or forward hook; those of offloading are known.
    """
    return _foreign_forward(module, transformer) or _foreign_hook(module, transformer)


def change_of_rows(transformer: nn.Module, layers: Iterable[nn.Module]) -> str | None:
    """What may want all rows of a block or of its attention, or None.

    That is another package's class, `forward` or forward hook there, and a feed-forward in chunks.
    """
    around = {id(layer) for layer in layers}
    for path, module in reversed(list(transformer.named_modules())):
        if not path or not (id(module) in around or around & _children(module)):
            continue
        around.add(id(module))
        found = change_of_output(module, transformer)
        if found is not None:
            return f"{found}{_at(path)}"
        if getattr(module, "_chunk_size", None) is not None:
            return f"a feed-forward in chunks{_at(path)}"
    return None


def _children(module: nn.Module) -> set[int]:
    return {id(child) for child in module.children()}


def _foreign_forward(module: nn.Module, transformer: nn.Module) -> str | None:
    """The name of a `forward` that is not of a package that we know, wherever it lies."""
    trusted = {*TRUSTED, _package(type(transformer))}
    for function in _forwards(module):
        if _package(function) not in trusted:
            return f"{_name(function)}, which stands in for forward,"
    if _package(type(module)) not in trusted:
        return f"the class {type(module).__name__} of {_package(type(module))}"
    return None


def _foreign_hook(module: nn.Module, transformer: nn.Module) -> str | None:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    trusted = {*TRUSTED, _package(type(transformer))}
    found = (hook for hook in hooks if _package(hook) not in trusted)
    return next((f"the forward hook {_name(hook)}" for hook in found), None)


def _forwards(module: nn.Module) -> Iterator[Any]:
    """A module's `forward` and its class's, and what each of them has been wrapped around."""
    seen: list[Any] = [None]
    for function in list[Any]((module.forward, type(module).forward)):
        while not any(function is each for each in seen):
            seen.append(function)
            yield function
            function = getattr(function, "__wrapped__", None)


def _function(of: Any) -> Any:
    """The function beneath partials and methods; a class or another callable as it is."""
    while isinstance(of, functools.partial) or inspect.ismethod(of):
        of = of.func if isinstance(of, functools.partial) else of.__func__
    return of


def _package(of: Any) -> str:
    """The package that has the code of a function or a class, whatever it was named after."""
    function = _function(of)
    names = getattr(function, "__globals__", None)
    if names is not None:
        return str(names.get("__name__", "")).partition(".")[0]
    kind = function if inspect.isclass(function) else type(function)
    return kind.__module__.partition(".")[0]


def _name(of: Any) -> str:
    """Where the code of a function is, and what it is called there."""
    function = _function(of)
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__name__}"
    return f"{function.__globals__['__name__']}.{code.co_name}"


def _at(path: str) -> str:
    return f" on {path}" if path else ""
