"""What the one-stage heads share: two towers, the hand-over of positives, detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codetr.config import OneStageConfig
from codetr.heads.anchors import Anchors
from codetr.heads.dense import conv_tower, detect_dense, flatten_maps, init_convs, init_prior
from codetr.heads.head import Head, HeadContext
from codetr.losses import sigmoid_focal_loss
from codetr.matching.max_iou import BACKGROUND
from codetr.matching.objects import pad_objects
from codetr.structures import Detections, HeadOutput, Positives, Size, Targets


@dataclass
class Prediction:
    """What a head says at each of the N anchors.

    Attributes:
        anchors: where.
        logits: (B, N, classes).
        deltas: (B, N, values) the box, in the head's own terms: see :meth:`OneStageHead.decode`.
        quality: (B, N) logits of centerness or of the predicted IoU; None without such a branch.
    """

    anchors: Anchors
    logits: Tensor
    deltas: Tensor
    quality: Tensor | None


@dataclass
class Matched:
    """An assignment as the losses need it; the P positives of the batch are laid end to end.

    Attributes:
        labels: (B, N) class of each anchor's object, ``num_classes`` where it has none.
        image, anchor: (P,) where the positives are.
        boxes: (P, 4) their objects, xyxy in pixels.
        centres: (P, 2) their own centres in pixels.
        strides: (P,) of their levels in pixels.
        predicted: (P, 4) the boxes that the head predicts there, xyxy in pixels.
    """

    labels: Tensor
    image: Tensor
    anchor: Tensor
    boxes: Tensor
    centres: Tensor
    strides: Tensor
    predicted: Tensor


class OneStageHead(Head):
    """Towers for class and box on every level, with weights that the levels share.

    A kind of head says where its anchors are, what its box branch means, which anchors are
    positive and what the losses are.
    """

    config: OneStageConfig

    def __init__(
        self,
        config: OneStageConfig,
        context: HeadContext,
        *,
        shapes: int = 1,
        values: int = 4,
        quality: bool = False,
        norm: bool = True,
        bias: bool = False,
        scaled: bool = True,
    ) -> None:
        """
        Args:
            config: of the head.
            context: the detector around it.
            shapes: anchors on each cell.
            values: that describe a box.
            quality: with a branch for the box's quality, beside that for the box.
            norm: group norm after the towers' convolutions.
            bias: of the towers' convolutions.
            scaled: each level multiplies the box branch by a learned scalar.
        """
        super().__init__()
        self.config, self.num_classes, self.strides = config, context.num_classes, context.strides
        self.values, self.official_defects = values, context.official_defects
        channels, groups = context.channels, context.groups if norm else None
        self.cls_tower = conv_tower(channels, config.convs, groups, bias=bias)
        self.reg_tower = conv_tower(channels, config.convs, groups, bias=bias)
        self.cls = nn.Conv2d(channels, shapes * self.num_classes, 3, padding=1)
        self.reg = nn.Conv2d(channels, shapes * values, 3, padding=1)
        self.quality = nn.Conv2d(channels, shapes, 3, padding=1) if quality else None
        self.scales = nn.ParameterList(
            nn.Parameter(torch.ones(())) for _ in (self.strides if scaled else ())
        )
        init_convs(self)
        init_prior(self.cls)

    def anchors(self, pyramid: Sequence[Tensor]) -> Anchors:
        """Of all cells of the maps."""
        raise NotImplementedError

    def decode(self, anchors: Tensor, strides: Tensor, deltas: Tensor) -> Tensor:
        """Boxes (..., 4), xyxy in pixels, from (..., values) predicted at (..., 4) anchors."""
        raise NotImplementedError

    def assign(
        self, prediction: Prediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> Tensor:
        """(B, N) the object of each anchor, ``BACKGROUND``, or ``IGNORED``, as in the padding."""
        raise NotImplementedError

    def _losses(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, pyramid: Sequence[Tensor]) -> Prediction:
        logits, deltas, quality = [], [], []
        for number, level in enumerate(pyramid):
            logits.append(self.cls(self.cls_tower(level)))
            hidden = self.reg_tower(level)
            values = self.reg(hidden).float()
            deltas.append(values * self.scales[number] if len(self.scales) else values)
            if self.quality is not None:
                quality.append(self.quality(hidden))
        return Prediction(
            self.anchors(pyramid),
            flatten_maps(logits, self.num_classes).float(),
            flatten_maps(deltas, self.values),
            flatten_maps(quality, 1).squeeze(-1).float() if quality else None,
        )

    def forward(
        self, pyramid: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> HeadOutput:
        prediction = self.predict(pyramid)
        with torch.no_grad():
            assigned = self.assign(prediction, sizes, targets)
        losses = self._losses(prediction, assigned, targets)
        return HeadOutput(
            losses, self._positives(pyramid, prediction.anchors, assigned, sizes, targets)
        )

    def matched(
        self, prediction: Prediction, assigned: Tensor, targets: Sequence[Targets]
    ) -> Matched:
        objects, object_labels = pad_objects(targets)
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        number = assigned[image, anchor]
        labels = torch.full_like(assigned, self.num_classes)
        labels[image, anchor] = object_labels[image, number]
        anchors = prediction.anchors
        strides = anchors.strides[anchor]
        return Matched(
            labels=labels,
            image=image,
            anchor=anchor,
            boxes=objects[image, number],
            centres=anchors.centres[anchor],
            strides=strides,
            predicted=self.decode(anchors.boxes[anchor], strides, prediction.deltas[image, anchor]),
        )

    def focal_loss(
        self, prediction: Prediction, labels: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Sum over all anchors of labels (B, N), weighted by (B, N)."""
        return sigmoid_focal_loss(
            prediction.logits.flatten(0, 1),
            labels.flatten(),
            None if weights is None else weights.flatten(),
        )

    def _positives(
        self,
        pyramid: Sequence[Tensor],
        anchors: Anchors,
        assigned: Tensor,
        sizes: Sequence[Size],
        targets: Sequence[Targets],
    ) -> list[Positives]:
        features = flatten_maps(pyramid, pyramid[0].shape[1])
        in_image = anchors.valid(sizes) if self.official_defects else None
        positives = []
        for image, (of_image, objects) in enumerate(zip(assigned, targets, strict=True)):
            boxes, negative = anchors.boxes, of_image == BACKGROUND
            if in_image is not None:
                # The original also draws padding queries from anchors in the image's padding,
                # whose boxes it lost (method.md 49).
                boxes, negative = boxes * in_image[image, :, None], of_image < 0
            positive = (of_image >= 0).nonzero().squeeze(1)
            number = of_image[positive]
            positives.append(
                Positives(
                    boxes=boxes,
                    features=features[image],
                    positive=positive,
                    negative=negative.nonzero().squeeze(1),
                    labels=objects.labels[number],
                    targets=objects.boxes[number],
                    per_feature=anchors.per_cell,
                )
            )
        return positives

    @torch.no_grad()
    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        prediction = self.predict(pyramid)
        anchors, quality = prediction.anchors, prediction.quality
        return detect_dense(
            prediction.logits.sigmoid(),
            self.decode(anchors.boxes, anchors.strides, prediction.deltas),
            anchors.counts,
            sizes,
            quality=None if quality is None else quality.sigmoid(),
            threshold=self.config.test_score,
            candidates=self.config.test_nms_pre,
            iou=self.config.test_nms,
            keep=self.config.test_keep,
        )

    def class_scores(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        prediction = self.predict(pyramid)
        valid = prediction.anchors.valid(sizes)
        return (prediction.logits.sigmoid() * valid[..., None]).sum(1)


def count_positives(assigned: Tensor) -> Tensor:
    """Scalar: positives of the batch (B, N), of which every image counts at least one."""
    return (assigned >= 0).sum(1).clamp(min=1).sum().float()
