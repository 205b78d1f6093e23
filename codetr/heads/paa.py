"""PAA as an auxiliary head (Probabilistic Anchor Assignment, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, sigmoid_focal_loss

from codetr.boxes import EPS, generalised_iou, iou, pairwise_iou
from codetr.config import PaaConfig
from codetr.distributed import normaliser
from codetr.heads.anchors import Anchors
from codetr.heads.dense import nms_by_class, top_per_level
from codetr.heads.head import HeadContext
from codetr.heads.one_stage import Prediction
from codetr.heads.square_anchors import SquareAnchorHead
from codetr.losses import binary_cross_entropy, giou_loss, one_hot
from codetr.matching.max_iou import IGNORED, match_anchors
from codetr.matching.objects import pad_objects
from codetr.matching.paa import match_paa
from codetr.structures import Detections, Size, Targets
from codetr.transfer import tensor_on

VOTE_IOU, VOTE_VARIANCE = 0.01, 0.025
"""Score voting (section 3.3): least overlap of a voter, and how fast votes fade with it."""


class PaaHead(SquareAnchorHead):
    """Anchors are positive if the head itself does well on them, and its IoU is predicted."""

    config: PaaConfig

    def __init__(self, config: PaaConfig, context: HeadContext) -> None:
        super().__init__(config, context, quality=True)

    def assign(
        self, prediction: Prediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        candidates = self.candidates(prediction.anchors, sizes, targets)
        losses = self.anchor_losses(prediction, candidates, targets)
        return match_paa(losses, candidates, prediction.anchors.counts, self.config.topk)

    def candidates(
        self, anchors: Anchors, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        """(B, N) the object that each anchor may become a positive of."""
        objects, _ = pad_objects(targets)
        threshold = self.config.candidate_iou
        return match_anchors(
            anchors.boxes,
            anchors.valid(sizes),
            objects,
            positive=threshold,
            negative=threshold,
            low_quality=0.0,
        )

    def anchor_losses(
        self, prediction: Prediction, candidates: Tensor, targets: Sequence[Targets]
    ) -> Tensor:
        """(B, N) weighted loss of class and box for its object at each candidate, else infinite:
        the anchor score of section 3.1, negated."""
        found = self.matched(prediction, candidates, targets)
        place = (found.image, found.anchor)
        cls = sigmoid_focal_loss(
            prediction.logits[place], one_hot(found.labels[place], self.num_classes)
        ).sum(1)
        giou = 1 - generalised_iou(found.predicted, found.boxes)
        losses = torch.full_like(prediction.logits[..., 0], torch.inf)
        losses[place] = self.config.cls_weight * cls + self.config.giou_weight * giou
        return losses

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        assert prediction.quality is not None
        found = self.matched(prediction, assigned, targets)
        overlap = iou(found.predicted, found.boxes).detach()
        count = (assigned >= 0).sum().float()
        counts = torch.stack((count, torch.full_like(count, len(targets)), overlap.sum()))
        least = tensor_on(count.device, (1.0, 1.0, EPS))
        positives, images, total = normaliser(counts, least=least)
        quality = prediction.quality[found.image, found.anchor]
        cls = self.focal_loss(prediction, found.labels, assigned != IGNORED)
        return {
            "cls": cls / torch.maximum(positives, images),
            "giou": giou_loss(found.predicted, found.boxes, overlap) / total,
            "iou": binary_cross_entropy(quality, overlap) / positives,
        }

    @torch.no_grad()
    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        prediction, config = self.predict(pyramid), self.config
        assert prediction.quality is not None
        anchors, quality = prediction.anchors, prediction.quality.sigmoid()
        scores = (prediction.logits.sigmoid() * quality[..., None]).sqrt()
        boxes = self.decode(anchors.boxes, anchors.strides, prediction.deltas)
        best = top_per_level(scores.amax(-1), anchors.counts, config.test_nms_pre)
        detections = []
        for image, size in enumerate(sizes):
            clipped = clip_boxes_to_image(boxes[image, best[image]], size)
            of_image = scores[image, best[image]]
            row, label = (of_image > config.test_score).nonzero(as_tuple=True)
            voters = Detections(clipped[row], of_image[row, label], label)
            found = nms_by_class(
                voters.boxes, voters.scores, label, iou=config.test_nms, keep=config.test_keep
            )
            # A mean of boxes inside the image is so but for its last bit.
            found = vote(found, voters)
            detections.append(replace(found, boxes=clip_boxes_to_image(found.boxes, size)))
        return detections


def vote(detections: Detections, voters: Detections) -> Detections:
    """Each box becomes the mean of those of its class around it, by score and nearness."""
    overlaps = pairwise_iou(detections.boxes, voters.boxes)
    allowed = (overlaps > VOTE_IOU) & (detections.labels[:, None] == voters.labels)
    weights = (-((1 - overlaps) ** 2) / VOTE_VARIANCE).exp() * voters.scores * allowed
    total = weights.sum(1, keepdim=True)
    boxes = torch.where(total > 0, weights @ voters.boxes / total, detections.boxes)
    return replace(detections, boxes=boxes)
