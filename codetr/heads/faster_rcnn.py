"""Faster R-CNN as an auxiliary head (method.md 39-45)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from codetr.config import FasterRcnnConfig, PositiveQueryConfig
from codetr.heads.head import Head
from codetr.heads.rcnn import Rcnn
from codetr.heads.rpn import Rpn
from codetr.structures import Detections, HeadOutput, Size, Targets


class FasterRcnnHead(Head):
    """RPN on all levels, and RCNN on its proposals of the same forward pass.

    RCNN reads all levels but the coarsest, and its positives are the sampled proposals.
    """

    def __init__(
        self,
        config: FasterRcnnConfig,
        *,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        positive_config: PositiveQueryConfig,  # noqa: ARG002  every head takes the same arguments
        groups: int = 32,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.config = config
        self.rpn = Rpn(config.rpn, channels, strides)
        self.rcnn = Rcnn(config.rcnn, channels, num_classes, strides[:-1])

    def forward(
        self, pyramid: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> HeadOutput:
        prediction = self.rpn(pyramid)
        losses = self.rpn.losses(prediction, sizes, targets)
        proposals = self.rpn.propose(prediction, sizes, self.config.rpn.train_nms_pre)
        refined = self.rcnn(pyramid[:-1], proposals, targets)
        return HeadOutput(losses | refined.losses, refined.positives)

    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        prediction = self.rpn(pyramid)
        proposals = self.rpn.propose(prediction, sizes, self.config.rpn.test_nms_pre)
        return self.rcnn.detect(pyramid[:-1], proposals, sizes)

    def class_scores(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """Of RCNN on the proposals, whose boxes carry no gradient."""
        proposals = self.rpn.propose(self.rpn(pyramid), sizes, self.config.rpn.test_nms_pre)
        return self.rcnn.class_scores(pyramid[:-1], proposals)
