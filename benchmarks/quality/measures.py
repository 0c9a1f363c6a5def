"""How near images are to others: PSNR, SSIM and the Fréchet distance of features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # Rec. 601's weights of red, green and blue
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window
K1, K2 = 0.01, 0.03  # SSIM's constants, for values in [0, 1]


def psnr(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) in [0, 1] -> (B,), inf where equal.

    With a mask, (B, 1, H, W) of zeros and ones, of what is under it.
    """
    error = (images - reference).square()
    if mask is None:
        return -10 * error.flatten(1).mean(1).log10()
    size = error.shape[1] * mask.flatten(1).sum(1)
    return -10 * ((error * mask).flatten(1).sum(1) / size).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of the luma: two (B, 3, H, W) in [0, 1] -> (B,).

    As in Wang et al. (2004), at full resolution, over the windows that lie within the image.
    """
    axis = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-axis.square() / (2 * SIGMA**2))
    line /= line.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    weights = torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)
    # In double precision, since the variances are differences of nearly equal numbers.
    x, y = ((batch.double() * weights).sum(1, keepdim=True) for batch in (images, reference))
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = K1**2, K2**2
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.flatten(1).mean(1).float()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (F,) and the covariance (F, F) of features (N, F), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet(features: Tensor, mean: Tensor, cov: Tensor) -> float:
    """The squared Fréchet distance of the features' (N, F) Gaussian from that of mean and cov.

    It grows as N shrinks: compare only distances of the same N.
    """
    own_mean, own_cov = gaussian(features)
    mean, cov = mean.double(), cov.double()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The product of the covariances has the eigenvalues of this symmetric matrix.
    shared = torch.linalg.eigvalsh(root @ own_cov @ root).clamp(min=0).sqrt().sum()
    distance = (own_mean - mean).square().sum() + own_cov.trace() + cov.trace() - 2 * shared
    return distance.item()


def fingerprint(tensors: Iterable[Tensor], start: bytes = b"") -> str:
    """A hash of the tensors' bytes, after some others."""
    found = hashlib.sha256(start)
    for tensor in tensors:
        found.update(tensor.detach().flatten().cpu().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
