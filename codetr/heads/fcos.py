"""FCOS as an auxiliary head (FCOS, section 3; table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.boxes import EPS, decode_distances
from codetr.config import FcosConfig
from codetr.distributed import normaliser
from codetr.heads.anchors import Anchors, anchors_for
from codetr.heads.dense import centerness_targets
from codetr.heads.head import HeadContext
from codetr.heads.one_stage import OneStageHead, Prediction
from codetr.losses import binary_cross_entropy, giou_loss
from codetr.matching.fcos import match_fcos
from codetr.matching.objects import pad_objects
from codetr.structures import Size, Targets
from codetr.transfer import tensor_on


class FcosHead(OneStageHead):
    """Distances from the middle of each cell to the four sides of its object, and centerness.

    Its "anchors" play no part in detection: they are the boxes that positive points become as
    queries, squares of ``box_scale`` strides (table 1).
    """

    config: FcosConfig

    def __init__(self, config: FcosConfig, context: HeadContext) -> None:
        super().__init__(config, context, quality=True, bias=True)

    def anchors(self, pyramid: Sequence[Tensor]) -> Anchors:
        return anchors_for(pyramid, self.strides, [self.config.box_scale], offset=0.5)

    def decode(self, anchors: Tensor, strides: Tensor, deltas: Tensor) -> Tensor:
        """``deltas`` are the distances in strides, where they are positive."""
        points = (anchors[..., :2] + anchors[..., 2:]) / 2
        return decode_distances(points, deltas.relu() * strides[..., None])

    def assign(
        self, prediction: Prediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        objects, _ = pad_objects(targets)
        anchors = prediction.anchors
        return match_fcos(
            anchors.centres,
            anchors.strides,
            self._ranges(anchors),
            anchors.valid(sizes),
            objects,
            radius=self.config.centre_radius,
        )

    def _ranges(self, anchors: Anchors) -> Tensor:
        """(N, 2) least and largest longest distance that each point regresses, in pixels."""
        longest = [stride * self.config.range_scale for stride in self.strides[:-1]]
        ranges = list(zip([-1.0, *longest], [*longest, torch.inf], strict=True))
        return tensor_on(anchors.centres.device, ranges, torch.float32)[anchors.levels]

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        assert prediction.quality is not None
        found = self.matched(prediction, assigned, targets)
        centerness = centerness_targets(found.centres, found.boxes)
        counts = torch.stack(((assigned >= 0).sum().float(), centerness.sum()))
        positives, total = normaliser(counts, least=tensor_on(counts.device, (1.0, EPS)))
        quality = prediction.quality[found.image, found.anchor]
        return {
            # Unlike anchors, points in the padding are told that they are background.
            "cls": self.focal_loss(prediction, found.labels) / positives,
            "giou": giou_loss(found.predicted, found.boxes, centerness) / total,
            "centerness": binary_cross_entropy(quality, centerness) / positives,
        }
