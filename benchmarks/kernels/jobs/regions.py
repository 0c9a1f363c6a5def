"""Jobs that choose regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ras_kernels
from ras_kernels import reference

from .job import PATCH, Job, Shape, Way, active_index, normal


def region_scores(s: Shape, device: str) -> Job:
    """The scores of guided noise, of which there is one for each pair of the batch."""
    noise = normal(device, s.batch // 2, s.tokens, PATCH**2 * s.channels)

    def plain() -> Tensor:
        return noise.float().unflatten(2, (PATCH**2, -1)).std(3, correction=0).mean(2)

    return Job(
        [noise, noise[:, :, 0].float()],
        Way(lambda: ras_kernels.region_scores(noise, PATCH**2)),
        {"std, mean": Way(plain)},
    )


def update_drift_(s: Shape, device: str) -> Job:
    """The drift of the regions that were computed, on guided noise."""
    samples = s.batch // 2
    noise, last = (normal(device, samples, s.tokens, PATCH**2 * s.channels) for _ in range(2))
    pace, since = (torch.zeros(samples, s.tokens, device=device) for _ in range(2))
    index, values = active_index(s, device)[:samples], noise[:, : s.active]
    written = last, pace, since

    def ours() -> Sequence[Tensor]:
        ras_kernels.update_drift_(*written, index, noise, position=0.5)
        return written

    def definition() -> Sequence[Tensor]:
        reference.update_drift_(*written, index, noise, 0.5)
        return written

    columns = pace[:, : s.active]
    return Job(
        [values, values, values, columns, columns, columns, index],
        Way(ours),
        {"our definition": Way(definition)},
        written=written,
    )


def drift_scores(s: Shape, device: str) -> Job:
    """The scores that come of it."""
    pace, since = (torch.rand(s.batch // 2, s.tokens, device=device) for _ in range(2))
    return Job(
        [pace, since, pace],
        Way(lambda: ras_kernels.drift_scores(pace, since, position=0.5)),
        {"sub, abs, mul": Way(lambda: pace * (0.5 - since).abs())},
    )


def select_lowest(s: Shape, device: str) -> Job:
    """`select_regions` without ages: the regions of least score, which is all that topk can do."""
    scores, ages = _scores_and_ages(s, device)
    options = {"high_ratio": 1.0, "starvation_scale": 0.0}

    def topk() -> Tensor:
        return scores.topk(s.active, largest=False, sorted=False).indices.sort().values

    return Job(
        [scores, scores[:, : s.active], ages, ages],
        Way(lambda: ras_kernels.select_regions(scores, ages, s.active, **options)[0]),
        {"topk, sort": Way(topk)},
        tolerance=0,
    )


def select_regions(s: Shape, device: str) -> Job:
    """With ages, which takes each region's rank."""
    scores, ages = _scores_and_ages(s, device)
    _, centre = reference.kept_ranks(s.tokens, s.active, 0.5)
    options = {"high_ratio": 0.5, "starvation_scale": 0.7}

    def topk() -> Sequence[Tensor]:
        ranks = scores.argsort(1).argsort(1)
        urgency = (ranks - centre).abs().log() - options["starvation_scale"] * ages
        active = urgency.topk(s.active, largest=False, sorted=False).indices.sort().values
        return active, (ages + 1).scatter(1, active, 0)

    return Job(
        [scores, scores[:, : s.active], ages, ages],
        Way(lambda: ras_kernels.select_regions(scores, ages, s.active, **options)),
        {
            "argsort twice, topk, sort": Way(topk),
            "our definition": Way(
                lambda: reference.select_regions(scores, ages, s.active, *options.values())
            ),
        },
        tolerance=0,
    )


def _scores_and_ages(s: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Without ties, whose order is not topk's business."""
    scores = torch.rand(s.batch // 2, s.tokens, device=device).argsort(1).float()
    ages = torch.rand(scores.shape, device=device).argsort(1).to(torch.int32)
    return scores, ages


JOBS = region_scores, update_drift_, drift_scores, select_lowest, select_regions
