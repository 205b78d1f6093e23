"""Positives by a mixture of two Gaussians (PAA, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.matching.max_iou import BACKGROUND
from codetr.transfer import moved

STEPS, TOLERANCE, LEAST_VARIANCE = 100, 1e-3, 1e-6
"""Those of scikit-learn's ``GaussianMixture``, which the original fits."""


def match_paa(losses: Tensor, candidates: Tensor, counts: Sequence[int], topk: int = 9) -> Tensor:
    """Keep the candidates of each object whose losses belong to the lower of two Gaussians.

    An object's candidates are first reduced to the ``topk`` of lowest loss on each level.

    Args:
        losses: (B, N) of each anchor for the object that it is a candidate of.
        candidates: (B, N) the number of an object, or negative.
        counts: number of anchors of each level.
        topk: candidates of an object per level.

    Returns:
        (B, N) int64: ``candidates``, with ``BACKGROUND`` where an object keeps none.
    """
    numbers = torch.arange(int(candidates.max()) + 1, device=candidates.device)[:, None]
    lowest = [
        _lowest(of_image.where(own == numbers, torch.inf), counts, topk)
        for of_image, own in zip(losses, candidates, strict=True)
    ]
    # (B, G, K), ascending; infinite where an object has fewer candidates.
    values, order = torch.stack([values for values, _ in lowest]).sort(dim=-1)
    anchors = torch.stack([indices for _, indices in lowest]).gather(-1, order)
    kept = lower_component(values.flatten(0, 1).cpu().double()).view(values.shape[:2])
    positive = torch.arange(values.shape[-1]) < kept[..., None]
    image, number, place = moved(positive.nonzero(), values.device).unbind(1)
    assigned = candidates.masked_fill(candidates >= 0, BACKGROUND)
    assigned[image, anchors[image, number, place]] = number
    return assigned


def _lowest(losses: Tensor, counts: Sequence[int], topk: int) -> tuple[Tensor, Tensor]:
    """(G, K) the ``topk`` lowest losses of (G, N) on each level, and whose they are."""
    values, indices, start = [], [], 0
    for level in losses.split(list(counts), dim=1):
        found = level.topk(min(topk, level.shape[1]), dim=1, largest=False)
        values.append(found.values)
        indices.append(found.indices + start)
        start += level.shape[1]
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def lower_component(values: Tensor) -> Tensor:
    """How many of the lowest values are positive: up to the most likely one of the lower Gaussian.

    scikit-learn's fit of a two-component ``GaussianMixture`` that starts from the lowest and the
    highest value, of many rows at a time: one by one it would take longer than the detector's step.

    Args:
        values: (M, K) float64, each row ascending; infinite where a row has fewer.

    Returns:
        (M,) int64. All of a row that has fewer than two values, or none in the lower component.
    """
    real = values.isfinite()
    count = real.sum(1)
    x = values.where(real, 0.0)
    highest = x.gather(1, (count - 1).clamp(min=0)[:, None])
    mixture = _fit(x, real, torch.cat((x[:, :1], highest), 1))
    density = _log_density(x, *mixture)
    lower = real & (density[:, 0] >= density[:, 1])
    peak = density.logsumexp(1).masked_fill(~lower, -torch.inf).argmax(1)
    return torch.where(lower.any(1) & (count >= 2), peak + 1, count)


def _fit(x: Tensor, real: Tensor, means: Tensor) -> tuple[Tensor, ...]:
    """Expectation maximisation; means, variances and weights, (M, 2) each."""
    count = real.sum(1).clamp(min=1)
    powers = torch.stack((torch.ones_like(x), x, x.square()), -1)  # (M, K, 3)
    mixture: tuple[Tensor, ...] = (
        means,
        torch.ones_like(means),
        torch.full_like(means, 0.5),
    )
    likelihood = torch.full_like(x[:, 0], -torch.inf)
    active = torch.ones_like(real[:, 0])
    for _ in range(STEPS):
        density = _log_density(x, *mixture)
        total = density.logsumexp(1)
        share = (density - total[:, None]).exp() * real[:, None]
        mass, first, second = (share @ powers).unbind(-1)  # (M, 2) each
        mass = mass + 10 * torch.finfo(x.dtype).eps
        mean = first / mass
        variance = second / mass - mean.square() + LEAST_VARIANCE
        new = (mean, variance, mass / mass.sum(1, keepdim=True))
        # A row that has converged stays, whatever others need.
        mixture = tuple(a.where(active[:, None], b) for a, b in zip(new, mixture, strict=True))
        new_likelihood = (total * real).sum(1) / count
        active = active & ((new_likelihood - likelihood).abs() >= TOLERANCE)
        likelihood = new_likelihood
        if not active.any():
            break
    return mixture


def _log_density(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """(M, 2, K) log of each component's weighted density at x (M, K)."""
    distance = (x[:, None] - means[..., None]).square() / variances[..., None]
    constant = weights.log() - 0.5 * variances.log() - 0.5 * math.log(2 * math.pi)
    return constant[..., None] - 0.5 * distance
