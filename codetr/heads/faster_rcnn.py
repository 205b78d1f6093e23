"""Faster R-CNN as an auxiliary head (method.md 39-45)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from codetr.config import TwoStageConfig
from codetr.heads.head import Head, HeadContext
from codetr.heads.rcnn import Rcnn, RoiOutput, RoiSamples
from codetr.heads.rpn import Rpn
from codetr.structures import Detections, HeadOutput, Size, Targets


def stream_of(head: str, stage: str) -> str:
    """The stream of random draws of a stage of the head so named, which no other head shares.

    A stage of ``faster_rcnn`` goes by its own name, as from the time when that was the only head
    that drew: results of then are those of today. Further heads put theirs in front.
    """
    return stage if head == "faster_rcnn" else f"{head}/{stage}"


class FasterRcnnHead(Head):
    """RPN on all levels, and RCNN on its proposals of the same forward pass.

    RCNN reads all levels but the coarsest, and its positives are the sampled proposals.
    """

    config: TwoStageConfig

    def __init__(self, config: TwoStageConfig, context: HeadContext) -> None:
        super().__init__()
        self.config = config
        self.rpn = Rpn(
            config.rpn,
            context.channels,
            context.strides,
            stream=stream_of(context.name, "rpn"),
        )
        self.rcnn = Rcnn(
            config.rcnn,
            context.channels,
            context.num_classes,
            context.strides[:-1],
            context.groups,
            stream=stream_of(context.name, "rcnn"),
        )

    def forward(
        self, pyramid: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> HeadOutput:
        prediction = self.rpn(pyramid)
        losses = self.rpn.losses(prediction, sizes, targets)
        proposals = self.rpn.propose(prediction, sizes, self.config.rpn.train_nms_pre)
        refined: RoiOutput = self.rcnn(pyramid[:-1], proposals, targets)
        further = self.further_losses(pyramid[:-1], refined.samples, targets)
        return HeadOutput(losses | refined.losses | further, refined.positives)

    def further_losses(
        self,
        pyramid: Sequence[Tensor],  # noqa: ARG002
        samples: Sequence[RoiSamples],  # noqa: ARG002
        targets: Sequence[Targets],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """On the regions that the second stage was trained on: none but in Mask R-CNN."""
        return {}

    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        prediction = self.rpn(pyramid)
        proposals = self.rpn.propose(prediction, sizes, self.config.rpn.test_nms_pre)
        return self.rcnn.detect(pyramid[:-1], proposals, sizes)

    def class_scores(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """Of RCNN on the proposals, whose boxes carry no gradient."""
        proposals = self.rpn.propose(self.rpn(pyramid), sizes, self.config.rpn.test_nms_pre)
        return self.rcnn.class_scores(pyramid[:-1], proposals)
