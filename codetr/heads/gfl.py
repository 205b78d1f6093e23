"""GFL as an auxiliary head (Generalized Focal Loss)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.boxes import decode_distances, encode_distances, iou
from codetr.config import GflConfig
from codetr.distributed import normaliser
from codetr.heads.head import HeadContext
from codetr.heads.one_stage import Prediction, count_positives
from codetr.heads.square_anchors import SquareAnchorHead
from codetr.losses import distribution_focal_loss, giou_loss, quality_focal_loss
from codetr.matching.max_iou import IGNORED
from codetr.structures import Targets

MARGIN = 0.1
"""Distances are learned up to the last bin less this: both bins around them exist."""


class GflHead(SquareAnchorHead):
    """ATSS's assignment; class scores that predict IoU, and a distribution for each side.

    A side's distance from the anchor's centre, in strides, is the mean of its distribution over
    0, 1, ..., ``bins`` (GFL, section 3.2).
    """

    config: GflConfig

    def __init__(self, config: GflConfig, context: HeadContext) -> None:
        super().__init__(config, context, values=4 * (config.bins + 1))

    def decode(self, anchors: Tensor, strides: Tensor, deltas: Tensor) -> Tensor:
        bins = torch.arange(self.config.bins + 1, device=deltas.device, dtype=torch.float32)
        means = deltas.float().unflatten(-1, (4, -1)).softmax(-1) @ bins
        centres = (anchors[..., :2] + anchors[..., 2:]) / 2
        return decode_distances(centres, means * strides[..., None])

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        found = self.matched(prediction, assigned, targets)
        place = (found.image, found.anchor)
        logits = prediction.logits
        quality = torch.zeros_like(logits[..., 0])
        quality[place] = iou(found.predicted, found.boxes).detach()
        # Boxes count as much as the head is sure of their class.
        weights = logits[place].detach().sigmoid().amax(-1)
        positives, total = normaliser(torch.stack((count_positives(assigned), weights.sum())))

        distances = encode_distances(found.centres, found.boxes) / found.strides[:, None]
        distances = distances.clamp(0, self.config.bins - MARGIN)
        distributions = prediction.deltas[place].unflatten(-1, (4, -1)).flatten(0, 1)
        dfl = distribution_focal_loss(
            distributions, distances.flatten(), weights.repeat_interleave(4)
        )
        cls = quality_focal_loss(
            logits.flatten(0, 1),
            found.labels.flatten(),
            quality.flatten(),
            (assigned != IGNORED).flatten(),
        )
        return {
            "cls": cls / positives,
            "giou": giou_loss(found.predicted, found.boxes, weights) / total,
            "dfl": dfl / 4 / total,
        }
