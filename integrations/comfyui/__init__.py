"""Nodes for ComfyUI: a diffusers pipeline, RAS with its mask, and a run that shows its regions.

What goes from node to node is a description; a pipeline is enabled in its run alone, so that one
loaded pipeline serves a graph's dense and its faster branches.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ras
from ras.cli.generate import BUNDLED_CALL
from ras.cli.loading import DTYPES, load
from ras.pictures import region_map

PIPELINE = "RAS_PIPELINE"


class Described(NamedTuple):
    """A pipeline, what it is always called with, and how RAS is enabled; None is dense."""

    pipe: Any
    call: dict[str, Any]
    config: ras.RASConfig | None = None
    mask: Tensor | None = None


class LoadPipeline:
    """A pipeline from a folder or the hub; without a name, the one that comes with `ras`."""

    CATEGORY, FUNCTION = "RAS", "load"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("STRING", {"default": ""}), "dtype": (["auto", *DTYPES],)}}

    def load(self, model: str, dtype: str) -> tuple[Described]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        asked = argparse.Namespace(
            model=model or None, device=device, dtype=None if dtype == "auto" else dtype
        )
        return (Described(load(asked, ras.bundled_model()), {} if model else dict(BUNDLED_CALL)),)


class ApplyRAS:
    """The same pipeline with RAS: partial steps compute what is under the mask, if there is one.

    ComfyUI's masks are 1 where the image is to change; one of zeros, which images without a mask
    come with, is none.
    """

    CATEGORY, FUNCTION = "RAS", "apply"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        speedup = ("FLOAT", {"default": 2.0, "min": 1.0, "max": 10.0, "step": 0.25})
        return {
            "required": {"pipeline": (PIPELINE,), "speedup": speedup},
            "optional": {"mask": ("MASK",)},
        }

    def apply(
        self, pipeline: Described, speedup: float, mask: Tensor | None = None
    ) -> tuple[Described]:
        if mask is not None:
            mask = mask.reshape(-1, 1, *mask.shape[-2:])
            mask = mask if bool((mask > 0.5).any()) else None
        return (pipeline._replace(config=ras.RASConfig(speedup), mask=mask),)


class Sample:
    """A run: its image, the image veiled where regions were computed less often, and statistics."""

    CATEGORY, FUNCTION = "RAS", "sample"
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("image", "regions", "stats")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"multiline": True}),
                "steps": ("INT", {"default": 28, "min": 1, "max": 1000}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            },
            "optional": {
                "image": ("IMAGE",),
                "guidance_scale": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 30.0}),
                "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8}),
                "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8}),
            },
        }

    def sample(
        self,
        pipeline: Described,
        prompt: str,
        steps: int,
        seed: int,
        image: Tensor | None = None,
        **more: float,
    ) -> tuple[Tensor, Tensor, str]:
        """Call the pipeline; a width or height of 0, and a guidance below 0, are its own.

        Raises ValueError, by name, for what the pipeline's call does not take.
        """
        pipe, call, config, mask = pipeline
        own = {name for name in ("width", "height") if not more.get(name)}
        if more.get("guidance_scale", 0) < 0:
            own.add("guidance_scale")
        call = {**call, **{name: more[name] for name in more.keys() - own}, "prompt": prompt}
        if image is not None:
            call["image"] = Image.fromarray((image[0].cpu().numpy() * 255).round().astype(np.uint8))
        call |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        takes = inspect.signature(type(pipe).__call__).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            unknown = ", ".join(name for name in call if name not in takes)
            if unknown:
                raise ValueError(f"{type(pipe).__name__} takes no {unknown}; leave it out")
        if config is None:
            found = pipe(**call).images[0]
            return _tensor(found), _tensor(found), "dense"
        with ras.enabled(pipe, config, mask=mask):
            found = pipe(**call).images[0]
            stats = ras.stats(pipe)
        counts = stats.region_counts
        regions = found if counts is None else region_map(found, counts[0])
        return _tensor(found), _tensor(regions), str(stats)


def _tensor(image: Image.Image) -> Tensor:
    """An image as ComfyUI has it, `(1, height, width, 3)` float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)[None]


NODE_CLASS_MAPPINGS = {
    "RASLoadPipeline": LoadPipeline,
    "RASApply": ApplyRAS,
    "RASSample": Sample,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RASLoadPipeline": "Load a diffusers pipeline",
    "RASApply": "Apply RAS",
    "RASSample": "Sample with RAS",
}
