"""Switching RAS on and off."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

from .adapters import adapter_for
from .config import RASConfig
from .controller import Controller
from .masks import as_mask
from .plan import Plan
from .planner import plan_run
from .report import Stats
from .scheduler import noise_levels, of_steps, order_of

Model = TypeVar("Model")


def enable(
    model: Model,
    config: RASConfig | None = None,
    *,
    mask: Any = None,
    scheduler: Any = None,
    **overrides: Any,
) -> Model:
    """Make every run of a model from now on a region-adaptive one.

    Args:
        model: A `DiffusionPipeline` or a bare transformer.
        config: The settings; `RASConfig()` if None.
        mask: Where the image is to change, as inpainting pipelines take it: a PIL image, an array
            or a tensor, above one half of its range there. Partial steps compute the regions that
            it touches, `mask_margin` more around them, and no others unless the plan has room
            for more. None takes an inpainting pipeline's own mask, False none at all.
        scheduler: For a bare transformer, the scheduler whose `step` is called with its guided
            noise. A pipeline has its own, which is followed when it is replaced.
        **overrides: Fields of `RASConfig`, instead of those of `config`.

    Returns:
        `model`. If it was enabled before, the configuration is replaced.

    Raises:
        TypeError: An option that does not exist, or a value of the wrong type.
        ValueError: A value out of its range, a mask with nothing under it, a bare transformer
            without its scheduler, or a pipeline, transformer or attention processor that is not
            supported. Nothing has been changed then.
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
    marked = mask if mask is None or mask is False else as_mask(mask)
    controller = Controller(
        transformer, adapter, config, scheduler=scheduler, pipe=pipe, mask=marked
    )
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
    model: Model,
    config: RASConfig | None = None,
    *,
    mask: Any = None,
    scheduler: Any = None,
    **overrides: Any,
) -> Iterator[Model]:
    """`enable` for a `with` block, at whose end the model is disabled."""
    enable(model, config, mask=mask, scheduler=scheduler, **overrides)
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


def compile_repeated_blocks(model: Model, **options: Any) -> Model:
    """Have each block of a transformer compiled by itself, in place, before or after `enable`.

    Blocks of one kind share their code: with `enable`, a dense and a sparse graph for each kind.
    It is what diffusers' method of this name does for models that list their repeated blocks.

    Args:
        model: A `DiffusionPipeline` or a bare transformer.
        **options: Those of `torch.compile`, such as `fullgraph=True` or `mode="reduce-overhead"`.
            Where PyTorch takes a `recompile_limit`, it is 64 unless given: its own, 8, is less
            than the graphs of a model of three kinds of block.

    Returns:
        `model`.

    Raises:
        ValueError: The pipeline or its transformer is not supported.
        TypeError: Neither a pipeline nor a transformer.
    """
    transformer: Any = _transformer(model)
    blocks = getattr(transformer, adapter_for(transformer).blocks)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": 64, **options}
    for block in blocks:
        block.compile(**options)
    return model


def plan(
    model: Any,
    num_inference_steps: int,
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
) -> Plan:
    """Print what each step of a run would compute, before anything runs, and return it.

    Args:
        model: A pipeline, enabled (its settings count) or not (`RASConfig()` does); or settings,
            for which Stable Diffusion 3 at 1024 x 1024 pixels with its default scheduler is taken.
        num_inference_steps: Solver steps.
        height, width: Of the image in pixels; the model's own size if None.
        text_tokens: Text tokens that walk with the image; what the pipeline's defaults give if
            None.

    Raises:
        TypeError: Neither a pipeline nor settings.
        ValueError: The pipeline or its transformer is not supported.
    """
    if isinstance(model, RASConfig):
        config = model
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        regions, text, marked = 4096, 333, None
    elif not isinstance(model, DiffusionPipeline):
        raise TypeError(f"plan takes a pipeline or a RASConfig, got {type(model).__name__}")
    else:
        pipe: Any = model
        transformer: Any = _transformer(pipe)
        controller, adapter = Controller.of(transformer), adapter_for(transformer)
        config = RASConfig() if controller is None else controller.config
        scheduler = copy.deepcopy(pipe.scheduler)
        size = transformer.config.sample_size * pipe.vae_scale_factor
        patch = transformer.config.patch_size * pipe.vae_scale_factor
        grid = (height or size) // patch, (width or size) // patch
        regions = math.prod(grid)
        masked = None if controller is None else controller.masked(grid)
        marked = None if masked is None else masked.shape[1]
        text = adapter.usual_text_tokens(pipe)
    dynamic = scheduler.config.get("use_dynamic_shifting")
    shift = {"mu": scheduler.config.base_shift} if dynamic else {}  # pipelines' own at base_seq_len
    scheduler.set_timesteps(num_inference_steps, **shift)
    levels = of_steps(noise_levels(scheduler), order_of(scheduler))
    text = text if text_tokens is None else text_tokens
    made, complaint = plan_run(config, levels, regions, text, marked)
    reached = made.speedup(regions, text, reuse_text=config.reuse_text)
    print(made)
    print(f"speed-up {reached:.3f} ({regions} image and {text} text tokens)")
    if complaint is not None:
        print(complaint)
    return made


def _configured(config: RASConfig | None, overrides: dict[str, Any]) -> RASConfig:
    if config is not None and not isinstance(config, RASConfig):
        raise TypeError(f"config must be a RASConfig, got {config!r}")
    names = [field.name for field in dataclasses.fields(RASConfig)]
    for name in overrides:
        if name not in names:
            raise TypeError(f"{name!r} is no option of RASConfig; these are: {', '.join(names)}")
    if overrides.get("plan") is not None and config is not None:
        # a plan takes the place of what the settings had instead of one
        overrides = {"speedup": None, "sample_ratio": None} | overrides
    if config is not None and {"speedup", "sample_ratio"} & overrides.keys():
        overrides = {"plan": None} | overrides
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
