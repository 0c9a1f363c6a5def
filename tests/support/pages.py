"""Examples, of the documentation and others, and tiny pipelines for the models that they name."""

import inspect
import re
import shlex
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from PIL import Image

from support.zoo import ENTRIES
from support.zoo.parts import SIDE, picture, pil

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
STAND_INS = {  # entries of the zoo, one for each pipeline that a page loads of a model
    "black-forest-labs/FLUX.1-dev": ["flux", "flux-inpaint", "flux-img2img"],
    "black-forest-labs/FLUX.1-Kontext-dev": ["flux-kontext"],
    "black-forest-labs/FLUX.1-Fill-dev": ["flux-fill"],
    "Qwen/Qwen-Image": ["qwen"],
    "Qwen/Qwen-Image-Edit": ["qwen-edit"],
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ["wan"],
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ["wan22"],
    "stabilityai/stable-diffusion-3.5-medium": ["sd3", "sd3-inpaint"],
    "Alpha-VLLM/Lumina-Next-SFT-diffusers": ["lumina"],
}


def examples(page):
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


def outputs(page):
    """What they print, where the page shows it."""
    return re.findall(r"^```text\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page):
    """Our commands on a page, lines of shell and those named in the text: module and options."""
    shell, text = [], ""
    for i, part in enumerate(re.split(r"^```", page.read_text(), flags=re.M)):
        language, _, block = part.partition("\n")
        shell += block.splitlines() if i % 2 and language in ("", "sh") else []
        text += "" if i % 2 else part
    named = [span.replace("\n", " ") for span in re.findall(r"`(python -m [^`]+)`", text)]
    ours = re.compile(r"(?:\S*/)?(?:python -m (benchmarks\S*)|ras(?= ))(.*)")
    single = [each for line in [*shell, *named] for each in line.split(" && ")]
    found = [match for match in map(ours.fullmatch, single) if match]
    return [(match[1] or "ras.cli", shlex.split(match[2])) for match in found]


def stand_in(cls, model):
    """A tiny pipeline of the class that takes what the real one takes, and draws what it likes."""
    built = [ENTRIES[name].build() for name in STAND_INS[model]]
    pipe, draw = next((pipe, draw) for pipe, draw in built if isinstance(pipe, cls))
    kind = type(pipe)
    taken = inspect.signature(kind.__call__)

    def __call__(self, *args, **call):
        given = taken.bind(self, *args, **call)
        given.apply_defaults()
        prompt, more = given.arguments.get("prompt"), {}
        if isinstance(prompt, list):
            more["num_images_per_prompt"] = len(prompt)
        if (
            kind is diffusers.FluxKontextPipeline
        ):  # of the image's shape, without which it is no edit
            more["image"] = picture(SIDE, SIDE)
        on = partial(kind.__call__, self)
        latents = draw(given.arguments["num_inference_steps"], on=on, **more)
        if not given.arguments["return_dict"]:
            return (latents,)
        return SimpleNamespace(images=[pil()], frames=[[pil()] * 9])

    at_home = {  # on a machine without a GPU
        "to": lambda self, *_, **__: self,
        "enable_model_cpu_offload": lambda self, **_: kind.enable_model_cpu_offload(
            self, device="cpu"
        ),
    }
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": __call__, **at_home})
    return pipe


def put_stand_ins(monkeypatch, folder):
    """Have `from_pretrained` give tiny pipelines, in a folder with pictures to read."""
    real, compiled = diffusers.DiffusionPipeline.from_pretrained.__func__, torch.compile

    def from_pretrained(cls, model, **options):
        if Path(model).is_dir():
            return real(cls, model, **options)
        assert options.keys() <= {"torch_dtype"}
        return stand_in(cls, model)

    @wraps(compiled)
    def compile_nothing(*args, **options):  # which would take long, and has tests of its own
        return inspect.signature(compiled).bind(*args, **options).arguments["model"]

    monkeypatch.chdir(folder)
    pil().resize((96, 96)).save("photo.png")
    mask = Image.new("L", (96, 96))
    mask.paste(255, (0, 0, 32, 32))
    mask.save("mask.png")
    Path("prompts.txt").write_text("a lighthouse\na ship\n")
    patched = classmethod(from_pretrained)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", patched)
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps=10: path)
    monkeypatch.setattr(torch, "compile", compile_nothing)
