"""Soft non-maximum suppression: overlapping detections lose score instead of being removed."""

from __future__ import annotations

import torch

from codetr.boxes import pairwise_iou
from codetr.structures import Detections


def soft_nms(detections: Detections, *, iou: float, min_score: float, keep: int) -> Detections:
    """Linear Soft-NMS within each class (Bodla et al., 2017, equation 2; method.md 58).

    Again and again the best remaining detection is taken, and the score of every other one of its
    class that overlaps it is multiplied by 1 - IoU.

    Args:
        detections: of one image, in any order.
        iou: from this overlap on a score is lowered.
        min_score: a detection whose score is below it is dropped.
        keep: at most this many are returned.

    Returns:
        what is left with its lowered scores, best first.
    """
    # One detection after the other: on the CPU, where a step costs no synchronisation.
    boxes, labels = detections.boxes.float().cpu(), detections.labels.cpu()
    overlaps = pairwise_iou(boxes, boxes)
    suppressed = (overlaps >= iou) & (labels[:, None] == labels)
    factors = torch.where(suppressed, 1 - overlaps, 1.0).numpy()
    remaining = detections.scores.float().cpu().numpy().copy()
    chosen, scores = [], []
    for _ in range(min(keep, len(remaining))):
        best = remaining.argmax()
        if remaining[best] < min_score:
            break
        chosen.append(int(best))
        scores.append(float(remaining[best]))
        remaining *= factors[best]
        remaining[best] = -1.0
    index = torch.tensor(chosen, dtype=torch.int64, device=detections.labels.device)
    lowered = detections.scores.new_tensor(scores)
    return Detections(detections.boxes[index], lowered, detections.labels[index])
