"""RetinaNet as an auxiliary head (RetinaNet, section 4; table 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from codetr.boxes import decode_deltas
from codetr.config import RetinaNetConfig
from codetr.distributed import normaliser
from codetr.heads.anchors import Anchors, anchors_for, octave_scales
from codetr.heads.head import HeadContext
from codetr.heads.one_stage import OneStageHead, Prediction, count_positives
from codetr.losses import giou_loss
from codetr.matching.max_iou import IGNORED, match_anchors
from codetr.matching.objects import pad_objects
from codetr.structures import Size, Targets


class RetinaNetHead(OneStageHead):
    """Anchors of several shapes on each cell, focal loss; no norm in its towers."""

    config: RetinaNetConfig

    def __init__(self, config: RetinaNetConfig, context: HeadContext) -> None:
        shapes = config.anchor_scales_per_octave * len(config.ratios)
        super().__init__(config, context, shapes=shapes, norm=False, bias=True, scaled=False)

    def anchors(self, pyramid: Sequence[Tensor]) -> Anchors:
        scales = octave_scales(self.config.octave_base_scale, self.config.anchor_scales_per_octave)
        return anchors_for(pyramid, self.strides, scales, self.config.ratios)

    def decode(self, anchors: Tensor, strides: Tensor, deltas: Tensor) -> Tensor:  # noqa: ARG002
        return decode_deltas(anchors, deltas)

    def assign(
        self, prediction: Prediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        objects, _ = pad_objects(targets)
        anchors = prediction.anchors
        return match_anchors(
            anchors.boxes,
            anchors.valid(sizes),
            objects,
            positive=self.config.positive_iou,
            negative=self.config.negative_iou,
            low_quality=0.0,
        )

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        found = self.matched(prediction, assigned, targets)
        positives = normaliser(count_positives(assigned))
        return {
            "cls": self.focal_loss(prediction, found.labels, assigned != IGNORED) / positives,
            "giou": giou_loss(found.predicted, found.boxes) / positives,
        }
