"""`ras demo`: a page in the browser that draws a prompt, dense and with RAS."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image, ImageChops

import ras

from ..config import DEFAULT_SPEEDUP
from ..pictures import psnr, region_map
from . import generate
from .loading import Pipeline, load
from .runs import Job, times_computed

PROMPT = "a striped red ring, top left, on a blue background"
FASTEST, MOST_STEPS = 4.0, 100  # of the sliders
PAINT = "#fde725"
TOLD = """\
**Region-adaptive sampling**: the prompt is drawn twice from the same noise, densely and with RAS.
Paint over the dense image, and partial steps compute what is painted and reuse the rest."""


def main(options: argparse.Namespace) -> None:
    """Serve the page on this machine until it is interrupted.

    Raises:
        ValueError: There is no gradio, or no such model.
        OSError: The port is taken.
    """
    try:
        import gradio
    except ImportError:
        raise ValueError(
            "the page needs gradio, which is not installed: pip install 'ras-diffusion[demo]', or "
            "pip install '.[demo]' from a checkout"
        ) from None
    pipe = load(options, ras.bundled_model())
    call = {} if options.model else dict(generate.BUNDLED_CALL)
    page(pipe, options.device, call).launch(
        server_name="127.0.0.1",
        server_port=options.port,
        theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),  # from nowhere
        footer_links=[],
    )


def page(pipe: Pipeline, device: torch.device, call: dict[str, Any]) -> Any:
    """The page as a `gradio.Blocks`, for a pipeline that is called with `call` besides a prompt."""
    import gradio as gr

    def draw(
        prompt: str, speedup: float, steps: int, seed: int | None, painted: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        mask = painted_mask(painted)
        try:
            if not prompt.strip():
                raise ValueError("the prompt must not be empty")
            config = ras.RASConfig(speedup)
            asked = {**call, "prompt": prompt}
            job = Job(pipe, device, asked, steps, seed or 0, config, mask)
            job.warm_up()
            sparse, dense = job.run_ras("RAS", job.steps), job.run("dense", job.steps)
        except (ValueError, TypeError, RuntimeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        stats = sparse.stats
        decibels = psnr(dense.image, sparse.image)
        lines = [
            f"{stats.steps_dense} steps dense, {stats.steps_sparse} partial, "
            f"{stats.steps_skipped} skipped: {stats.speedup_ceiling:.2f}x fewer tokens",
            f"{dense.seconds:.2f} s dense, {sparse.seconds:.2f} s with RAS, after a warm-up",
            f"PSNR to the dense image {decibels:.1f} dB",
            *stats.warnings,
        ]
        to_paint_on = dense.image if mask is None else gr.skip()
        regions = region_map(sparse.image, times_computed(stats)[0])
        return dense.image, sparse.image, regions, "\n\n".join(lines), to_paint_on

    with gr.Blocks(title="ras", analytics_enabled=False) as found:
        gr.Markdown(TOLD)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(PROMPT, label="Prompt")
                speedup = gr.Slider(1, FASTEST, DEFAULT_SPEEDUP, step=0.25, label="Speed-up")
                steps = gr.Slider(1, MOST_STEPS, 28, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                button = gr.Button("Draw", variant="primary")
                figures = gr.Markdown()
            mask = gr.ImageEditor(
                label="Mask",
                type="pil",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=32, colors=[PAINT], color_mode="fixed"),
            )
        with gr.Row():
            dense = gr.Image(label="Dense", format="png", interactive=False)
            sparse = gr.Image(label="RAS", format="png", interactive=False)
            regions = gr.Image(
                label="Regions: the clearer, the more often", format="png", interactive=False
            )
        given, shown = [prompt, speedup, steps, seed, mask], [dense, sparse, regions, figures, mask]
        button.click(draw, given, shown, api_name="draw")
    return found


def painted_mask(painted: dict[str, Any] | None) -> Image.Image | None:
    """What the brush has painted, white on black; None where that is nothing."""
    found = None
    for layer in (painted or {}).get("layers", ()):
        alpha = layer.getchannel("A").point(lambda level: 255 if level > 0 else 0)
        found = alpha if found is None else ImageChops.lighter(found, alpha)
    return found if found is not None and found.getbbox() else None
