"""Switching RAS on and off."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

from .callers import PIPELINES
from .checks import MOST_STEPS, check_count, shown
from .clock import Clock, read_clock
from .config import RASConfig
from .families import family_of
from .family import Family
from .fingerprint import differences, of_model
from .layout import Layout
from .masks import as_mask
from .mount import Mount, cache_numbers
from .plan import RunPlan
from .policy.planner import plan_run
from .session import Session, asks_for_partial_steps
from .stats import Stats

DISCRETE = {  # schedulers of tokens out of a vocabulary
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "VQDiffusionScheduler",
}

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
    config = _configured(config, overrides)
    pipe = model if isinstance(model, PIPELINES) else None
    if pipe is None and not callable(getattr(scheduler, "step", None)):
        name = type(_transformers(model)[0]).__name__
        raise ValueError(
            f"a bare {name} needs the scheduler that its noise is handed to: "
            f"enable(transformer, scheduler=...); got {shown(scheduler)}"
        )
    if pipe is not None and scheduler is not None:
        raise ValueError(
            f"a {type(pipe).__name__} has its own scheduler; set pipe.scheduler, and leave "
            "scheduler= to bare transformers"
        )
    mask = mask if mask is None or mask is False else as_mask(mask)
    _check_plan(config, model, getattr(pipe, "scheduler", scheduler))
    replaced = _replaced(model, getattr(pipe, "scheduler", scheduler))
    mounts = [_mount(*each, replaced) for each in families_of(model, family)]
    session = Session(mounts, config, scheduler=scheduler, pipe=pipe, mask=mask)
    for mount in mounts:
        cache = mount.cache()
        if cache is not None:
            raise ValueError(
                f"{cache} decides by itself what the transformer computes; take it off before "
                "ras.enable (caches of diffusers by transformer.disable_cache())"
            )
    wanted = asks_for_partial_steps(config, mask)
    for mount in mounts if wanted else ():
        obstacle, change = mount.obstacle(), mount.change_of_rows()
        if not mount.family.regions:
            name = type(mount.transformer if pipe is None else pipe).__name__
            raise ValueError(
                f"{wanted} asks for partial steps, which are not known for {name} (`ras models` "
                "lists what is); speedup= plans whole steps for it"
            )
        if obstacle is not None:
            raise ValueError(
                f"{wanted} asks for partial steps, for which the attention processor {obstacle} "
                "is not supported; take it out before ras.enable, or ask for speedup= alone"
            )
        if change is not None:
            raise ValueError(
                f"{wanted} asks for partial steps, and {change} may want the rows of all tokens; "
                "take it off before ras.enable, or ask for speedup= alone"
            )
    for each in replaced:
        each.detach()
    session.attach()
    return model


def disable(model: object) -> None:
    """Leave the model as it was before `enable`; no effect if it is not enabled.

    A transformer that other enabled pipelines share stays enabled for these; `disable` of the
    transformer itself ends it for all.
    """
    for session in _sessions_of(model):
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


def is_enabled(model: object) -> bool:
    """Whether a pipeline, or a bare transformer, is enabled."""
    return session_of(model) is not None


def stats(model: object) -> Stats:
    """What the last run did. Raises ValueError if the model is not enabled."""
    session = session_of(model)
    if session is None:
        raise ValueError(f"this {type(model).__name__} is not enabled; call ras.enable on it first")
    return session.stats()


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
    found = [(transformer, _blocks(transformer)) for transformer in _transformers(model)]
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
        transformer = _transformers(pipe)[0]
        family, session = _family(transformer, pipe), session_of(pipe)
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
    kept, changes = cache_numbers(transformer, family, layout)
    numbers = kept + (changes if config.kv_correction and planned.extrapolates else 0)
    return dataclasses.replace(planned, cache_bytes=numbers * transformer.dtype.itemsize)


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


def session_of(model: object) -> Session | None:
    """The session of an enabled pipeline, or the last one of a transformer."""
    return next(reversed(_sessions_of(model)), None)


def _check_plan(config: RASConfig, model: object, scheduler: Any) -> None:
    """Raise ValueError if the plan was made for another model or scheduler."""
    if config.plan is None or not config.plan.made_for:
        return
    here = of_model(transformers_of(model), scheduler)
    told = differences(dict(config.plan.made_for), here, shared=True)
    if told:
        raise ValueError(
            f"the plan was made for another model ({'; '.join(told)}); calibrate one for this, or "
            "take made_for out of it"
        )


def transformers_of(model: object) -> dict[str, nn.Module]:
    """The denoisers by their names in the pipeline; a bare one is called transformer."""
    found = _transformers(model)
    if not isinstance(model, PIPELINES):
        return {"transformer": found[0]}
    pipe: Any = model
    parts = {role: getattr(part, "_orig_mod", part) for role, part in pipe.components.items()}
    return {role: part for role, part in parts.items() if any(part is each for each in found)}


def _sessions_of(model: object) -> list[Session]:
    """The sessions of a pipeline's runs, or all of a transformer."""
    found: dict[Session, None] = {}
    for mount in map(Mount.of, _transformers(model)):
        if mount is not None:
            of_all = mount.sessions
            found |= dict.fromkeys(
                mount.sessions_of(model) if isinstance(model, PIPELINES) else of_all
            )
    return list(found)


def _replaced(model: object, scheduler: Any) -> list[Session]:
    """The sessions that end where a model is enabled.

    Its own, those of a bare transformer or a pipeline that is gone with its scheduler, and those
    whose scheduler is gone; of a bare transformer all but those of other pipelines.
    """
    by_hand = not isinstance(model, PIPELINES)
    everyone: dict[Session, None] = {}
    for mount in map(Mount.of, _transformers(model)):
        everyone |= dict.fromkeys([] if mount is None else mount.sessions)
    return [
        each
        for each in everyone
        if each.scheduler is None
        or (not by_hand and each.pipeline is model)
        or (each.is_bare and (by_hand or each.scheduler is scheduler))
        or (by_hand and each.scheduler is scheduler)
    ]


def _mount(transformer: nn.Module, family: Family, replaced: list[Session]) -> Mount:
    """A transformer's mount: that of the pipelines which share it, unless all are replaced.

    Raises:
        ValueError: They have another record of it.
    """
    found = Mount.of(transformer)
    if found is None or set(found.sessions) <= set(replaced):
        return Mount(transformer, family)
    if found.family != family:
        raise ValueError(
            f"this {family.model} is enabled for another pipeline with another record; call "
            "ras.disable on the transformer first"
        )
    return found


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


def families_of(model: object, family: Family | None = None) -> list[tuple[nn.Module, Family]]:
    """The transformers of a model, each with its record, or with `family` if that is its class's.

    Raises:
        TypeError: `family` is no record.
        ValueError: It is of another class, or names modules that the transformer does not have.
    """
    transformers = _transformers(model)
    if family is not None:
        if not isinstance(family, Family):
            raise TypeError(f"family must be a ras.Family, got {shown(family)}")
        fit = [each for each in transformers if family_of(each, family) is family]
        if not fit:
            names = ", ".join(sorted({type(each).__name__ for each in transformers}))
            raise ValueError(f"family is the record of {family.model}; the model has {names}")
        for transformer in fit:
            family.check_names(transformer)
    return [(each, _family(each, model, family)) for each in transformers]


def _family(transformer: nn.Module, model: object, record: Family | None = None) -> Family:
    """The record of a transformer, of whole steps alone where partial ones cannot be."""
    family = family_of(transformer, *([] if record is None else [record]))
    if isinstance(model, PAGMixin):  # it replaces attention processors in each call
        return Family(family.model, blocks=family.blocks)
    return family


def _blocks(transformer: Any) -> list[nn.Module]:
    """The blocks that repeat, by our record or by what diffusers says of the class."""
    lists = family_of(transformer).blocks
    if lists:
        return [block for name in lists for block in transformer.get_submodule(name)]
    kinds = getattr(transformer, "_repeated_blocks", None) or ()
    return [module for module in transformer.modules() if type(module).__name__ in kinds]


def _transformers(model: object) -> list[nn.Module]:
    """The denoisers of a pipeline, or a bare one, beneath `torch.compile`.

    Raises:
        ValueError: A pipeline whose denoiser is no transformer, or which no scheduler steps.
        TypeError: Neither a pipeline nor a transformer.
    """
    if not isinstance(model, PIPELINES):
        found = getattr(model, "_orig_mod", model)
        if not isinstance(found, nn.Module):
            raise TypeError(
                f"expected a DiffusionPipeline or a transformer, got {type(model).__name__}"
            )
        if not hasattr(found, "config"):
            name = type(found).__name__
            raise TypeError(f"expected a pipeline or a transformer of diffusers, got {name}")
        if _is_unet(found):
            raise ValueError(
                f"{type(found).__name__} is not supported: it is a UNet, no transformer"
            )
        return [found]
    pipe: Any = model
    name, parts = type(pipe).__name__, pipe.components
    scheduler = getattr(pipe, "scheduler", None)
    denoisers = [
        getattr(part, "_orig_mod", part)
        for role, part in parts.items()
        if "transformer" in role and isinstance(part, nn.Module)
    ]
    unets = [part for part in parts.values() if _is_unet(part)]
    if unets:
        raise ValueError(
            f"{name} is not supported: its denoiser is a UNet ({type(unets[0]).__name__}), and RAS "
            "works on transformers"
        )
    if not denoisers:
        raise ValueError(f"{name} is not supported: it has no transformer, which RAS works on")
    if not callable(getattr(scheduler, "step", None)):
        raise ValueError(f"{name} is not supported: no scheduler steps its noise")
    if type(scheduler).__name__ in DISCRETE:
        raise ValueError(
            f"{name} is not supported: its diffusion is discrete ({type(scheduler).__name__}), and "
            "what a step predicts cannot be carried on"
        )
    return denoisers


def _is_unet(part: object) -> bool:
    return any("UNet" in base.__name__ for base in type(part).__mro__)
