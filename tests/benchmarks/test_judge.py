"""The judge reads drawn scenes, and the measures are what their definitions say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.model import scenes
from benchmarks.quality import judge, measures


@pytest.fixture(scope="module")
def classifier():
    return judge.load_classifier()


@pytest.fixture(scope="module")
def real():
    """Sixty held-out scenes and their images, (60, 3, 256, 256)."""
    captioned = [scenes.sample(i) for i in judge.HELD_OUT[-60:]]
    pixels = np.stack([scene.draw() for scene in captioned])
    return captioned, torch.from_numpy(pixels).movedim(-1, 1) / 255


def test_classifier_reads_held_out_scenes(classifier, real):
    captioned, images = real
    right = judge.attributes(classifier, images, captioned)
    assert right.shape == (sum(len(scene.objects) for scene in captioned), 4)
    assert right.float().mean(0).min() >= 0.95
    empty = judge.labels(captioned)[..., 0] < 0
    assert (classifier(images)[0] < 0)[empty].float().mean() >= 0.99
    assert classifier.features(images).shape == (60, 64)
    assert judge.WEIGHTS.stat().st_size < 1e6


def test_attributes_of_other_images_are_wrong(classifier):
    thing = scenes.SceneObject("circle", "red", "plain", "top left", "large")
    other = replace(thing, colour="green", place="bottom right")
    scene = scenes.Scene((thing, other), "white", "flat", seed=1)
    swapped = replace(scene, objects=(replace(thing, colour="green"), replace(other, colour="red")))
    moved = replace(scene, objects=(replace(thing, place="centre"), other))
    image = torch.from_numpy(scene.draw()).movedim(-1, 0) / 255
    images = torch.stack([image, image, image, torch.full_like(image, 0.5)])
    right = judge.attributes(classifier, images, [scene, swapped, moved, scene])
    yes, colour, no = [True] * 4, [True, True, False, True], [False] * 4
    assert right.tolist() == [yes, yes, colour, colour, no, yes, no, no]


def test_real_statistics_are_kept(classifier, tmp_path, monkeypatch):
    mean, cov = judge.real_statistics(classifier, tmp_path, count=8)
    assert mean.shape == (64,) and cov.shape == (64, 64) and mean.dtype == torch.float64
    monkeypatch.setattr(judge, "real", None)  # what is kept is not drawn again
    again = judge.real_statistics(classifier, tmp_path, count=8)
    assert torch.equal(mean, again[0]) and torch.equal(cov, again[1])


def test_psnr():
    reference = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.stack([reference[0], reference[1] + 0.1])
    assert measures.psnr(images, reference).tolist() == [math.inf, pytest.approx(20, abs=1e-3)]


def test_psnr_under_a_mask():
    reference, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    images = reference + 0.1 * mask + (1 - mask)
    assert measures.psnr(images, reference, mask).tolist() == [pytest.approx(20, abs=1e-3)]


def test_ssim():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 3, 20, 16, generator=generator)
    images = reference.clone()
    images[1] = (images[1] + 0.2 * torch.rand(3, 20, 16, generator=generator)).clamp(max=1)
    equal, other = measures.ssim(images, reference).tolist()
    assert equal == pytest.approx(1) and other == pytest.approx(
        slow_ssim(images[1].numpy(), reference[1].numpy()), abs=1e-5
    )


def slow_ssim(image, reference):
    """The definition, window by window; (3, H, W) each."""
    x, y = (np.tensordot([0.299, 0.587, 0.114], a.astype(float), 1) for a in (image, reference))
    axis = np.arange(-5, 6)
    weights = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            light = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
            values.append(light * (2 * cov + 0.03**2) / (va + vb + 0.03**2))
    return np.mean(values)


def test_frechet():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    mean, cov = measures.gaussian(raw)
    assert measures.frechet(raw, mean, cov) == pytest.approx(0, abs=1e-9)
    # Features whose covariance is exactly the identity make the closed form hold exactly.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (raw - mean).T, upper=False)
    spread, shift = torch.arange(1.0, 7.0).double(), torch.linspace(-1, 1, 6).double()
    features = white.T * spread + shift
    other = torch.linspace(0.5, 2, 6).double()
    expected = (shift.square() + (spread - other).square()).sum().item()
    measured = measures.frechet(features, torch.zeros(6), other.square().diag())
    assert measured == pytest.approx(expected)
