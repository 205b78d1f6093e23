"""Layers and detections of predictions on every cell of the maps."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from codetr.boxes import encode_distances
from codetr.structures import Detections, Size

PRIOR = 0.01
"""Initial probability of every class (RetinaNet, section 4.1)."""


def conv_tower(channels: int, depth: int, groups: int | None, *, bias: bool) -> nn.Sequential:
    """``depth`` times 3x3 convolution, group norm unless ``groups`` is None, and ReLU."""
    layers = []
    for _ in range(depth):
        layer: OrderedDict[str, nn.Module] = OrderedDict()
        layer["conv"] = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        if groups is not None:
            layer["norm"] = nn.GroupNorm(groups, channels)
        layer["act"] = nn.ReLU(inplace=True)
        layers.append(nn.Sequential(layer))
    return nn.Sequential(*layers)


def init_convs(module: nn.Module, std: float = 0.01) -> None:
    """Weights of all convolutions from N(0, std), biases zero (method.md 62)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_prior(classifier: nn.Conv2d, prior: float = PRIOR) -> None:
    """Bias of a sigmoid classifier that starts at probability ``prior``."""
    assert classifier.bias is not None
    nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))


def flatten_maps(maps: Sequence[Tensor], values: int) -> Tensor:
    """(B, A * values, h, w) maps of all levels to (B, N, values), in the order of the anchors."""
    batch = len(maps[0])
    return torch.cat([m.permute(0, 2, 3, 1).reshape(batch, -1, values) for m in maps], dim=1)


def top_per_level(scores: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Indices (B, K) of the ``most`` highest of (B, N) ``scores`` on each level of ``counts``."""
    indices, start = [], 0
    for level in scores.split(list(counts), dim=1):
        count = level.shape[1]
        indices.append(level.topk(min(most, count)).indices + start)
        start += count
    return torch.cat(indices, dim=1)


def nms_by_class(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, keep: int
) -> Detections:
    """The ``keep`` best of (n, 4) boxes after non-maximum suppression within each class."""
    kept = batched_nms(boxes, scores, labels, iou)[:keep]
    return Detections(boxes[kept], scores[kept], labels[kept])


def detect_dense(
    scores: Tensor,
    boxes: Tensor,
    counts: Sequence[int],
    sizes: Sequence[Size],
    *,
    quality: Tensor | None = None,
    threshold: float,
    candidates: int,
    iou: float,
    keep: int,
) -> list[Detections]:
    """Detections from dense predictions (method.md 59).

    Pairs of box and class are chosen by class score alone; ``quality`` then scales their score.

    Args:
        scores: (B, N, C) probabilities.
        boxes: (B, N, 4) xyxy pixels; clipped here.
        counts: predictions of each level.
        sizes: valid (height, width) of the images.
        quality: (B, N) in [0, 1].
        threshold: a class score must exceed it.
        candidates: most pairs of one level and image.
        iou: of boxes of one class, beyond which the lower is suppressed.
        keep: most detections of an image.
    """
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    pairs = top_per_level(flat, [count * classes for count in counts], candidates)
    best = flat.gather(1, pairs)
    above = best > threshold
    rows, labels = pairs // classes, pairs % classes
    if quality is not None:
        best = best * quality.gather(1, rows)
    detections = []
    for image, size in enumerate(sizes):
        chosen = above[image]
        image_boxes = clip_boxes_to_image(boxes[image, rows[image, chosen]], size)
        detections.append(
            nms_by_class(
                image_boxes, best[image, chosen], labels[image, chosen], iou=iou, keep=keep
            )
        )
    return detections


def centerness_targets(centres: Tensor, boxes: Tensor) -> Tensor:
    """(P,) 1 where a centre (P, 2) is in the middle of its box (P, 4), to 0 at its edge (FCOS)."""
    before, after = encode_distances(centres, boxes).split(2, dim=1)
    ratio = torch.minimum(before, after) / torch.maximum(before, after)
    return ratio.prod(1).sqrt()
