"""Adaptive training sample selection (ATSS, section 3.2; method.md 46)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.boxes import iou
from codetr.matching.max_iou import BACKGROUND, IGNORED

MARGIN = 0.01
"""The anchor's centre is inside an object by more than this many pixels."""


def match_atss(
    anchors: Tensor, counts: Sequence[int], valid: Tensor, objects: Tensor, topk: int = 9
) -> Tensor:
    """Assign anchors to objects by thresholds that adapt to each object.

    Its candidates are the ``topk`` anchors of each level whose centres are nearest to its own. Of
    those, positives reach the mean plus the standard deviation of the candidates' IoU and have
    their centre inside the object. An anchor wanted by several objects goes to that of highest IoU.

    Args:
        anchors: (N, 4) xyxy, one level after another.
        counts: number of anchors of each level.
        valid: (B, N) bool; only these anchors take part.
        objects: (B, G, 4) xyxy, G >= 1, zero where an image has fewer.
        topk: candidates per level.

    Returns:
        (B, N) int64: the number of an object, ``BACKGROUND``, or ``IGNORED`` where not valid.
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    candidates = _nearest(centres, counts, valid, objects, topk)
    usable = valid[:, None].expand(-1, objects.shape[1], -1).gather(2, candidates)
    overlaps = iou(anchors[candidates], objects[:, :, None])

    number = usable.sum(-1, keepdim=True)
    mean = (overlaps * usable).sum(-1, keepdim=True) / number
    variance = ((overlaps - mean).square() * usable).sum(-1, keepdim=True) / (number - 1)
    positive = usable & (overlaps >= mean + variance.sqrt())
    low, high = objects[:, :, None].split(2, dim=-1)
    margins = torch.cat((centres[candidates] - low, high - centres[candidates]), dim=-1)
    positive &= margins.amin(-1) > MARGIN

    scores = overlaps.new_full((*objects.shape[:2], len(anchors)), -1.0)
    scores.scatter_(2, candidates, overlaps.masked_fill(~positive, -1.0))
    best, assigned = scores.max(dim=1)
    return assigned.masked_fill(best < 0, BACKGROUND).masked_fill(~valid, IGNORED)


def _nearest(
    centres: Tensor, counts: Sequence[int], valid: Tensor, objects: Tensor, topk: int
) -> Tensor:
    """(B, G, K) the ``topk`` anchors of each level nearest to each object's centre.

    Levels with fewer valid anchors give them all, and some that are not valid.
    """
    object_centres = (objects[..., :2] + objects[..., 2:]) / 2
    distances = (centres - object_centres[:, :, None]).square().sum(-1).sqrt()
    distances = distances.masked_fill(~valid[:, None], torch.inf)
    nearest, start = [], 0
    for level in distances.split(list(counts), dim=-1):
        count = level.shape[-1]
        nearest.append(level.topk(min(topk, count), largest=False, sorted=False).indices + start)
        start += count
    return torch.cat(nearest, dim=-1)
