"""What a record of a model family holds: where its tokens come in, attend and go out."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from .checks import check_count, check_kind, check_mapping
from .layout import Layout, Rows
from .site import RASAttnProcessor

Inputs = Mapping[str, Any]
"""The arguments of a transformer's `forward`, by name."""

PACKED = "b n c -> b n c"
IMAGES = "b (h w) (p q c) -> b c (h p) (w q)"
IMAGES_BY_CHANNEL = "b (h w) (c p q) -> b c (h p) (w q)"
VIDEOS = "b (f h w) (t p q c) -> b c (f t) (h p) (w q)"
VIDEOS_BY_CHANNEL = "b (f h w) (c t p q) -> b c (f t) (h p) (w q)"

BOTH_LISTS = {
    "transformer_blocks.*.attn": Rows.JOINT,
    "single_transformer_blocks.*.attn": Rows.JOINT,
}
"""Attention of FLUX's blocks of two streams and of one."""


@dataclass(frozen=True)
class Family:
    """One transformer class.

    Where tokens enter is told as in diffusers' `_cp_plan`, by module and by argument or output.
    A pattern matches the names of modules level by level, `*` within one.

    Attributes:
        model: The transformer's class, by name, so that nothing is imported before it is met.
        pipelines: What diffusers calls it from and the tests run, classes without "Pipeline".
        blocks: The lists of blocks that repeat, where diffusers does not say.
        attention: Patterns of the layers whose keys and values are kept, and whose these are: the
            image's tokens' (IMAGE) or also the text's (JOINT). {} for whole steps alone.
        enter: What has a row per token: by pattern ("" is the transformer), arguments by name and
            outputs by index (None is the output itself). Of lists and dictionaries, all tensors.
        leave: The layer whose output is the tokens' noise.
        leaves: Whether the text's rows are in it.
        image_first: Whether the image comes before the text in joint attention.
        latents: The argument that is the latents.
        lists: Whether latents and output are lists of a tensor for each sample.
        layout: The layout of a call's tokens; one without a grid has no partial steps.
        output: How the tokens' noise lies in the transformer's output, for einops.
        patch: Frames, height and width of a token, in the output.
        packed: Height and width of a token that pipelines pack, its channels outside.
        text: Arguments with a row per text token, and that dimension, where text may stay behind.
        processor: What takes the place of the layers' processors, instead of the seam.
        obstacle: Why there can be no partial steps in a call, or None.
        whole: An input whose calls compute all tokens, since they leave out layers.
        usual_text: The text tokens of a pipeline's call with its default arguments.
        lengths: What of a layout is told by values, which calls of one shape may not share.
        rotary: What cached keys were rotated by, to be compared; on the CPU.
        references: Whether some pipelines have tokens that only condition.
        parallel: Whether there are partial steps in context parallelism: `enter` has the text's
            rows, too, and attention hands on the `parallel_config`.
        skips: Whether steps can be skipped.
        tested: How partial steps are, if whole runs are not held against the tests' oracle.
        note: What the support table says besides.

    Raises:
        TypeError: A field of another kind.
        ValueError: An empty name of a class, a token of no pixels, or `parallel` with the text in
            what leaves.
    """

    model: str
    pipelines: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    attention: Mapping[str, Rows] = field(default_factory=dict)
    enter: Mapping[str, Mapping[str | int | None, Rows]] = field(default_factory=dict)
    leave: str = ""
    leaves: Rows = Rows.IMAGE
    image_first: bool = False
    latents: str = "hidden_states"
    lists: bool = False
    layout: Callable[[Any, Inputs], Layout] = lambda transformer, inputs: Layout()
    output: str = PACKED
    patch: Callable[[Any], tuple[int, int, int]] = lambda transformer: patch_of(transformer)
    packed: int = 1
    text: Mapping[str, int] = field(default_factory=dict)
    processor: type[RASAttnProcessor] | None = None
    obstacle: Callable[[Any, Inputs], str | None] = lambda transformer, inputs: None
    whole: str | None = None
    usual_text: Callable[[Any], int] = lambda pipe: _default(pipe, "max_sequence_length") or 0
    lengths: Callable[[Inputs], Any] = lambda inputs: None
    rotary: Callable[[Inputs], Any] = lambda inputs: None
    references: bool = False
    parallel: bool = False
    skips: bool = True
    tested: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "leave", "latents", "output", "tested", "note"):
            check_kind(name, getattr(self, name), str, "text")
        if not self.model:
            raise ValueError("model must be the name of a transformer's class, got ''")
        for name in ("image_first", "lists", "references", "parallel", "skips"):
            check_kind(name, getattr(self, name), bool, "True or False")
        for name in ("layout", "patch", "obstacle", "usual_text", "lengths", "rotary"):
            check_kind(name, getattr(self, name), Callable, "a function")
        for name in ("pipelines", "blocks"):
            names = getattr(self, name)
            check_kind(name, names, list | tuple, "a tuple of names")
            object.__setattr__(self, name, tuple(names))
            for each in names:
                check_kind(name, each, str, "a tuple of names")
        check_mapping("attention", self.attention, str, Rows, "patterns, and whose rows: ras.Rows")
        spots = "patterns, and by argument or output whose rows: ras.Rows"
        check_mapping("enter", self.enter, str, Mapping, spots)
        for inner in self.enter.values():
            check_mapping("enter", inner, str | int | None, Rows, spots)
        check_mapping("text", self.text, str, int, "arguments, and the dimension of their tokens")
        check_kind("leaves", self.leaves, Rows, "one of ras.Rows")
        check_kind("whole", self.whole, str | None, "the name of an argument, or None")
        check_kind("processor", self.processor, type | None, "a class, or None")
        check_count("packed", self.packed)
        if self.parallel and self.leaves is Rows.JOINT:
            raise ValueError("parallel is for records in which the image leaves without the text")

    @property
    def regions(self) -> bool:
        """Whether there can be partial steps."""
        return bool(self.attention)

    @property
    def has_tables(self) -> bool:
        """Whether there are tables of rows that all samples share."""
        return any(rows.dim == 0 for spots in self.enter.values() for rows in spots.values())

    def check_names(self, transformer: Any) -> None:
        """Raise ValueError, with the name, for a module of the record that is not there."""
        names = [name for name, _ in transformer.named_modules()]
        for pattern in (*self.attention, *self.enter, self.leave):
            if pattern and not any(matches(name, pattern) for name in names):
                raise ValueError(f"{type(transformer).__name__} has no module {pattern!r}")
        if self.regions and not self.leave:
            raise ValueError("a record with attention must say where the noise leaves: leave=...")

    def attention_layers(self, transformer: Any) -> Iterator[tuple[Any, Rows]]:
        """The layers whose keys and values are kept, in the order of the model, and whose."""
        for name, module in transformer.named_modules():
            for pattern, rows in self.attention.items():
                if matches(name, pattern):
                    yield module, rows

    def latents_of(self, inputs: Inputs) -> Tensor | list[Tensor] | None:
        """A batch of latents, or a list of each sample's."""
        found = inputs.get(self.latents)
        return found if isinstance(found, Tensor | list) else None

    def pack(self, noise: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, int] | None:
        """The tokens, `(S, N, C)`, of a noise as the scheduler gets it, and the pixels of each.

        Channels are inside of pixels. None if the noise is not that of all tokens.
        """
        if noise.ndim == 3:
            pixels = self.packed**2
            if noise.shape[1] != math.prod(grid) or noise.shape[2] % pixels:
                return None
            return rearrange(noise, "b n (c p) -> b n (p c)", p=pixels), pixels
        if noise.ndim not in (4, 5):
            return None
        frames, height, width = (1,) * (3 - len(grid)) + grid
        if noise.ndim == 4:
            noise = noise[:, :, None]
        elif "b (f t) c" in self.output:
            noise = noise.transpose(1, 2)
        sizes = dict(f=frames, h=height, w=width)
        if any(side % count for side, count in zip(noise.shape[2:], sizes.values())):
            return None
        there, here = VIDEOS.split(" -> ")
        pixels = math.prod(noise.shape[2:]) // math.prod(grid)
        return rearrange(noise, f"{here} -> {there}", **sizes), pixels

    def unpack(self, tokens: Tensor, transformer: Any, grid: tuple[int, ...]) -> list[Tensor]:
        """The transformer's output, as a list of its tensors, that the noise `(B, N, C)` is."""
        if self.output == PACKED:
            return [tokens]
        sizes = dict(zip("tpqfhw", self.patch(transformer) + (1,) * (3 - len(grid)) + grid))
        axes = {axis: size for axis, size in sizes.items() if axis in self.output}
        output = rearrange(tokens, self.output, **axes)
        return list(output) if self.lists else [output]

    def usual_layout(
        self, pipe: Any, transformer: Any, height: int | None, width: int | None
    ) -> Layout:
        """The layout of a pipeline's call of `height` x `width` pixels, else of its defaults.

        No text is longer than it says. Without a grid where nobody says how large an image is.
        """
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        pixels = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), None)
        if not self.regions or not isinstance(pixels, int):
            return Layout()
        own = getattr(transformer.config, "sample_size", None) or getattr(
            pipe, "default_sample_size", None
        )
        patch = (1, self.packed, self.packed) if self.packed > 1 else self.patch(transformer)
        sides = [
            (given or _default(pipe, name) or (own * pixels if isinstance(own, int) else 0))
            // (pixels * side)
            for name, given, side in (("height", height, patch[1]), ("width", width, patch[2]))
        ]
        frames = self._usual_frames(pipe, patch[0])
        grid = tuple(sides) if frames is None else (frames, *sides)
        joint = Rows.JOINT in self.attention.values()
        if not math.prod(grid):
            return Layout()
        return Layout(grid, self.usual_text(pipe) if joint else 0)

    def _usual_frames(self, pipe: Any, side: int) -> int | None:
        frames = _default(pipe, "num_frames")
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        ratio = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), None)
        if not frames or not ratio:
            return None
        return -(-((frames - 1) // ratio + 1) // side)


def _default(pipe: Any, argument: str) -> Any:
    """What a pipeline's call takes where an argument is not given."""
    found = inspect.signature(type(pipe).__call__).parameters.get(argument)
    return None if found is None or found.default is inspect.Parameter.empty else found.default


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a module's, level by level."""
    return name.count(".") == pattern.count(".") and fnmatch.fnmatchcase(name, pattern)


# --- layouts --------------------------------------------------------------------------------------


def patch_of(transformer: Any) -> tuple[int, int, int]:
    size = transformer.config.patch_size
    if not isinstance(size, int):
        return (1,) * (3 - len(size)) + tuple(size)
    return getattr(transformer.config, "patch_size_t", None) or 1, size, size


def patched(text: str | None = None, frames_at: int = 2) -> Callable[[Any, Inputs], Layout]:
    """Latents of pixels, which the transformer cuts into patches, and text of `inputs[text]`."""

    def layout(transformer: Any, inputs: Inputs) -> Layout:
        patch, shape = patch_of(transformer), inputs["hidden_states"].shape
        sizes = [1 if len(shape) == 4 else shape[frames_at], *shape[-2:]]
        if any(size % side for size, side in zip(sizes[1:], patch[1:])):
            raise ValueError(
                f"the latents' height and width, {sizes[1]}x{sizes[2]}, must be multiples of the "
                f"transformer's patch size {patch[1]}"
            )
        grid = tuple(-(-size // side) for size, side in zip(sizes, patch))
        return Layout(grid[len(shape) == 4 :], text_of(inputs, text))

    return layout


def by_ids(ids: str, text: str | None = None) -> Callable[[Any, Inputs], Layout]:
    """Packed tokens, whose places are told by rows `(which image, y, x, ...)`, the noise first.

    The ids are read, which has a GPU's host wait, once in a run.
    """

    def layout(transformer: Any, inputs: Inputs) -> Layout:
        count, places = inputs["hidden_states"].shape[1], inputs[ids]
        rows = (places if places.ndim == 2 else places[0])[-count:, :3].tolist()
        images = [list(image) for _, image in itertools.groupby(rows, key=lambda row: row[0])]
        sizes = [(len({r[1] for r in image}), len({r[2] for r in image})) for image in images]
        whole = [math.prod(size) == len(image) for size, image in zip(sizes, images)]
        if not whole[0]:
            return Layout()
        pictures = sizes[1:] if all(whole) else []
        return Layout(sizes[0], text_of(inputs, text), count - len(images[0]), tuple(pictures))

    return layout


def text_of(inputs: Inputs, name: str | None) -> int:
    return 0 if name is None else inputs[name].shape[1]
