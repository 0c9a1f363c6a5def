"""What a measurement or a plan was made for, and in what two of these differ.

All is told by flat dictionaries of names and values, as they stand in the files: `transformer.…`
and `scheduler.…` are their classes and configurations, `weights.…` digests, `run.…` what only a
run knows, `call.…` the arguments of a pipeline's call.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

GUIDANCE = "run.guidance_scale"
SAMPLED = 16  # numbers of each weight
LEFT_OUT = {"quantization_config"}  # of configurations, beside what begins with an underscore


def of_model(transformers: Mapping[str, nn.Module], scheduler: Any) -> dict[str, Any]:
    """Classes and configurations."""
    found: dict[str, Any] = {}
    for role, part in {**transformers, "scheduler": scheduler}.items():
        found[f"{role}.class"] = type(part).__name__
        for name, value in dict(part.config).items():
            if not name.startswith("_") and name not in LEFT_OUT:
                found[f"{role}.{name}"] = plain(value)
    if isinstance(getattr(type(scheduler), "shift", None), property):  # it may have been set since
        found["scheduler.shift"] = plain(scheduler.shift)
    return found


def of_weights(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """A digest of each part's weights, the same on any device, offloaded or not.

    It is of the names, shapes and types of parameters and buffers, of 16 numbers, evenly, of each,
    and of the scales of adapters. One read of each device for each part.
    """
    return {f"weights.{role}": _digest_of(part) for role, part in parts.items()}


def of_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by value: numbers and texts as they are, tensors, arrays and images by digest."""
    return {f"call.{name}": plain(value) for name, value in call.items()}


def of_run(grid: tuple[int, ...], guidance_scale: Any) -> dict[str, Any]:
    """The grid of a run's tokens and its guidance, where they are known."""
    found: dict[str, Any] = {} if not grid else {"run.grid": grid}
    if isinstance(guidance_scale, Real):
        found[GUIDANCE] = float(guidance_scale)
    return found


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], *, shared: bool = False
) -> list[str]:
    """What differs, by name; `shared` compares the names that both have alone.

    Configurations gain names with the versions of diffusers, and not all is known everywhere.
    """
    names = [name for name in there if name in here or not shared]
    names += [name for name in here if name not in there and not shared]
    unlike = [name for name in names if there.get(name, "nothing") != here.get(name, "nothing")]
    others = tuple(name.removesuffix("class") for name in unlike if name.endswith(".class"))
    return [
        f"{name}: {_shown(name, there)} there, {_shown(name, here)} here"
        for name in unlike
        # The settings of another class are other ones, too.
        if name.endswith(".class") or not name.startswith(others)
    ]


def _shown(name: str, values: Mapping[str, Any]) -> str:
    return repr(values[name]) if name in values else "nothing"


def plain(value: Any) -> Any:
    """A value as JSON has it, hashable: lists are tuples, large things digests."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, list | tuple):
        return tuple(plain(each) for each in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(str, value)))
    if isinstance(value, Mapping):
        return tuple((str(name), plain(each)) for name, each in value.items())
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {_digest(_bytes(value))}"
    if isinstance(value, torch.Generator):
        return f"generator {_digest(_bytes(value.get_state()))}"
    if isinstance(value, np.ndarray | Image.Image):
        array = np.asarray(value)
        return f"array {array.shape} {array.dtype} {_digest(array.tobytes())}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


@torch.no_grad()
def _digest_of(module: nn.Module) -> str:
    digest = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in _weights(module):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel() and not weight.is_meta:
            samples.setdefault(weight.device, []).append(_sample(weight))
    for name, part in module.named_modules():
        scales = getattr(part, "scaling", None)
        if isinstance(scales, dict):  # an adapter of peft's
            on = not getattr(part, "disable_adapters", False) and part.active_adapters
            digest.update(f"{name} {sorted(scales.items())} {on}".encode())
    for each in samples.values():
        digest.update(_bytes(torch.cat(each)))
    return digest.hexdigest()[:16]


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; those that accelerate has offloaded, from where they are."""
    for prefix, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook])]
        held: Any = next((each for each in maps if each is not None), {})
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                there = held[name] if tensor.is_meta and name in held else tensor
                yield from _parts(f"{prefix}.{name}", there.detach())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _sample(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.as_subclass(Tensor).reshape(-1)
    last, count = len(flat) - 1, min(SAMPLED, len(flat))
    places = [i * last // max(count - 1, 1) for i in range(count)]
    return flat[torch.tensor(places, device=flat.device)].float()


def _bytes(tensor: Tensor) -> bytes:
    return json.dumps(tensor.detach().cpu().double().flatten().tolist()).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
