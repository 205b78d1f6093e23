"""Repeat-factor sampling: images with rare classes more often (LVIS, appendix B.2)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codetr.data.annotations import Annotations


def repeat_factors(table: Annotations, threshold: float) -> NDArray[np.float64]:
    """(I,) how often each image is to be seen where others are once.

    ``max(1, max over its classes c of sqrt(threshold / f_c))``, f_c the share of the images that
    have an object of class c; crowds do not count.

    Args:
        table: of the training images.
        threshold: classes that fewer images have are rare, as a share of the images.
    """
    images, labels = table.class_occurrences()
    frequencies = table.class_images() / max(1, len(table))
    factors = np.ones(len(table))
    np.maximum.at(factors, images, np.sqrt(threshold / frequencies[labels]))
    return factors


def draw_epoch(factors: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
    """One epoch: as many (image, repeat) as there are images, in random order.

    Each image is listed as often as its factor says, rounded up or down at random so that it is
    right on average, and the epoch is a random choice from the list. Images are thus seen in
    proportion to their factors, and an epoch has as many steps as without.

    Args:
        factors: (I,) float64, each at least 1.
        generator: all there is of randomness.

    Returns:
        Positions of images; ``repeat`` tells an image's occurrences apart, from 0.
    """
    whole = factors.floor()
    up = torch.rand(len(factors), dtype=factors.dtype, generator=generator) < factors - whole
    counts = (whole + up).long()
    images = torch.repeat_interleave(counts)
    repeats = torch.arange(len(images)) - (counts.cumsum(0) - counts)[images]
    chosen = torch.randperm(len(images), generator=generator)[: len(factors)]
    return list(zip(images[chosen].tolist(), repeats[chosen].tolist(), strict=True))
