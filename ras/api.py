"""Switching RAS on and off."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .branches import cache_bytes
from .callers import PIPELINES
from .checks import MOST_STEPS, check_count, shown
from .clock import Clock, read_clock
from .config import RASConfig
from .denoisers import blocks_of, denoisers, families_of, record_of, transformers_of
from .family import Family
from .fingerprint import differences, of_model
from .layout import Layout
from .masks import as_mask
from .mount import Mount
from .others import cache_on
from .plan import Reuse, RunPlan
from .policy.planner import plan_run
from .scope import Settings, asks_for_partial_steps, goes_by_pictures, using
from .session import Session
from .sessions import enabled_session, mount_of, replaced_by, session_of, sessions_of
from .stats import Stats

Model = TypeVar("Model")


def enable(
    model: Model,
    config: RASConfig | None = None,
    *,
    mask: Any = None,
    scheduler: Any = None,
    family: Family | None = None,
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
        family: The record of a transformer that ours (`ras models`) do not have, or instead of
            one. Try it by `ras.check` first.
        **overrides: Fields of `RASConfig`, instead of those of `config`.

    Returns:
        `model`. If it was enabled before, the configuration is replaced; pipelines that share a
        transformer are enabled one by one, and may run in a thread each.

    Raises:
        TypeError: An option that does not exist, or a value of the wrong type.
        ValueError: A value out of its range, a mask with nothing under it, a bare transformer
            without its scheduler, a pipeline that is not supported, a plan that was made for
            another model or scheduler, another cache on the transformer, or a setting that asks
            for partial steps where there can be none. Nothing has been changed then.
    """
    asked = _asked(None, config, {"mask": mask, **overrides})
    pipe = model if isinstance(model, PIPELINES) else None
    if pipe is None and not callable(getattr(scheduler, "step", None)):
        name = type(denoisers(model)[0]).__name__
        raise ValueError(
            f"a bare {name} needs the scheduler that its noise is handed to: "
            f"enable(transformer, scheduler=...); got {shown(scheduler)}"
        )
    if pipe is not None and scheduler is not None:
        raise ValueError(
            f"a {type(pipe).__name__} has its own scheduler; set pipe.scheduler, and leave "
            "scheduler= to bare transformers"
        )
    _check_plan(asked.config, model, getattr(pipe, "scheduler", scheduler))
    replaced = replaced_by(model, getattr(pipe, "scheduler", scheduler))
    mounts = [mount_of(*each, replaced) for each in families_of(model, family)]
    session = Session(mounts, asked, scheduler=scheduler, pipe=pipe)
    for mount in mounts:
        cache = cache_on(mount.transformer)
        if cache is not None:
            raise ValueError(
                f"{cache} decides by itself what the transformer computes; take it off before "
                "ras.enable (caches of diffusers by transformer.disable_cache())"
            )
    _check_partial_steps(asked, model, mounts)
    for each in replaced:
        each.detach()
    session.attach()
    return model


def disable(model: object) -> None:
    """Leave the model as it was before `enable`; no effect if it is not enabled.

    A transformer that other enabled pipelines share stays enabled for these; `disable` of the
    transformer itself ends it for all.
    """
    for session in sessions_of(model):
        session.detach()


@contextmanager
def enabled(
    model: Model,
    config: RASConfig | None = None,
    *,
    mask: Any = None,
    scheduler: Any = None,
    family: Family | None = None,
    **overrides: Any,
) -> Iterator[Model]:
    """`enable` for a `with` block, at whose end the model is disabled."""
    enable(model, config, mask=mask, scheduler=scheduler, family=family, **overrides)
    try:
        yield model
    finally:
        disable(model)


@contextmanager
def settings(model: Model, config: RASConfig | None = None, **overrides: Any) -> Iterator[Model]:
    """Other settings for a `with` block, of runs that this thread begins in it.

    Nothing is enabled anew: the model stays as it is, and so does what its caches can go on with.
    Runs of other threads, and runs under way, keep the settings that they have. Blocks may lie
    within each other; `enable` in one begins anew, without it.

    Args:
        model: A pipeline, or a bare transformer, that is enabled.
        config: The settings; None takes those that hold already.
        **overrides: Fields of `RASConfig`, instead of those of `config`, and `mask`, as `enable`
            takes it. A mask that holds already stays unless another, False or None is given.

    Raises:
        TypeError, ValueError: The model is not enabled, or what `enable` would raise of these
            settings. Nothing has been changed then.
    """
    session = enabled_session(model)
    asked = _asked(session.settings, config, overrides)
    _check_plan(asked.config, model, session.origin.scheduler)
    _check_partial_steps(asked, model, session.mounts)
    with using(session, asked):
        yield model


def is_enabled(model: object) -> bool:
    """Whether a pipeline, or a bare transformer, is enabled."""
    return session_of(model) is not None


def stats(model: object) -> Stats:
    """What the last run did. Raises ValueError if the model is not enabled."""
    return enabled_session(model).stats()


def compile_repeated_blocks(model: Model, **options: Any) -> Model:
    """Have each block of the transformers compiled by itself, in place, before or after `enable`.

    Blocks of one kind share their code: with `enable`, a dense and a partial graph for each kind.
    It is what diffusers' method of this name does for models that list their repeated blocks.

    Args:
        model: A `DiffusionPipeline` or a bare transformer.
        **options: Those of `torch.compile`, such as `fullgraph=True` or `mode="reduce-overhead"`.
            Where PyTorch takes a `recompile_limit`, it is 64 unless given: its own, 8, is less
            than the graphs of a model of three kinds of block.

    Returns:
        `model`.

    Raises:
        ValueError: The pipeline is not supported, or nobody says what the blocks of its
            transformer are.
        TypeError: Neither a pipeline nor a transformer.
    """
    found = [(transformer, blocks_of(transformer)) for transformer in denoisers(model)]
    for transformer, blocks in found:
        if not blocks:
            raise ValueError(
                f"{type(transformer).__name__} does not say which of its modules are repeated "
                "blocks; call its own compile()"
            )
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": 64, **options}
    for _, blocks in found:
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
) -> RunPlan:
    """Plan what each step of a run would compute, before anything runs; `print` shows it.

    Noise levels are those that the scheduler has for so many steps. Many pipelines hand it others:
    an enabled one that has made a run of so many steps is planned by the levels of that.

    Args:
        model: A pipeline, enabled (its settings count) or not (`RASConfig()` does); or settings,
            for which Stable Diffusion 3 at 1024 x 1024 pixels with its default scheduler is taken.
        num_inference_steps: Solver steps.
        height, width: Of the image in pixels; the model's own size if None. They count where
            there are partial steps.
        text_tokens: Text tokens that walk with the image; what the pipeline's defaults give if
            None.

    Raises:
        TypeError: Neither a pipeline nor settings, or no whole numbers.
        ValueError: A number out of its range, a pipeline that is not supported, or one whose
            scheduler takes no number of steps alone.
    """
    transformer: Any = None
    check_count("num_inference_steps", num_inference_steps, most=MOST_STEPS)
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            check_count(name, size)
    if text_tokens is not None:
        check_count("text_tokens", text_tokens, 0)
    if isinstance(model, RASConfig):
        if height or width:
            raise ValueError("height and width are a pipeline's; settings have 1024 x 1024 pixels")
        config, session, masked = model, None, None
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        layout = Layout((64, 64), 333)
    elif not isinstance(model, PIPELINES):
        raise TypeError(
            f"plan takes a pipeline or a RASConfig as its model, got {type(model).__name__}"
        )
    else:
        pipe: Any = model
        transformer = denoisers(pipe)[0]
        family, session = record_of(transformer, pipe), session_of(pipe)
        config = RASConfig() if session is None else session.config
        scheduler = pipe.scheduler
        layout = _usual_layout(pipe, transformer, family, session, height, width)
        masked = None if session is None else session.masked(layout)
    if text_tokens is not None:
        layout = dataclasses.replace(layout, text=text_tokens)
    last = None if session is None or session.run is None else session.run.clock
    clock = (
        last
        if last and last.steps == num_inference_steps
        else _clock(scheduler, num_inference_steps)
    )
    planned = plan_run(config, clock, layout, None if masked is None else masked.shape[1])
    if not planned.partial or transformer is None:
        return planned
    kind = config.cache_dtype or transformer.dtype
    kept, changes = cache_bytes(transformer, family, layout, kind)
    carries = config.kv_correction and planned.reuse is not Reuse.HELD
    return dataclasses.replace(planned, cache_bytes=kept + changes * carries)


def _usual_layout(
    pipe: Any,
    transformer: Any,
    family: Family,
    session: Session | None,
    height: int | None,
    width: int | None,
) -> Layout:
    """That of the size given, else of the model's own, else of an enabled pipeline's last run."""
    layout = family.usual_layout(pipe, transformer, height, width)
    if layout.grid or session is None or session.run is None:
        return layout
    return session.run.planned.layout


def _clock(scheduler: Any, steps: int) -> Clock:
    """The clock of a run of so many steps. Raises ValueError where it takes more to say so."""
    scheduler, options = copy.deepcopy(scheduler), {}
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = scheduler.config.base_shift  # what pipelines have at base_seq_len
    if "intermediate_timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        options["intermediate_timesteps"] = None
    try:
        scheduler.set_timesteps(steps, **options)
    except (TypeError, ValueError) as error:
        name = type(scheduler).__name__
        raise ValueError(f"{name} does not take {steps} steps alone: {error}") from error
    return read_clock(scheduler)


def _check_plan(config: RASConfig, model: object, scheduler: Any) -> None:
    """Raise ValueError if the plan is of another model or scheduler."""
    made_for = dict(getattr(config.plan, "made_for", ()))
    here = of_model(transformers_of(model), scheduler) if made_for else {}
    told = differences(made_for, here, shared=True)
    if told:
        raise ValueError(
            f"the plan was made for another model ({'; '.join(told)}); calibrate one for this, or "
            "take made_for out of it"
        )


def _check_partial_steps(settings: Settings, model: object, mounts: Sequence[Mount]) -> None:
    """Raise ValueError if the settings ask for partial steps where there can be none."""
    wanted = asks_for_partial_steps(settings)
    for mount in mounts if wanted else ():
        obstacle, change = mount.obstacle(), mount.change_of_rows()
        spread = mount.obstacle_of_ranks(by_picture=goes_by_pictures(settings, model))
        if not mount.family.regions:
            name = type(model if isinstance(model, PIPELINES) else mount.transformer).__name__
            raise ValueError(
                f"{wanted} asks for partial steps, which are not known for {name} (`ras models` "
                "lists what is); speedup= plans whole steps for it"
            )
        if obstacle is not None:
            raise ValueError(
                f"{wanted} asks for partial steps, for which the attention processor {obstacle} "
                "is not supported; take it out before ras.enable, or ask for speedup= alone"
            )
        if spread is not None:
            raise ValueError(f"{wanted} asks for partial steps, of which there are none: {spread}")
        if change is not None:
            raise ValueError(
                f"{wanted} asks for partial steps, and {change} may want the rows of all tokens; "
                "take it off before ras.enable, or ask for speedup= alone"
            )


def _asked(
    before: Settings | None, config: RASConfig | None, overrides: dict[str, Any]
) -> Settings:
    """The settings that are asked for in the place of others, the mask among the overrides."""
    if before is not None and config is None:
        config = before.config
    mask = overrides.pop("mask", None if before is None else before.mask)
    if mask is not None and mask is not False:
        mask = as_mask(mask)
    return Settings(_configured(config, overrides), mask)


def _configured(config: RASConfig | None, overrides: dict[str, Any]) -> RASConfig:
    if config is not None and not isinstance(config, RASConfig):
        raise TypeError(f"config must be a RASConfig, got {shown(config)}")
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
