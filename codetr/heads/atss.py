"""ATSS as an auxiliary head (method.md 40, 46, 59)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.config import AtssConfig
from codetr.distributed import normaliser
from codetr.heads.dense import centerness_targets
from codetr.heads.head import HeadContext
from codetr.heads.one_stage import Prediction, count_positives
from codetr.heads.square_anchors import SquareAnchorHead
from codetr.losses import binary_cross_entropy, giou_loss
from codetr.matching.max_iou import IGNORED
from codetr.structures import Targets


class AtssHead(SquareAnchorHead):
    """Anchor-based one-stage head with adaptive assignment and centerness (ATSS)."""

    config: AtssConfig

    def __init__(self, config: AtssConfig, context: HeadContext) -> None:
        super().__init__(config, context, quality=True)

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        assert prediction.quality is not None
        found = self.matched(prediction, assigned, targets)
        centerness = centerness_targets(found.centres, found.boxes)
        positives, total = normaliser(torch.stack((count_positives(assigned), centerness.sum())))
        quality = prediction.quality[found.image, found.anchor]
        return {
            "cls": self.focal_loss(prediction, found.labels, assigned != IGNORED) / positives,
            "giou": giou_loss(found.predicted, found.boxes, centerness) / total,
            "centerness": binary_cross_entropy(quality, centerness) / positives,
        }
