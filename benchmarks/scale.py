"""Count what a step costs a rank of 1, 8 or more, from bytes and FLOPs; nothing is measured.

    python -m benchmarks.scale

FLUX.1 at 1024 x 1024 px and Wan 2.1 14B, 81 frames at 480p and 720p, in context parallelism by
Ulysses (`docs/scale.md`). The counts of bytes are held against those of real processes, and those
of FLOPs against PyTorch's counter, by `tests/pipelines/test_parallel.py`. Times are arithmetic with
the data sheet of an H100 SXM and the assumptions of `Machine`; they leave out what host, norms and
kernels' launches cost.

Prints a table; `--markdown` has the page's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHARES = (1.0, 0.5, 0.25, 0.1)
"""Of the image's tokens that a step computes."""
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """What times are made of: an H100 SXM by its data sheet, and assumptions.

    Attributes:
        flops: Dense bfloat16 products a second, of which `share` are had.
        share: An assumption.
        memory: Bytes a second that weights are read by.
        near: Bytes a second that a rank gets from those of its node (NVLink 4, one direction).
        far: The same from other nodes (400 Gbit/s a GPU, an assumption).
        node: GPUs in a node.
        latency: Seconds that a collective takes at least, an assumption.
    """

    flops: float = 989 * TERA
    share: float = 0.6
    memory: float = 3.35 * TERA
    near: float = 450 * GB
    far: float = 50 * GB
    node: int = 8
    latency: float = 20e-6


@dataclass(frozen=True)
class Model:
    """One transformer's call for a sample.

    Attributes:
        name: With the size of what it makes.
        heads, size: Heads of a layer, and the features of one.
        layers: Those of self-attention, or of joint attention.
        tokens, text: N, and T where the text is in that attention.
        linear: Weights that each row of the image is multiplied by, in all blocks.
        text_linear: Those of each row of text.
        weights: All of them.
        once: Those of a sample's own rows: modulation, and the text of cross-attention, which each
            rank computes whole.
        cross: Rows of text that each row of the image attends to, too.
        channels: Of a token's noise.
        calls: Of the transformer in a step, by guidance.
    """

    name: str
    heads: int
    size: int
    layers: int
    tokens: int
    text: int
    linear: int
    text_linear: int
    weights: int
    once: int
    cross: int
    channels: int
    calls: int

    @property
    def width(self) -> int:
        return self.heads * self.size


def flux(
    heads: int = 24,
    size: int = 128,
    double: int = 19,
    single: int = 38,
    tokens: int = 4096,
    text: int = 512,
    channels: int = 64,
) -> Model:
    """FLUX.1: blocks of two streams, whose weights are the text's own, and blocks of one."""
    square = (heads * size) ** 2
    rows = 12 * (double + single) * square  # queries to the output 4, feed-forward 8
    once = (2 * 6 * double + 3 * single) * square
    weights = rows + 12 * double * square + once
    name, layers = "FLUX.1, 1024 x 1024", double + single
    return Model(name, heads, size, layers, tokens, text, rows, rows, weights, once, 0, channels, 1)


def wan(
    name: str = "Wan 14B, 81 frames",
    heads: int = 40,
    size: int = 128,
    layers: int = 40,
    feed_forward: int = 13824,
    tokens: int = 75600,
    text: int = 512,
    channels: int = 64,
) -> Model:
    """Wan 2.1: self-attention of the video, cross-attention to the text."""
    width = heads * size
    rows = layers * (6 * width**2 + 2 * width * feed_forward)
    keys = layers * 2 * width**2
    weights, once = rows + keys, text * keys
    return Model(name, heads, size, layers, tokens, 0, rows, 0, weights, once, text, channels, 2)


MODELS = (
    flux(),
    wan("Wan 14B, 81 frames of 480p", tokens=21 * 30 * 52),
    wan("Wan 14B, 81 frames of 720p", tokens=21 * 45 * 80),
)


def rows_of(rows: int, ranks: int, rank: int = 0) -> int:
    """How many of so many rows a rank has; the first has most."""
    return rows // ranks + (rank < rows % ranks)


def walking(model: Model, share: float) -> int:
    """The image's tokens that a step computes."""
    return max(round(share * model.tokens), 1)


def flops(model: Model, share: float, ranks: int) -> int:
    """Of one call on the first rank, two for each product, norms and activations left out."""
    image = walking(model, share)
    own, text = rows_of(image, ranks), rows_of(model.text, ranks)
    linear = own * model.linear + text * model.text_linear + model.once
    keys = model.tokens + model.text
    own_heads = model.heads // ranks * model.size
    attention = 2 * (image + model.text) * keys * own_heads * model.layers
    cross = 2 * own * model.cross * model.width * model.layers
    return 2 * (linear + attention + cross)


def received(
    model: Model, share: float, ranks: int, *, rank: int = 0, batch: int = 1, itemsize: int = 2
) -> int:
    """Bytes that a rank gets from others in one call; those of a skipped step (0) are none.

    Per layer queries, keys and values of its heads, then its rows of the others' heads; at the end
    the noise. In partial steps the first rank tells the others which tokens walk, `int32`.
    """
    if not share or ranks == 1:
        return 0
    image = walking(model, share)
    rows = image + model.text
    own = rows_of(image, ranks, rank) + rows_of(model.text, ranks, rank)
    of_head = batch * itemsize * model.width // ranks
    layers = model.layers * of_head * (3 * (rows - own) + (ranks - 1) * own)
    noise = (ranks - 1) * rows_of(image, ranks) * batch * model.channels * itemsize
    told = 4 * image * batch if share < 1 and rank else 0
    return layers + noise + told


def collectives(model: Model, share: float, ranks: int) -> int:
    """How many of one call: two per layer, one for the noise, one for the choice of tokens."""
    if not share or ranks == 1:
        return 0
    return 2 * model.layers + 1 + (share < 1)


def cache_bytes(model: Model, ranks: int, *, itemsize: int = 2, changes: bool = True) -> int:
    """Keys and values on a rank, of all calls of a step, and how they change."""
    rows = model.tokens + model.text + changes * model.tokens
    return model.calls * 2 * model.layers * rows * model.width // ranks * itemsize


def times(model: Model, share: float, ranks: int, machine: Machine) -> tuple[float, float]:
    """Seconds of a step on a rank: what it computes or reads, and what it waits for.

    Each rank reads all weights, two bytes each, however few its rows.
    """
    computed = flops(model, share, ranks) / (machine.flops * machine.share)
    busy = max(computed, 2 * model.weights / machine.memory)
    near = min(ranks, machine.node)
    told = received(model, share, ranks, rank=ranks - 1)
    outside = told * (ranks - near) / max(ranks - 1, 1)
    moved = (told - outside) / machine.near + outside / machine.far
    waits = moved + collectives(model, share, ranks) * machine.latency
    return model.calls * busy, model.calls * waits


def degrees(model: Model) -> list[int]:
    """1, 8, and the most ranks up to 64 that divide the heads: 64 do, of neither model."""
    return [1, 8, max(n for n in range(1, 65) if model.heads % n == 0)]


def table(machine: Machine) -> Iterator[list[str]]:
    """The rows of the table, its heading first."""
    yield [
        "model",
        "ranks",
        "tokens",
        "TFLOP a rank",
        "GB received",
        "busy, ms",
        "waits, ms",
        "step, ms",
        "of a dense one",
        "keys and values, GB a rank",
    ]
    for model in MODELS:
        for ranks in degrees(model):
            dense = sum(times(model, 1.0, ranks, machine))
            for share in SHARES:
                busy, waits = times(model, share, ranks, machine)
                told = model.calls * received(model, share, ranks, rank=ranks - 1)
                yield [
                    model.name,
                    str(ranks),
                    f"{share:.0%}",
                    f"{model.calls * flops(model, share, ranks) / TERA:.1f}",
                    f"{told / GB:.2f}",
                    f"{1e3 * busy:.1f}",
                    f"{1e3 * waits:.1f}",
                    f"{1e3 * (busy + waits):.1f}",
                    f"{(busy + waits) / dense:.2f}",
                    f"{cache_bytes(model, ranks) / GB:.1f}",
                ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--markdown", action="store_true", help="the table as docs/scale.md has it")
    options = parser.parse_args(argv)
    rows = list(table(Machine()))
    if options.markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    wide = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, wide)))


if __name__ == "__main__":
    main()
