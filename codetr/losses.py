"""Losses as pure functions. Each returns a float32 scalar, the SUM over its rows; what it is
divided by is the caller's affair (:func:`codetr.distributed.normaliser`): it spans all ranks.

Inputs of lower precision, as under autocast, are computed in float32.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from codetr.boxes import generalised_iou


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows.sum() if weights is None else (rows * weights).sum()


def _over_classes(loss: Tensor, classes: Tensor | None) -> Tensor:
    """(N,) of (N, C), summed over the classes that count."""
    return (loss if classes is None else loss * classes).sum(1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(N,) labels to (N, num_classes) float32; a row of zeros where label == num_classes."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    classes: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss on independent sigmoids (RetinaNet, section 3).

    Args:
        logits: (N, C).
        labels: (N,) int64; C means background.
        weights: (N,) weight of each row; None for 1.
        classes: (N, C) bool, the classes that have a loss in each row; None: all.
    """
    targets = one_hot(labels, logits.shape[1])
    loss = torchvision.ops.sigmoid_focal_loss(logits.float(), targets, alpha, gamma)
    return _weighted_sum(_over_classes(loss, classes), weights)


def quality_focal_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    weights: Tensor | None = None,
    *,
    classes: Tensor | None = None,
    beta: float = 2.0,
) -> Tensor:
    """Focal loss whose positive target is a quality instead of 1 (GFL, equation 2).

    Args:
        logits: (N, C).
        labels: (N,) int64; C means background.
        quality: (N,) in [0, 1], the target of the label's own logit; not read for background.
        weights: (N,) weight of each row; None for 1.
        classes: (N, C) bool, the classes that have a loss in each row; None: all.
    """
    logits = logits.float()
    targets = one_hot(labels, logits.shape[1]) * quality[:, None]
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (targets - logits.sigmoid()).abs() ** beta
    return _weighted_sum(_over_classes(loss, classes), weights)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of (N,) logits with (N,) targets in [0, 1]."""
    return functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="sum"
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy of (N, C) logits with (N,) int64 labels."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def l1_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Absolute difference of (N, D) rows, summed over D too."""
    return _weighted_sum((predictions.float() - targets.float()).abs().sum(-1), weights)


def giou_loss(boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - GIoU of each of (N, 4) xyxy boxes with its own target (method.md 33)."""
    return _weighted_sum(1 - generalised_iou(boxes.float(), targets.float()), weights)


def distribution_focal_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Cross entropy with the two whole numbers around each target, by nearness (GFL, equation 6).

    Args:
        logits: (N, bins + 1) of the distribution over 0, 1, ..., bins.
        targets: (N,) in [0, bins).
        weights: (N,) weight of each row; None for 1.
    """
    low = targets.long()
    above = targets - low
    likelihood = logits.float().log_softmax(-1)
    pairs = torch.stack((low, low + 1), -1)
    nearness = torch.stack((1 - above, above), -1)
    return _weighted_sum(-(likelihood.gather(1, pairs) * nearness).sum(1), weights)
