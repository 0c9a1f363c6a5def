"""Transformers that have dense and skipped steps, and what keeps partial ones from them."""

from __future__ import annotations

from ..family import Family

RECORDS: tuple[Family, ...] = (
    Family("AceStepTransformer1DModel", ("AceStep",)),
    Family("AllegroTransformer3DModel", ("Allegro",), note="positions inside a tuple of tables"),
    Family("AnyFlowTransformer3DModel", ("AnyFlow",), note="tokens are third in its rotary table"),
    Family("ErnieImageTransformer2DModel", ("ErnieImage",), note="tokens come before samples"),
    Family("HeliosTransformer3DModel", ("Helios",), note="a plan for each chunk"),
    Family("HunyuanDiT2DModel", ("HunyuanDiT",), note="cross-attention rotates too"),
    Family("HunyuanVideo15Transformer3DModel", ("HunyuanVideo15",), note="a square mask per layer"),
    Family("Ideogram4Transformer2DModel", ("Ideogram4",), note="two transformers, text put out"),
    Family("Kandinsky5Transformer3DModel", ("Kandinsky5T2V",), note="blocks give a grid back"),
    Family("LTX2VideoTransformer3DModel", ("LTX2",), note="video and sound attend to each other"),
    Family("LatteTransformer3DModel", ("Latte",), note="attends along space and time by turns"),
    Family("LongCatAudioDiTTransformer", ("LongCatAudioDiT",)),
    Family("MochiTransformer3DModel", ("Mochi",), note="attends sample by sample"),
    Family("MotifVideoTransformer3DModel", ("MotifVideo",), note="its decoder has tokens twice"),
    Family("NucleusMoEImageTransformer2DModel", ("NucleusMoEImage",), note="experts choose tokens"),
    Family("OmniGenTransformer2DModel", ("OmniGen",), note="counts positions of tokens that walk"),
    Family("PRXTransformer2DModel", ("PRX",), note="text has no queries"),
    Family(
        "QwenImage21Transformer2DModel",
        ("QwenImage21",),
        note="the step that fills the model's own cache is computed",
    ),
    Family("SanaTransformer2DModel", ("Sana", "SanaSprint"), note="linear attention mixes tokens"),
    Family("SanaVideoTransformer3DModel", ("SanaVideo",), note="linear attention mixes tokens"),
    Family(
        "SkyReelsV2Transformer3DModel",
        ("SkyReelsV2DiffusionForcing",),
        skips=False,
        note="steps a copy of its scheduler for each frame: dense, with a warning",
    ),
    Family("StableAudio3DiTModel", ("StableAudio3",)),
    Family("StableAudioDiTModel", ("StableAudio",)),
)
