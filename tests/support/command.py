"""`ras generate` on a small pipeline, and the same by hand."""

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

import ras
from ras import cli
from support import pipelines

PROMPT = "a ring"  # short enough for the small model's tokenizers
SIZE = (128, 96)  # width and height, so that exchanging them shows
HALF = dict(speedup=2)
PLAN = ras.Plan((1, 1, 0.25, 0, 1, 0), (0, 0, 0.5, 0.5, 0, 1), "for six steps")


def generate(folder, out, *options):
    """`ras generate` on the small model; for seconds' sake few steps, half of them skipped."""
    size = ("--width", str(SIZE[0]), "--height", str(SIZE[1]))
    asked = {"--speedup", "--plan", "--sample-ratio"} & {*options}
    half = () if asked else ("--speedup", "2")
    given = ("--model", str(folder), "--out", str(out), "--steps", "6", *half, *size, *options)
    return cli.main(["generate", PROMPT, *given])


def error_line(capsys):
    """The one line that a refused command prints."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ras: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def pixels(image):
    return np.asarray(image.convert("RGB"))


def by_hand(folder, settings=None, seed=0, steps=6, **call):
    """What the interface gives for the same image: it and, with settings, the statistics."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe = pipelines.quiet(pipe)
    if settings is not None:
        ras.enable(pipe, **settings)
    generator = torch.Generator().manual_seed(seed)
    call = {"width": SIZE[0], "height": SIZE[1], **call}
    image = pipe(PROMPT, num_inference_steps=steps, generator=generator, **call).images[0]
    return image, None if settings is None else ras.stats(pipe)
