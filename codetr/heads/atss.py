"""ATSS as an auxiliary head (method.md 40, 46, 59)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codetr.boxes import decode_deltas
from codetr.config import AtssConfig, PositiveQueryConfig
from codetr.distributed import normaliser
from codetr.heads.anchors import Anchors, anchors_for
from codetr.heads.dense import (
    conv_tower,
    detect_dense,
    flatten_maps,
    init_convs,
    init_prior,
    sum_of_scores,
)
from codetr.heads.head import Head
from codetr.losses import binary_cross_entropy, giou_loss, sigmoid_focal_loss
from codetr.matching.atss import match_atss
from codetr.matching.max_iou import IGNORED
from codetr.matching.objects import pad_objects
from codetr.structures import Detections, HeadOutput, Positives, Size, Targets

STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class AtssPrediction:
    """What the head says at each of the N anchors.

    Attributes:
        anchors: one square anchor per cell.
        logits: (B, N, classes).
        deltas: (B, N, 4).
        centerness: (B, N) logits.
    """

    anchors: Anchors
    logits: Tensor
    deltas: Tensor
    centerness: Tensor


class AtssHead(Head):
    """Anchor-based one-stage head with adaptive assignment and centerness (ATSS)."""

    def __init__(
        self,
        config: AtssConfig,
        *,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        positive_config: PositiveQueryConfig,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.config, self.num_classes, self.strides = config, num_classes, tuple(strides)
        self.invalid_negatives = positive_config.official_defects
        self.cls_tower = conv_tower(channels, config.convs, groups)
        self.reg_tower = conv_tower(channels, config.convs, groups)
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in strides)
        init_convs(self)
        init_prior(self.cls)

    def predict(self, pyramid: Sequence[Tensor]) -> AtssPrediction:
        logits, deltas, centerness = [], [], []
        for level, scale in zip(pyramid, self.scales, strict=True):
            logits.append(self.cls(self.cls_tower(level)))
            hidden = self.reg_tower(level)
            deltas.append(self.reg(hidden).float() * scale)
            centerness.append(self.centerness(hidden))
        return AtssPrediction(
            anchors_for(pyramid, self.strides, [self.config.anchor_scale]),
            flatten_maps(logits, self.num_classes).float(),
            flatten_maps(deltas, 4),
            flatten_maps(centerness, 1).squeeze(-1).float(),
        )

    def forward(
        self, pyramid: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> HeadOutput:
        prediction = self.predict(pyramid)
        assigned = self.assign(prediction.anchors, sizes, targets)
        losses = self._losses(prediction, assigned, targets)
        return HeadOutput(losses, self._positives(pyramid, prediction.anchors, assigned, targets))

    @torch.no_grad()
    def assign(self, anchors: Anchors, sizes: Sequence[Size], targets: Sequence[Targets]) -> Tensor:
        """(B, N) the object of each anchor, ``BACKGROUND``, or ``IGNORED`` in the padding."""
        objects, _ = pad_objects(targets)
        valid = anchors.valid(sizes)
        return match_atss(anchors.boxes, anchors.counts, valid, objects, self.config.topk)

    def _losses(
        self, prediction: AtssPrediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        objects, object_labels = pad_objects(targets)
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        number = assigned[image, anchor]
        labels = torch.full_like(assigned, self.num_classes)
        labels[image, anchor] = object_labels[image, number]
        boxes = objects[image, number]
        centerness = centerness_targets(prediction.anchors.centres[anchor], boxes)

        per_image = (assigned >= 0).sum(1).clamp(min=1)
        positives, total = normaliser(torch.stack((per_image.sum().float(), centerness.sum())))
        predicted = decode_deltas(
            prediction.anchors.boxes[anchor], prediction.deltas[image, anchor], STDS
        )
        cls = sigmoid_focal_loss(
            prediction.logits.flatten(0, 1), labels.flatten(), (assigned != IGNORED).flatten()
        )
        return {
            "cls": cls / positives,
            "giou": giou_loss(predicted, boxes, centerness) / total,
            "centerness": binary_cross_entropy(prediction.centerness[image, anchor], centerness)
            / positives,
        }

    def _positives(
        self,
        pyramid: Sequence[Tensor],
        anchors: Anchors,
        assigned: Tensor,
        targets: Sequence[Targets],
    ) -> list[Positives]:
        features = flatten_maps(pyramid, pyramid[0].shape[1])
        positives = []
        for of_image, image_features, objects in zip(assigned, features, targets, strict=True):
            boxes, negative = anchors.boxes, of_image == -1
            if self.invalid_negatives:
                # The original also draws padding queries from anchors in the image's padding,
                # whose boxes it lost (method.md 49).
                boxes = boxes * (of_image != IGNORED)[:, None]
                negative = of_image < 0
            positive = (of_image >= 0).nonzero().squeeze(1)
            number = of_image[positive]
            positives.append(
                Positives(
                    boxes=boxes,
                    features=image_features,
                    positive=positive,
                    negative=negative.nonzero().squeeze(1),
                    labels=objects.labels[number],
                    targets=objects.boxes[number],
                )
            )
        return positives

    @torch.no_grad()
    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        prediction = self.predict(pyramid)
        return detect_dense(
            prediction.logits.sigmoid(),
            decode_deltas(prediction.anchors.boxes, prediction.deltas, STDS),
            prediction.anchors.counts,
            sizes,
            quality=prediction.centerness.sigmoid(),
            threshold=self.config.test_score,
            candidates=self.config.test_nms_pre,
            iou=self.config.test_nms,
            keep=self.config.test_keep,
        )

    def class_scores(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        prediction = self.predict(pyramid)
        return sum_of_scores(prediction.logits.sigmoid(), prediction.anchors.valid(sizes))


def centerness_targets(centres: Tensor, boxes: Tensor) -> Tensor:
    """(P,) 1 where a centre (P, 2) is in the middle of its box (P, 4), to 0 at its edge (FCOS)."""
    before, after = centres - boxes[:, :2], boxes[:, 2:] - centres
    ratio = torch.minimum(before, after) / torch.maximum(before, after)
    return ratio.prod(1).sqrt()
