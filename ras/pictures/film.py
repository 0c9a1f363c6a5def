"""Animations of a run: which regions each step computed, over the image that is forming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import writable, written_whole
from ..session import Session
from ..sessions import enabled_session
from ..slots import StepWatch
from ..stats import Stats
from .decoder import Decode, preparation, watched_decoder
from .maps import heat_map, region_map
from .panels import INK, PAPER, shorten
from .strip import bars

SUFFIXES = (".gif", ".webp")
SIDE = 256, 512  # pixels of a frame's longer side, at least and at most
PACE, PAUSE = 150, 1500  # milliseconds of a frame, and of the last
FOOT = 32  # pixels of the strip below an image


@contextmanager
def animated(pipe: Any, file: str | PathLike[str]) -> Iterator[None]:
    """Write an animation of the run that an enabled pipeline makes in a `with` block.

    A frame for each step: the clean image that it predicts, of the first sample, veiled where
    tokens were not computed, over the plan's strip. Of a video it is the frame in the middle.
    Where there is no image to decode (the pipeline returns latents or has no VAE, its scheduler is
    none of flow matching, or it paints the end of the run over, as inpainting does), frames show
    the regions alone. The images are decoded one by one where the pipeline decodes its own, which
    takes that time once more for each step. Of several runs it is the last.

    Args:
        pipe: An enabled pipeline.
        file: What to write, `.gif` or `.webp`; nothing if the block fails.

    Raises:
        TypeError: No pipeline, or no file's name.
        ValueError: A pipeline that is not enabled, another kind of file, or no run in the block.
        OSError: The file cannot be written.
    """
    path = writable(file, SUFFIXES)
    session = enabled_session(pipe)
    if session.origin.pipeline is not pipe:
        raise ValueError(f"pipe must be a pipeline, got the {type(pipe).__name__} of one")
    film, before = _Film(session), session.run
    with film.watching(pipe):
        yield
    if session.run is None or session.run is before:
        raise ValueError("pipe has made no run that could be animated")
    frames = film.frames(session.stats())
    if path.suffix.lower() == ".gif":
        palette = _together(frames).quantize()  # with one for each frame files are twice as large
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [*(PACE for _ in frames[1:]), PAUSE]
    with written_whole(path) as part:
        frames[0].save(part, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _together(frames: list[Image.Image]) -> Image.Image:
    """All frames, smaller, below each other."""
    small = [frame.reduce(4) for frame in frames]
    found = Image.new("RGB", (small[0].width, sum(frame.height for frame in small)))
    for i, frame in enumerate(small):
        found.paste(frame, (0, i * frame.height))
    return found


class _Film:
    """What is seen of a run: the clean image that each step predicts."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._run: Any = None
        self._clean: dict[int, Tensor] = {}  # by step, latents of the first sample
        self._last: Tensor | None = None  # what the run has come to
        self._images: dict[int, Image.Image] = {}

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """See the steps of its scheduler, and images when it decodes its own."""
        watch = StepWatch(pipe.scheduler, self._after_step)
        try:
            with watched_decoder(getattr(pipe, "vae", None), self._decode):
                yield
        finally:
            watch.remove()

    def _after_step(self, noise: Tensor, sample: Any, output: Any) -> None:
        """Note the clean image of a step, which the session has seen before."""
        run, scheduler = self._session.run, self._session.origin.scheduler
        if run is None or scheduler is None or not isinstance(sample, Tensor):
            return
        if run.clock.prediction != "flow":
            return
        if run is not self._run:
            self._run = run
            self._clean.clear()
            self._images.clear()
        stage = max(run.stage - 1, 0)
        if stage % run.clock.order == 0:
            ahead = run.clock.stages[stage] * noise[:1]
            rises = scheduler.config.get("invert_sigmas")  # from noise to the image
            self._clean[stage // run.clock.order] = sample[:1] + (ahead if rises else -ahead)
        self._last = output[0][:1]

    def _decode(self, latents: Tensor, decode: Decode) -> None:
        """Decode the clean images as the pipeline does the latents that the run has come to."""
        if self._last is None or self._images:
            return
        prepare = preparation(self._last, latents, self._run.planned.layout.grid)
        if prepare is not None:
            try:
                found = {step: decode(prepare(clean)) for step, clean in self._clean.items()}
            except RuntimeError:  # no memory for it is no reason to lose the pipeline's image
                return
            self._images = {step: image for step, image in found.items() if image is not None}

    def frames(self, stats: Stats) -> list[Image.Image]:
        """A frame for each step."""
        if stats.walked is None:  # nobody says where the tokens are: the image as a whole
            walked = torch.tensor([kind != "skipped" for kind in stats.steps])[:, None, None]
        else:
            walked = stats.walked[:, 0].cpu()
        shares = walked.flatten(1).float().mean(1).tolist()  # of all frames of a video
        walked = plane(walked)
        return [
            _frame(self._images.get(step), walked[step], shares, step)
            for step in range(len(stats.steps))
        ]


def plane(regions: Tensor) -> Tensor:
    """`(..., rows, columns)` regions; of a video, `(..., frames, rows, columns)`, the middle's."""
    return regions if regions.ndim < 4 else regions[:, regions.shape[1] // 2]


def _frame(
    image: Image.Image | None, walked: Tensor, shares: list[float], step: int
) -> Image.Image:
    """The image of a step, or nothing but its regions, over the strip and a line of text."""
    rows, columns = walked.shape
    width, height = (columns, rows) if image is None else image.size
    longer = max(width, height)
    scale = min(max(longer, SIDE[0]), SIDE[1]) / longer
    size = max(round(scale * width), 1), max(round(scale * height), 1)
    found = heat_map(walked, size) if image is None else region_map(image.resize(size), walked)
    font = ImageFont.load_default(12)
    share = {0.0: "nothing", 1.0: "all tokens"}.get(
        shares[step], f"{shares[step]:.0%} of the tokens"
    )
    told = shorten(f"step {step + 1} of {len(shares)}: {share}", font, size[0] - 8)
    frame = Image.new("RGB", (size[0], size[1] + FOOT + 20), PAPER)
    frame.paste(found, (0, 0))
    frame.paste(bars(shares, size[0], FOOT, step), (0, size[1]))
    ImageDraw.Draw(frame).text((4, size[1] + FOOT + 2), told, INK, font)
    return frame
