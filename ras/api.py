"""Switching RAS on and off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

from .adapters import adapter_for
from .config import RASConfig
from .controller import Controller
from .report import Stats

Model = TypeVar("Model")


def enable(
    model: Model, config: RASConfig | None = None, *, scheduler: Any = None, **overrides: Any
) -> Model:
    """Make every run of a model from now on a region-adaptive one.

    Args:
        model: A `DiffusionPipeline` or a bare transformer.
        config: The settings; `RASConfig()` if None.
        scheduler: For a bare transformer, the scheduler whose `step` is called with its guided
            noise. A pipeline has its own, which is followed when it is replaced.
        **overrides: Fields of `RASConfig`, instead of those of `config`.

    Returns:
        `model`. If it was enabled before, the configuration is replaced.

    Raises:
        TypeError: An option that does not exist, or a value of the wrong type.
        ValueError: A value out of its range, a bare transformer without its scheduler, or a
            pipeline, transformer or attention processor that is not supported. Nothing has been
            changed then.
    """
    config = _configured(config, overrides)
    transformer = _transformer(model)
    adapter = adapter_for(transformer)
    pipe = model if isinstance(model, DiffusionPipeline) else None
    if isinstance(pipe, PAGMixin):
        raise ValueError(
            f"{type(pipe).__name__} is not supported: perturbed-attention guidance replaces "
            "attention processors in each call; use the pipeline without PAG"
        )
    if pipe is not None and scheduler is not None:
        raise ValueError(
            f"a {type(pipe).__name__} has its own scheduler; set pipe.scheduler, and leave "
            "scheduler= to bare transformers"
        )
    if pipe is None and not callable(getattr(scheduler, "step", None)):
        raise ValueError(
            f"a bare {type(transformer).__name__} needs the scheduler that its noise is handed "
            f"to: enable(transformer, scheduler=...); got {scheduler!r}"
        )
    controller = Controller(transformer, adapter, config, scheduler=scheduler, pipe=pipe)
    obstacle = controller.obstacle()
    if obstacle is not None:
        raise ValueError(
            f"the attention processor {obstacle} is not supported; take it out before ras.enable"
        )
    disable(model)
    controller.attach()
    return model


def disable(model: object) -> None:
    """Leave the model as it was before `enable`; no effect if it is not enabled."""
    controller = Controller.of(_transformer(model))
    if controller is not None:
        controller.detach()


@contextmanager
def enabled(
    model: Model, config: RASConfig | None = None, *, scheduler: Any = None, **overrides: Any
) -> Iterator[Model]:
    """`enable` for a `with` block, at whose end the model is disabled."""
    enable(model, config, scheduler=scheduler, **overrides)
    try:
        yield model
    finally:
        disable(model)


def is_enabled(model: object) -> bool:
    """Whether a pipeline's transformer, or a bare one, is enabled."""
    return Controller.of(_transformer(model)) is not None


def stats(model: object) -> Stats:
    """What the last run did. Raises ValueError if the model is not enabled."""
    controller = Controller.of(_transformer(model))
    if controller is None:
        raise ValueError(f"this {type(model).__name__} is not enabled; call ras.enable on it first")
    return controller.stats()


def _configured(config: RASConfig | None, overrides: dict[str, Any]) -> RASConfig:
    if config is not None and not isinstance(config, RASConfig):
        raise TypeError(f"config must be a RASConfig, got {config!r}")
    names = [field.name for field in dataclasses.fields(RASConfig)]
    for name in overrides:
        if name not in names:
            raise TypeError(f"{name!r} is no option of RASConfig; these are: {', '.join(names)}")
    return dataclasses.replace(config or RASConfig(), **overrides)


def _transformer(model: object) -> nn.Module:
    """A pipeline's transformer, or a bare one, beneath `torch.compile`."""
    found = model
    if isinstance(model, DiffusionPipeline):
        found = getattr(model, "transformer", None)
        if found is None:
            raise ValueError(f"{type(model).__name__} has no transformer, which RAS works on")
    found = getattr(found, "_orig_mod", found)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"expected a DiffusionPipeline or a transformer, got {type(model).__name__}"
        )
    return found
