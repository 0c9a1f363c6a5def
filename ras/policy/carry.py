"""How much of what reused noise was expected to do it does, as the run itself shows.

Reuse carries noise on by a share `g` of its last change (see `ras.output`), which was chosen for
guidance as it mostly is. Noise without guidance goes on further. A strong one pulls it back where
it went too far, so that what is carried on swings, as explicit solvers of stiff equations do. So
each step of all tokens at which a stretch of reuse ends compares what has come since the last one,
`v - v1`, with what `g` made of it, `e = g * (v1 - v0)`, on guided noise and sample by sample:

    q = <v - v1, e> / <e, e>        s = 1 + q  if q < 0,    1  up to q = 1,    q  beyond

as far as that is in [0, 2]. The next stretch is carried on by `s * g`, in all branches of guidance
alike; the first by `g`, or held in runs of few steps. Between 0 and 1 nothing swings, and `g` is
what was chosen for that. Steps of all tokens with no reuse between teach nothing: from one to the
next noise jitters, and takes back much of what it did, which over a stretch it does not.

The rule was chosen on the bundled model at guidance 1, 4 and 7 in 6 to 28 steps; that neighbouring
steps do not count, on the photographs of `benchmarks.model.photos` too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clock import EXTRAPOLATION, carried, position

MOST = 2.0


class Carry:
    """What a run has shown so far.

    Attributes:
        share: `(S,)` float32, s of each sample; None before the first step.
    """

    def __init__(self, first: float) -> None:
        """Begin with `s = first`."""
        self.share: Tensor | None = None
        self._first = first
        self._seen: list[tuple[float, Tensor]] = []  # the last two steps of all tokens
        self._reused = False  # whether there was another step since

    def observe(self, noise: Tensor, sigma: float, *, dense: bool) -> None:
        """See the guided noise of a step.

        Args:
            noise: `(S, ...)`.
            sigma: The step's noise level.
            dense: Whether all tokens were computed.
        """
        if not dense:
            self._reused = True
            return
        if self.share is None or self._seen[-1][1].shape != noise.shape:
            self.share = torch.full((len(noise),), self._first, device=noise.device)
            self._seen = []
        now = position(sigma)
        if self._reused and len(self._seen) == 2:
            self._measure(noise, now, self.share)
        self._seen, self._reused = [*self._seen[-1:], (now, noise.clone())], False

    def _measure(self, noise: Tensor, now: float, share: Tensor) -> None:
        (t0, v0), (t1, v1) = self._seen
        ahead, behind = abs(now - t1), abs(t1 - t0)
        if not ahead or not behind:  # positions stand still at both ends
            return
        expected = ((v1.float() - v0) * carried(ahead, behind, EXTRAPOLATION)).flatten(1)
        came = (noise.float() - v1).flatten(1)
        q = (came * expected).sum(1) / expected.square().sum(1)
        found = q.clamp(1, MOST) + q.clamp(-1, 0)
        # Where nothing was expected, or something is not finite, nothing is learnt.
        self.share = torch.where(q.isfinite(), found, share)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        kept = [noise for _, noise in self._seen]
        return kept if self.share is None else [*kept, self.share]
