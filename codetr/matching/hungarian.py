"""One-to-one matching of queries and objects (DETR, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from codetr.boxes import cxcywh_to_xyxy, extents, generalised_iou, xyxy_to_cxcywh
from codetr.config import BoxLossConfig
from codetr.structures import Size, Targets
from codetr.transfer import moved

Match = tuple[Tensor, Tensor]
"""(n,) query indices in ascending order, and (n,) the object that each is matched with."""

WORST = 1e9
"""Cost of a query whose cost is not finite: float64 holds it and finite ones in one sum."""


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """How much a class adds to the focal loss by becoming positive (method.md 32), elementwise."""
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * (p + 1e-12).log()
    negative = -(1 - alpha) * p**gamma * (1 - p + 1e-12).log()
    return positive - negative


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    weights: BoxLossConfig,
) -> Tensor:
    """Cost of every query with every object of its image: class, L1 of normalised boxes, and GIoU
    of boxes in pixels (method.md 32).

    Args:
        logits: (L, B, Q, C) of L decoder layers.
        boxes: (L, B, Q, 4) normalised cxcywh.

    Returns:
        (L, B, Q, G) float32, G the largest number of objects; columns beyond an image's own are
        meaningless.
    """
    logits, boxes = logits.detach().float(), boxes.detach().float()
    scale = extents(sizes, boxes)[:, None]
    objects = pad_sequence([t.boxes for t in targets], batch_first=True).to(boxes)
    labels = pad_sequence([t.labels for t in targets], batch_first=True)
    labels = labels[:, None].expand(*logits.shape[:-1], -1)
    l1 = torch.cdist(boxes, xyxy_to_cxcywh(objects) / scale, p=1)
    pixels = cxcywh_to_xyxy(boxes) * scale
    giou = generalised_iou(pixels[..., None, :], objects[:, None])
    cls = focal_cost(logits.gather(-1, labels))
    return weights.cls * cls + weights.l1 * l1 - weights.giou * giou


@torch.no_grad()
def hungarian_layers(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    weights: BoxLossConfig,
) -> list[list[Match]]:
    """The cheapest one-to-one matching for each layer and image, with a single copy to the host.

    Args:
        logits: (L, B, Q, C).
        boxes: (L, B, Q, 4) normalised cxcywh.
        targets: of the B images.
        sizes: valid (height, width) of the B images.
        weights: of the three costs.

    Returns:
        ``matches[layer][image]``; min(Q, number of objects) pairs each. A query whose cost is NaN
        or infinite is the last choice. Nothing is raised: the loss will not be finite either, and
        there all ranks look at it together; one that left here would leave the others waiting.
    """
    cost = matching_cost(logits, boxes, targets, sizes, weights).cpu().double()
    costs = cost.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST).numpy()
    pairs = [
        [
            np.stack(linear_sum_assignment(cost[:, : len(t)]))
            for cost, t in zip(of_layer, targets, strict=True)
        ]
        for of_layer in costs
    ]
    # One copy back to the device as well, then views of it.
    flat = torch.from_numpy(np.concatenate([p for of_layer in pairs for p in of_layer], axis=1))
    split = iter(moved(flat, logits.device).split([p.shape[1] for of in pairs for p in of], dim=1))
    return [[tuple(next(split)) for _ in of_layer] for of_layer in pairs]  # type: ignore[misc]


def hungarian(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    weights: BoxLossConfig,
) -> list[Match]:
    """:func:`hungarian_layers` for a single layer: (B, Q, C) logits and (B, Q, 4) boxes."""
    return hungarian_layers(logits[None], boxes[None], targets, sizes, weights)[0]
