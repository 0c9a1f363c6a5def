"""What of a pipeline denoises: its transformers, the record of each, and their blocks."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

from .callers import PIPELINES
from .checks import shown
from .families import family_of
from .family import Family

DISCRETE = {  # schedulers of tokens out of a vocabulary
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "VQDiffusionScheduler",
}


def denoisers(model: object) -> list[nn.Module]:
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
    found = [
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
    if not found:
        raise ValueError(f"{name} is not supported: it has no transformer, which RAS works on")
    if not callable(getattr(scheduler, "step", None)):
        raise ValueError(f"{name} is not supported: no scheduler steps its noise")
    if type(scheduler).__name__ in DISCRETE:
        raise ValueError(
            f"{name} is not supported: its diffusion is discrete ({type(scheduler).__name__}), and "
            "what a step predicts cannot be carried on"
        )
    return found


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by their names in it, beneath `torch.compile`."""
    return {
        role: getattr(part, "_orig_mod", part)
        for role, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }


def transformers_of(model: object) -> dict[str, nn.Module]:
    """The denoisers by their names in the pipeline; a bare one is called transformer."""
    found = denoisers(model)
    if not isinstance(model, PIPELINES):
        return {"transformer": found[0]}
    parts = modules_of(model)
    return {role: part for role, part in parts.items() if any(part is each for each in found)}


def families_of(model: object, family: Family | None = None) -> list[tuple[nn.Module, Family]]:
    """The transformers of a model, each with its record, or with `family` if that is its class's.

    Raises:
        TypeError: `family` is no record.
        ValueError: It is of another class, or names modules that the transformer does not have.
    """
    transformers = denoisers(model)
    if family is not None:
        if not isinstance(family, Family):
            raise TypeError(f"family must be a ras.Family, got {shown(family)}")
        fit = [each for each in transformers if family_of(each, family) is family]
        if not fit:
            names = ", ".join(sorted({type(each).__name__ for each in transformers}))
            raise ValueError(f"family is the record of {family.model}; the model has {names}")
        for transformer in fit:
            family.check_names(transformer)
    return [(each, record_of(each, model, family)) for each in transformers]


def record_of(transformer: nn.Module, model: object, record: Family | None = None) -> Family:
    """The record of a transformer, of whole steps alone where partial ones cannot be."""
    family = family_of(transformer, *([] if record is None else [record]))
    if isinstance(model, PAGMixin):  # it replaces attention processors in each call
        return Family(family.model, blocks=family.blocks)
    return family


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The blocks that repeat, by our record or by what diffusers says of the class."""
    lists = family_of(transformer).blocks
    if lists:
        return [block for name in lists for block in transformer.get_submodule(name)]
    kinds = getattr(transformer, "_repeated_blocks", None) or ()
    return [module for module in transformer.modules() if type(module).__name__ in kinds]


def _is_unet(part: object) -> bool:
    return any("UNet" in base.__name__ for base in type(part).__mro__)
