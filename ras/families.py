"""What is known of model families, as data, in one table.

Every transformer can be run by plans of dense and skipped steps. Partial steps need to know where
tokens come in, attend and go out: a record of these below.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

import ras_kernels

from .layout import Layout
from .processors import LuminaAttnProcessor, SD3AttnProcessor
from .site import RASAttnProcessor

PATCHES = "b c (h p) (w q) -> b (h w) (p q c)"  # of an image; pixels outside, channels inside


@dataclass(frozen=True)
class Family:
    """One transformer class.

    `inputs` are the arguments of `forward`, by name.

    Attributes:
        model: The transformer's class, by name, so that nothing is imported before it is met.
        pipelines: What diffusers calls it from and the tests run, classes without "Pipeline".
        blocks: The lists of blocks that repeat.
        attention: Patterns of the layers whose keys and values are kept; () for whole steps alone.
        processor: What takes the place of these layers' processors.
        enter: The submodule whose output is the embedded tokens.
        entered: The elements of that output that have a row per token; None is the output itself.
        leave: The submodule whose output is the tokens' noise.
        residuals: An input that is a list of what is added to the tokens, row by row.
        text: The input that is the text tokens in the same attention.
        whole: An input whose calls compute all tokens, since they leave out layers.
        usual_text: The text tokens of a pipeline's call with its default arguments.
        rotary: What cached keys were rotated by, to be compared; on the CPU.
        references: Whether some pipelines have tokens that only condition.
        skips: Whether steps can be skipped.
        note: What the support table says besides.
    """

    model: str
    pipelines: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    processor: type[RASAttnProcessor] | None = None
    enter: str = ""
    entered: tuple[int | None, ...] = (None,)
    leave: str = ""
    residuals: str | None = None
    text: str | None = None
    whole: str | None = None
    usual_text: Callable[[Any], int] = lambda pipe: 0
    rotary: Callable[[Mapping[str, Any]], Any] = lambda inputs: None
    references: bool = False
    skips: bool = True
    note: str = ""

    @property
    def regions(self) -> bool:
        """Whether there can be partial steps."""
        return bool(self.attention)

    def attention_layers(self, transformer: Any) -> Iterator[Any]:
        """The layers whose keys and values are kept, in the order of the model."""
        for name, module in transformer.named_modules():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.attention):
                yield module

    def layout(self, transformer: Any, inputs: Mapping[str, Any]) -> Layout:
        """The layout of a call's tokens. Raises ValueError if patches do not divide the latents."""
        if not self.regions:
            return Layout()
        patch, (height, width) = transformer.config.patch_size, inputs["hidden_states"].shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"the latents' height and width, {height}x{width}, must be multiples of the "
                f"transformer's patch size {patch}"
            )
        text = 0 if self.text is None else inputs[self.text].shape[1]
        return Layout((height // patch, width // patch), text)

    def pixels(self, transformer: Any) -> int:
        """Pixels of the noise in a token."""
        return transformer.config.patch_size**2

    def pack(self, noise: Tensor, transformer: Any) -> Tensor:
        """The tokens, `(B, N, C)`, of a noise as the scheduler gets it."""
        patch = transformer.config.patch_size
        return rearrange(noise, PATCHES, p=patch, q=patch)

    def unpack(self, tokens: Tensor, transformer: Any, grid: tuple[int, ...]) -> Tensor:
        """The noise, as the transformer returns it, that its tokens are."""
        patch, (height, width) = transformer.config.patch_size, grid
        there, here = PATCHES.split(" -> ")
        return rearrange(tokens, f"{here} -> {there}", p=patch, q=patch, h=height, w=width)

    def gather_entered(self, output: Any, rows: Tensor) -> Any:
        """The active rows of what `enter` returned."""
        if self.entered == (None,):
            return _gather(output, rows)
        return tuple(
            _gather(part, rows) if index in self.entered else part
            for index, part in enumerate(output)
        )

    def gather_inputs(
        self, inputs: Mapping[str, Any], rows: Tensor, *, reuse_text: bool
    ) -> dict[str, Any]:
        """Those inputs that have a row per token, with the rows alone that walk."""
        gathered: dict[str, Any] = {}
        residuals = None if self.residuals is None else inputs.get(self.residuals)
        if self.residuals is not None and residuals is not None:
            gathered[self.residuals] = [_gather(residual, rows) for residual in residuals]
        if self.text is not None and reuse_text:
            gathered[self.text] = inputs[self.text][:, :0]
        return gathered


def family_of(transformer: object) -> Family:
    """The record of a transformer, one of whole steps alone if there is none."""
    names = [base.__name__ for base in type(transformer).__mro__]
    found = (family for name in names for family in FAMILIES if family.model == name)
    return next(found, Family(type(transformer).__name__))


def support() -> list[dict[str, str]]:
    """The support table, a row for each record.

    Dense steps are exact wherever there are any, and so is a run at a speed-up of 1.
    """
    return [
        {
            "transformer": family.model,
            "pipelines": ", ".join(family.pipelines),
            "skipped steps": "yes" if family.skips else "no",
            "partial steps": "yes" if family.regions else "no",
            "references": "computed" if family.references else "–",
            "masks": "yes" if family.regions else "no",
            "result": "approximate" if family.skips else "exact",
            "tested": "every token's noise" if family.regions else "every call's output",
            "note": family.note,
        }
        for family in FAMILIES
    ]


def _gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows of `(B, N, ...)`, or of `(1, N, ...)`, which are the same for all samples."""
    return ras_kernels.gather_tokens(tokens.expand(len(rows), *tokens.shape[1:]), rows)


def _sd3_text(pipe: Any) -> int:
    t5_tokens = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return pipe.tokenizer_max_length + t5_tokens


def _lumina_rotary(inputs: Mapping[str, Any]) -> Any:
    """The table's last entry, which tells the two tables of a run apart (`scaling_watershed`).

    The pipeline makes them on the CPU, so that nothing waits for the GPU here.
    """
    return tuple(inputs["image_rotary_emb"][-1, -1].tolist())


FAMILIES = (
    Family(
        "SD3Transformer2DModel",
        ("StableDiffusion3",),
        blocks=("transformer_blocks",),
        attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        processor=SD3AttnProcessor,
        enter="pos_embed",
        leave="proj_out",
        residuals="block_controlnet_hidden_states",
        text="encoder_hidden_states",
        whole="skip_layers",
        usual_text=_sd3_text,
    ),
    Family(
        "LuminaNextDiT2DModel",
        ("Lumina",),
        blocks=("layers",),
        attention=("layers.*.attn1",),
        processor=LuminaAttnProcessor,
        enter="patch_embedder",
        entered=(0, 3),
        leave="norm_out",
        rotary=_lumina_rotary,
    ),
    Family("AceStepTransformer1DModel", ("AceStep",)),
    Family("AllegroTransformer3DModel", ("Allegro",)),
    Family("AnyFlowTransformer3DModel", ("AnyFlow",)),
    Family("AuraFlowTransformer2DModel", ("AuraFlow",)),
    Family("BriaTransformer2DModel", ("Bria",)),
    Family("ChromaTransformer2DModel", ("Chroma",)),
    Family("CogVideoXTransformer3DModel", ("CogVideoX",)),
    Family("CogView3PlusTransformer2DModel", ("CogView3Plus",)),
    Family("CogView4Transformer2DModel", ("CogView4",)),
    Family("CosmosTransformer3DModel", ("Cosmos2TextToImage", "CosmosTextToWorld")),
    Family("DiTTransformer2DModel", ("DiT",)),
    Family("EasyAnimateTransformer3DModel", ("EasyAnimate",)),
    Family("ErnieImageTransformer2DModel", ("ErnieImage",)),
    Family(
        "FluxTransformer2DModel",
        ("Flux", "FluxControl", "FluxFill", "FluxImg2Img", "FluxKontext", "FluxModular"),
        references=True,
    ),
    Family(
        "Flux2Transformer2DModel",
        ("Flux2", "Flux2Klein", "Flux2KleinKV"),
        references=True,
        note="KleinKV: the step that fills the model's own cache is computed",
    ),
    Family("GlmImageTransformer2DModel", ("GlmImage",), note="calls before the loop are computed"),
    Family("HeliosTransformer3DModel", ("Helios",), note="a plan for each chunk"),
    Family("HiDreamImageTransformer2DModel", ("HiDreamImage",)),
    Family("HunyuanDiT2DModel", ("HunyuanDiT",)),
    Family("HunyuanImageTransformer2DModel", ("HunyuanImage",)),
    Family("HunyuanVideo15Transformer3DModel", ("HunyuanVideo15",)),
    Family("HunyuanVideoTransformer3DModel", ("HunyuanVideo",)),
    Family("Ideogram4Transformer2DModel", ("Ideogram4",), note="two transformers"),
    Family("Kandinsky5Transformer3DModel", ("Kandinsky5T2V",)),
    Family("Krea2Transformer2DModel", ("Krea2",)),
    Family("LTX2VideoTransformer3DModel", ("LTX2",), note="video and audio"),
    Family("LTXVideoTransformer3DModel", ("LTX", "LTXImageToVideo")),
    Family("LatteTransformer3DModel", ("Latte",)),
    Family("LongCatAudioDiTTransformer", ("LongCatAudioDiT",)),
    Family("LongCatImageTransformer2DModel", ("LongCatImage",)),
    Family("Lumina2Transformer2DModel", ("Lumina2",)),
    Family("MochiTransformer3DModel", ("Mochi",)),
    Family("MotifVideoTransformer3DModel", ("MotifVideo",)),
    Family("NucleusMoEImageTransformer2DModel", ("NucleusMoEImage",)),
    Family("OmniGenTransformer2DModel", ("OmniGen",)),
    Family("OvisImageTransformer2DModel", ("OvisImage",)),
    Family("PRXTransformer2DModel", ("PRX",)),
    Family("PixArtTransformer2DModel", ("PixArtAlpha", "PixArtSigma")),
    Family(
        "QwenImage21Transformer2DModel",
        ("QwenImage21",),
        note="the step that fills the model's own cache is computed",
    ),
    Family(
        "QwenImageTransformer2DModel",
        ("QwenImage", "QwenImageEdit", "QwenImageEditPlus"),
        references=True,
    ),
    Family("SanaTransformer2DModel", ("Sana", "SanaSprint")),
    Family("SanaVideoTransformer3DModel", ("SanaVideo",)),
    Family("SkyReelsV2Transformer3DModel", ("SkyReelsV2",)),
    Family(
        "SkyReelsV2Transformer3DModel",
        ("SkyReelsV2DiffusionForcing",),
        skips=False,
        note="steps a copy of its scheduler for each frame: dense, with a warning",
    ),
    Family("StableAudio3DiTModel", ("StableAudio3",)),
    Family("StableAudioDiTModel", ("StableAudio",)),
    Family("WanTransformer3DModel", ("Wan", "WanImageToVideo"), note="one or two transformers"),
    Family("ZImageTransformer2DModel", ("ZImage",)),
)
