"""What the one-stage heads share that have one square anchor on each cell: ATSS, PAA, GFL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from codetr.boxes import decode_deltas
from codetr.config import SquareAnchorConfig
from codetr.heads.anchors import Anchors, anchors_for
from codetr.heads.one_stage import OneStageHead, Prediction
from codetr.matching.atss import match_atss
from codetr.matching.objects import pad_objects
from codetr.structures import Size, Targets

STDS = (0.1, 0.1, 0.2, 0.2)
"""The units of the predicted deltas."""


class SquareAnchorHead(OneStageHead):
    """One square anchor on each cell. A head that says nothing else predicts deltas from it, and
    assigns as ATSS does."""

    config: SquareAnchorConfig

    def anchors(self, pyramid: Sequence[Tensor]) -> Anchors:
        return anchors_for(pyramid, self.strides, [self.config.anchor_scale])

    def decode(self, anchors: Tensor, strides: Tensor, deltas: Tensor) -> Tensor:  # noqa: ARG002
        return decode_deltas(anchors, deltas, STDS)

    def assign(
        self, prediction: Prediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        objects, _ = pad_objects(targets)
        anchors = prediction.anchors
        return match_atss(
            anchors.boxes, anchors.counts, anchors.valid(sizes), objects, self.config.topk
        )
