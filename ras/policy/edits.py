"""Which regions an edit changes, as the run itself shows.

At noise level s the sample `x` and the noise `v` predicted of it (in flow matching, `noise - x0`)
say which clean image the run is heading for,

    x0 = x - s * v

Where it differs from the picture to edit, region by region, the edit changes something: with `r`
the rms of the picture's latents and `d` that of the difference over a region's channels, a region
is *edited* if

    d >= t,    t = TIMES * (the QUANTILE of d over the image), but from LEAST * r to MOST * r

and another of the nine around it is, too. The quantile tells what the model makes of what it is to
keep; where an edit takes in more than its part of the image, `MOST` is what counts. Gaps between
edited regions are closed, and all is widened by the margin, since what an edit does reaches beyond
what it changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TIMES, QUANTILE = 3.0, 0.3
LEAST, MOST = 0.1, 0.35
SIZES = 32  # how many sizes of partial steps there may be, that compilers need not see more
GROWN = 1.25  # times as many regions as before, from which on a run is planned anew


class Edit:
    """What a run is going to change of a picture, as far as it has shown.

    Attributes:
        regions: `(S, N)` bool, those that are edited, with their margin, on the device.
        count: How many a partial step computes, or None before it is known.
    """

    def __init__(self, original: Tensor, grid: tuple[int, ...], margin: int) -> None:
        """`original` is `(S, N, C)`, in the order of the noise that is going to be seen."""
        self.regions: Tensor | None = None
        self.count: int | None = None
        self._original, self._grid, self._margin = original.float(), grid, margin
        self._scores: Tensor | None = None
        self._asked: tuple[Tensor, Any] | None = None

    def fits(self, tokens: Tensor) -> bool:
        """Whether tokens are of the samples; guidance's copies of these are let go then."""
        samples, *rest = self._original.shape
        if list(tokens.shape[1:]) != rest or samples % len(tokens):
            return False
        self._original = self._original[: len(tokens)]
        self.regions = None if self.regions is None else self.regions[: len(tokens)]
        return True

    def fix(self, rows: Tensor) -> None:
        """Take these regions, `(S, k)`, for the edited ones, whatever the run shows."""
        regions = torch.zeros(len(rows), self._original.shape[1], device=rows.device)
        self.regions = regions.scatter(1, rows.long(), 1) > 0.5

    def preserve(self, tokens: Tensor) -> Tensor:
        """The tokens, `(S, N, C)`, with the picture's where nothing is edited.

        Regions at the edge of what is edited are a mixture, by how many of the nine around them are
        edited, so that no seam shows; without a margin there are none to spare for that.
        """
        if self.regions is None:
            return tokens
        inside = self.regions.unflatten(1, self._grid)[:, None].float()
        around = F.avg_pool2d(inside, 3, stride=1, padding=1, count_include_pad=False)
        weight = (inside * around if self._margin else inside).flatten(1)[..., None]
        mixed = torch.lerp(self._original, tokens.float(), weight)
        return torch.where(weight > 0, mixed, self._original).to(tokens.dtype)

    def observe(self, sample: Tensor, noise: Tensor, sigma: float) -> None:
        """See the sample and the guided noise of a step that computed all, `(S, N, C)` each."""
        clean = torch.add(sample.float(), noise.float(), alpha=-sigma)
        self._scores = (clean - self._original).square().mean(-1).sqrt()
        self.regions = edited(self._scores, self._rms, self._grid, self._margin)
        counts = self.regions.sum(1).max()
        if counts.is_cuda:
            copy = torch.empty((), dtype=counts.dtype, pin_memory=True)
            copy.copy_(counts, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._asked = copy, done
        else:
            self._asked = counts, None

    @property
    def _rms(self) -> Tensor:
        return self._original.square().mean((1, 2)).sqrt()

    def learn_count(self) -> bool:
        """Read how many regions are edited, if that was asked for; whether there are more by far.

        It was asked for a step ago, and the device has since got that step's work to do. A number
        that goes up and down with each look at the edit would only upset the plan.
        """
        if self._asked is None:
            return False
        (value, done), self._asked = self._asked, None
        if done is not None:
            done.synchronize()
        tokens = math.prod(self._grid)
        size = max(tokens // SIZES, 1)
        count = min(-(-int(value) // size) * size, tokens)
        if self.count is not None and count <= GROWN * self.count:
            return False
        self.count = count
        return True

    def choose(self) -> Tensor:
        """The `count` regions of each sample that are edited, or most likely, `(S, count)` int32
        ascending."""
        assert self._scores is not None and self.regions is not None and self.count is not None
        score = self._scores + self.regions * (self._scores.amax(1, keepdim=True) + 1)
        chosen = score.topk(self.count, dim=1).indices
        return chosen.sort(dim=1).values.to(torch.int32)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        found = [self._original, self._scores, self.regions]
        return [tensor for tensor in found if tensor is not None]


def edited(scores: Tensor, rms: Tensor, grid: tuple[int, ...], margin: int) -> Tensor:
    """The regions that are edited, `(S, N)` bool.

    Args:
        scores: `(S, N)` float, how much each differs.
        rms: `(S,)`, that of the picture.
        grid: Regions in height and width.
        margin: By how many regions to widen them.
    """
    usual = scores.quantile(QUANTILE, dim=1)
    least = torch.minimum(torch.maximum(TIMES * usual, LEAST * rms), MOST * rms)
    differs = (scores >= least[:, None]).unflatten(1, grid)[:, None].float()
    around = F.avg_pool2d(differs, 3, stride=1, padding=1, divisor_override=1)
    kept = differs * (around >= 2)
    # With a border around, into which regions at the edge are widened, too.
    closed = -_widened(-_widened(F.pad(kept, (1, 1, 1, 1)), 1), 1)[..., 1:-1, 1:-1]
    return _widened(closed, margin).flatten(1) > 0.5


def _widened(regions: Tensor, margin: int) -> Tensor:
    """The greatest of the regions up to `margin` away."""
    side = 2 * margin + 1
    return F.max_pool2d(regions, side, stride=1, padding=margin)
