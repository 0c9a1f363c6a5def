"""The caches of diffusers and of cache-dit, as settings for the ruler.

* diffusers' caches. Not all transformers have `enable_cache`, and not all pipelines open a cache
  context (FirstBlockCache, TaylorSeer: "No cache context is set"), so that each works on a copy of
  the transformer that has the one and opens the other. SD3's last block returns None as its text,
  on which FirstBlockCache ("unsupported operand type(s) for -: 'NoneType' and 'Tensor'") and
  TaylorSeer ("'NoneType' object has no attribute 'dtype'") fail, and for which SeaCache keeps
  nothing; in the copy it returns the text that came in. Lumina's block is not in diffusers'
  registry: it is put there. TaylorSeer predicts the transformer's output, as its lite mode does
  where that is `proj_out`: its default, which predicts attention alone, saves a quarter at most,
  as PyramidAttentionBroadcast and, beside half of the guidance, FasterCache do; these two are for
  SD3 alone. TextKVCache is left out: it looks for blocks of NucleusMoE, and does nothing here.
* cache-dit's DBCache, with and without its TaylorSeer calibrator and with its predefined masks of
  steps, on a copy too, since it patches the class of a pipeline. Left out if not installed.

Those that go by a threshold decide once for a whole batch, guidance copies included.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LuminaNextDiT2DModel,
    SD3Transformer2DModel,
)
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models import CacheMixin
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from diffusers.utils import logging
from torch import Tensor

from .setting import STEPS, Calibrate, Setting


@dataclass(frozen=True)
class Form:
    """What the caches have to be told of a transformer's class.

    Attributes:
        blocks: Its lists of blocks.
        pattern: What cache-dit calls the form of a block: 1 takes hidden states and text, and
            returns text and hidden states. None where it cannot be put on: it has none for
            Lumina's block, and DiT's transformer reads a layer of a block that it hides.
        output: The layer whose output is the transformer's, by name.
    """

    blocks: tuple[str, ...]
    pattern: int | None
    output: str = "proj_out"


FORMS: dict[type, Form] = {
    SD3Transformer2DModel: Form(("transformer_blocks",), 1),
    FluxTransformer2DModel: Form(("transformer_blocks", "single_transformer_blocks"), 1),
    DiTTransformer2DModel: Form(("transformer_blocks",), None, "proj_out_2"),
    LuminaNextDiT2DModel: Form(("layers",), None, "norm_out"),
}
ALONE = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=None
)


class Cached(CacheMixin):
    """What diffusers' caches ask of a model and of its pipeline; mixed into the model's class."""

    scheduler: Any

    @property
    def sigma(self) -> float:
        """The noise level of the step, from 1 to 0."""
        return float(self.scheduler.sigmas[self.scheduler.step_index or 0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.cache_context(
            "cond_uncond",
            step_index=self.scheduler.step_index or 0,
            num_inference_steps=len(self.scheduler.timesteps),
            sigma=self.sigma,
        ):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def copied(pipe: DiffusionPipeline) -> Iterator[Any]:
    """Give the pipeline a copy of its transformer, with the same weights in memory.

    What a library puts on the copy, and may leave behind, goes with it.
    """
    original = pipe.transformer
    weights = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    transformer = copy.deepcopy(original, weights)
    kind = type(original)
    transformer.__class__ = type(f"Cached{kind.__name__}", (Cached, kind), {})
    transformer.scheduler = pipe.scheduler
    if kind is SD3Transformer2DModel:
        last = transformer.transformer_blocks[-1]
        last.forward = _returning_text(last.forward)
    pipe.transformer = transformer
    try:
        yield transformer
    finally:
        pipe.transformer = original


def _returning_text(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The last block's forward, with the text that came in instead of None, which nobody reads."""

    @functools.wraps(forward)
    def wrapped(
        hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, forward(
            hidden_states, encoder_hidden_states, *args, **kwargs
        )[1]

    return wrapped


# --- diffusers ----------------------------------------------------------------------------------


def diffusers_settings(pipe: DiffusionPipeline, calibrate: Calibrate) -> list[Setting]:
    """Those that decide by the step serve every class here; the others, which have to be told of
    attention or guidance, are set up for SD3."""
    TransformerBlockRegistry.register(LuminaNextDiTBlock, ALONE)
    ratios = functools.cache(partial(mag_ratios, calibrate))
    found: list[Setting] = []

    def add(method: str, label: str, config: Callable[..., Any], **options: Any) -> None:
        switch = partial(cached, config=partial(config, **options))
        found.append(Setting(method, label, STEPS, switch))

    for threshold in (0.07, 0.1, 0.15, 0.2, 0.4):
        add("FirstBlockCache", f"threshold {threshold:g}", first_block, threshold=threshold)
    for interval, until in ((2, 12), (2, 20), (2, STEPS), (3, STEPS), (4, STEPS), (6, STEPS)):
        label = f"interval {interval}" + (f" up to step {until}" if until < STEPS else "")
        add("TaylorSeer", label, taylor_seer, interval=interval, until=until)
    for threshold, row in ((0.02, 3), (0.06, 3), (0.12, 3), (0.24, 4), (0.5, 6)):
        label = f"threshold {threshold:g}, {row} in a row"
        add("MagCache", label, mag, threshold=threshold, row=row, ratios=ratios)
    for threshold, row in ((0.1, 2), (0.15, 2), (0.2, 2), (0.25, 2), (0.5, 2), (1.0, 3)):
        label = f"threshold {threshold:g}, {row} in a row"
        add("SeaCache", label, sea, threshold=threshold, row=row)
    if not isinstance(pipe.transformer, SD3Transformer2DModel):
        return found
    for interval, below in ((2, 800), (2, 1001), (3, 1001), (4, 1001)):
        label = f"interval {interval} from timestep {below}"
        add("PyramidAttentionBroadcast", label, pyramid, interval=interval, below=below)
    for interval, below in ((2, 641), (2, 901), (5, 901), (5, 1001)):
        label = f"interval {interval} from timestep {below}"
        add("FasterCache", label, faster, interval=interval, below=below)
    return found


@contextmanager
def cached(pipe: DiffusionPipeline, config: Callable[[DiffusionPipeline], Any]) -> Iterator[None]:
    """One of diffusers' caches, by the configuration made for this pipeline."""
    made = config(pipe)
    with copied(pipe) as transformer:
        transformer.enable_cache(made)
        yield


def first_block(pipe: DiffusionPipeline, threshold: float) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=threshold)


def taylor_seer(pipe: DiffusionPipeline, interval: int, until: int) -> TaylorSeerCacheConfig:
    form = FORMS[_class_of(pipe)]
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_after_step=until,
        taylor_factors_dtype=pipe.transformer.dtype,
        skip_predict_identifiers=[rf"{name}\.\d+" for name in form.blocks],
        cache_identifiers=[form.output],
    )


def _class_of(pipe: DiffusionPipeline) -> type:
    return next(kind for kind in FORMS if isinstance(pipe.transformer, kind))


def mag(
    pipe: DiffusionPipeline,
    threshold: float,
    row: int,
    ratios: Callable[[DiffusionPipeline], list[float]],
) -> MagCacheConfig:
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=row,
        num_inference_steps=STEPS,
        mag_ratios=ratios(pipe),
    )


def mag_ratios(calibrate: Calibrate, pipe: DiffusionPipeline) -> list[float]:
    """What MagCache has to know of a model: what its calibration prints, a ratio per step."""
    config = MagCacheConfig(num_inference_steps=STEPS, calibrate=True)
    printed = io.StringIO()
    with cached(pipe, lambda pipe: config), contextlib.redirect_stdout(printed):
        calibrate(pipe)
    return json.loads(printed.getvalue().strip().splitlines()[-1])


def sea(pipe: DiffusionPipeline, threshold: float, row: int) -> SeaCacheConfig:
    def latents(module: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The whole batch as the channels of one image, (B * C, 1, H, W): it filters each alone."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim == 3:  # FLUX's tokens, (B, N, C), before those of a reference
            side = math.isqrt(int((kwargs["img_ids"][:, 0] == 0).sum()))
            hidden = hidden[:, : side * side].mT.unflatten(2, (side, side))
        return [hidden.flatten(0, 1)[:, None]]

    return SeaCacheConfig(
        threshold=threshold, max_consecutive_cached=row, raw_vision_callback=latents
    )


def pyramid(pipe: DiffusionPipeline, interval: int, below: int) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(100 if below < 1000 else -1, below),
        current_timestep_callback=lambda: 1000 * pipe.transformer.sigma,
    )


def faster(pipe: DiffusionPipeline, interval: int, below: int) -> FasterCacheConfig:
    # It says at each use that it is experimental.
    logging.get_logger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, below),
        unconditional_batch_skip_range=interval,
        unconditional_batch_timestep_skip_range=(-1, below),
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: 1000 * pipe.transformer.sigma,
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
        ],
    )


# --- cache-dit ----------------------------------------------------------------------------------


def cache_dit() -> ModuleType | None:
    """The library, if it is installed."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it talks on standard output
    try:
        import cache_dit
    except ImportError:
        return None
    return cache_dit


def takes_cache_dit(pipe: DiffusionPipeline) -> bool:
    """Whether it has a pattern for the blocks of this model."""
    return FORMS[_class_of(pipe)].pattern is not None


def cache_dit_settings(pipe: DiffusionPipeline) -> list[Setting]:
    library = cache_dit()
    if library is None or not takes_cache_dit(pipe):
        return []
    found = []
    for threshold in (0.06, 0.08, 0.12, 0.16, 0.24):
        options = dict(residual_diff_threshold=threshold)
        found.append(("DBCache", f"threshold {threshold:g}", 0, options))
    for threshold, row in ((0.06, 1), (0.08, 1), (0.12, 1), (0.12, 2), (0.2, 2), (0.6, 3)):
        options = dict(residual_diff_threshold=threshold, max_continuous_cached_steps=row)
        label = f"threshold {threshold:g}, {row} in a row"
        found.append(("DBCache + TaylorSeer", label, 1, options))
    for policy in ("slow", "medium", "fast", "ultra"):
        mask = library.steps_mask(mask_policy=policy, total_steps=STEPS)
        options = dict(residual_diff_threshold=0.2, steps_computation_mask=mask)
        found.append(("DBCache + TaylorSeer, masks", policy, 1, options))
    return [
        Setting(method, label, STEPS, partial(db_cache, order=order, **options))
        for method, label, order, options in found
    ]


@contextmanager
def db_cache(pipe: DiffusionPipeline, order: int, **options: Any) -> Iterator[None]:
    """DBCache with one block to decide by, and a Taylor series of an order (0: residuals kept)."""
    library = cache_dit()
    assert library is not None
    config = library.DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=4,
        enable_separate_cfg=False,
        num_inference_steps=STEPS,
        **options,
    )
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    with copied(pipe) as transformer:
        form = FORMS[_class_of(pipe)]
        pattern = getattr(library.ForwardPattern, f"Pattern_{form.pattern}")
        adapter = library.BlockAdapter(
            transformer=transformer,
            blocks=[getattr(transformer, name) for name in form.blocks],
            forward_pattern=[pattern] * len(form.blocks),
        )
        library.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        # Without a pipeline it would notice a new run a step late. Pipelines call this as they end.
        transformer._reset_stateful_cache = partial(
            library.refresh_context,
            transformer,
            cache_config=config,
            calibrator_config=calibrator,
        )
        try:
            yield
        finally:
            library.disable_cache(adapter)
