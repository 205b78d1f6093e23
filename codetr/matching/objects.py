"""Objects of a batch as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from codetr.structures import Targets


def pad_objects(targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
    """Boxes (B, G, 4) xyxy pixels and labels (B, G), G the largest number of objects, at least 1.

    Rows beyond an image's own objects are zero: an empty box, which overlaps nothing, so that no
    assignment gives it a positive.
    """
    boxes = pad_sequence([t.boxes for t in targets], batch_first=True)
    labels = pad_sequence([t.labels for t in targets], batch_first=True)
    if boxes.shape[1] == 0:
        return boxes.new_zeros(len(boxes), 1, 4), labels.new_zeros(len(labels), 1)
    return boxes, labels
