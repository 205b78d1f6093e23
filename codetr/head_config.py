"""Settings of the auxiliary heads; :mod:`codetr.config` has the rest.

Defaults are each head's own paper's with Co-DETR's changes: one stacked convolution, GIoU losses.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from codetr.strict import Strict

Fraction = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(gt=0, le=1)]


# ------------------------------------------------------------------------------- one-stage heads


class OneStageConfig(Strict):
    """What the heads share that predict on every cell of the maps."""

    convs: Annotated[int, Field(ge=0, le=5)] = 1
    """Stacked convolutions before each branch; the stand-alone detectors have 4."""
    test_score: Fraction = 0.0
    """A detection's class score must exceed it."""
    test_nms_pre: PositiveInt = 1000
    """Most candidates of one level that enter non-maximum suppression."""
    test_nms: Threshold = 0.6
    test_keep: PositiveInt = 100
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 2.0

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term by its name: ``TERM_weight`` is that of ``TERM``."""
        names = (name for name in type(self).model_fields if name.endswith("_weight"))
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}


class SquareAnchorConfig(OneStageConfig):
    """What those share that have one square anchor on each cell."""

    topk: PositiveInt = 9
    """Candidates of each object on each level: the nearest anchors, or, of PAA, those of lowest
    loss."""
    anchor_scale: PositiveFloat = 8
    """Side of the anchor in strides."""


class AtssConfig(SquareAnchorConfig):
    """ATSS head (table 1): one-stage, centre-based adaptive assignment."""

    type: Literal["atss"] = "atss"
    centerness_weight: NonNegativeFloat = 1.0


class RetinaNetConfig(OneStageConfig):
    """RetinaNet head (table 1): nine anchors per cell, assigned by IoU thresholds."""

    type: Literal["retinanet"] = "retinanet"
    anchor_scales_per_octave: PositiveInt = 3
    octave_base_scale: PositiveFloat = 4
    ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    positive_iou: Threshold = 0.5
    negative_iou: Threshold = 0.4
    """Anchors between the two are neither, but each object keeps its best anchor."""

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(
                f"negative_iou={self.negative_iou} is above positive_iou={self.positive_iou}"
            )
        return self


class FcosConfig(OneStageConfig):
    """FCOS head (table 1): points instead of anchors, positive near the centre of an object."""

    type: Literal["fcos"] = "fcos"
    centre_radius: PositiveFloat = 1.5
    """Positives are within so many strides of the object's centre, along each axis."""
    range_scale: PositiveFloat = 8
    """A level regresses distances up to so many strides; the coarsest all longer ones."""
    box_scale: PositiveFloat = 8
    """Side, in strides, of the box that a positive point becomes as a query (table 1)."""
    giou_weight: NonNegativeFloat = 1.0
    centerness_weight: NonNegativeFloat = 1.0


class PaaConfig(SquareAnchorConfig):
    """PAA head: a mixture of two Gaussians splits each object's anchors by their losses."""

    type: Literal["paa"] = "paa"
    candidate_iou: Threshold = 0.1
    """Anchors from this overlap on are candidates of the object that they overlap most."""
    giou_weight: NonNegativeFloat = 1.3
    iou_weight: NonNegativeFloat = 0.5


class GflConfig(SquareAnchorConfig):
    """GFL head: class scores that tell the box's quality, and distributions of its four sides."""

    type: Literal["gfl"] = "gfl"
    bins: PositiveInt = 16
    """Largest distance from the centre to a side, in strides: ``bins`` + 1 values."""
    dfl_weight: NonNegativeFloat = 0.25


# ------------------------------------------------------------------------------- two-stage heads


class RpnConfig(Strict):
    """Region proposal network (method.md 40-42)."""

    anchor_scales_per_octave: PositiveInt = 3
    octave_base_scale: PositiveFloat = 4
    ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    samples: PositiveInt = 256
    positive_fraction: Threshold = 0.5
    cls_weight: NonNegativeFloat = 1.0
    l1_weight: NonNegativeFloat = 1.0
    train_nms_pre: PositiveInt = 4000
    test_nms_pre: PositiveInt = 1000
    keep: PositiveInt = 1000
    nms: Threshold = 0.7


class RcnnConfig(Strict):
    """Second stage of Faster R-CNN (method.md 43-45)."""

    samples: PositiveInt = 512
    positive_fraction: Threshold = 0.25
    fc_dim: PositiveInt = 1024
    finest_scale: PositiveFloat = 112
    """RoIs whose side is below twice this many pixels read the finest level."""
    roi_size: PositiveInt = 7
    convs: NonNegativeInt = 0
    """3x3 convolutions with group norm before the fully connected layers; the record model: 4."""
    fcs: Annotated[int, Field(ge=1, le=2)] = 2
    """Fully connected layers; the record model: 1."""
    class_agnostic: bool = False
    """One box for each region instead of one for each class; the record model: True."""
    stds: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.2, 0.2)
    """The units of the predicted deltas; the record model: 0.05, 0.05, 0.1, 0.1."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 10.0
    test_score: Fraction = 0.0
    test_nms: Threshold = 0.5
    test_keep: PositiveInt = 100


class MaskConfig(Strict):
    """Mask branch of Mask R-CNN (section 3 there)."""

    convs: Annotated[int, Field(ge=0, le=5)] = 4
    channels: PositiveInt = 256
    roi_size: PositiveInt = 14
    """Masks are predicted at twice this resolution."""
    weight: NonNegativeFloat = 1.0


class TwoStageConfig(Strict):
    """What the heads share that look at proposals a second time."""

    rpn: RpnConfig = RpnConfig()
    rcnn: RcnnConfig = RcnnConfig()

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term by its name."""
        return {
            "rpn_cls": self.rpn.cls_weight,
            "rpn_l1": self.rpn.l1_weight,
            "rcnn_cls": self.rcnn.cls_weight,
            "rcnn_giou": self.rcnn.giou_weight,
        }


class FasterRcnnConfig(TwoStageConfig):
    """Faster R-CNN head (table 1): RPN on all levels, RCNN on all but the extra one."""

    type: Literal["faster_rcnn"] = "faster_rcnn"


class MaskRcnnConfig(TwoStageConfig):
    """Mask R-CNN head: Faster R-CNN, and a mask for each positive; needs data with masks."""

    type: Literal["mask_rcnn"] = "mask_rcnn"
    mask: MaskConfig = MaskConfig()

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"mask": self.mask.weight}


# ------------------------------------------------------------------------------------- all of them

AnyHeadConfig = (
    AtssConfig
    | FasterRcnnConfig
    | RetinaNetConfig
    | FcosConfig
    | PaaConfig
    | GflConfig
    | MaskRcnnConfig
)
HeadConfig = Annotated[AnyHeadConfig, Field(discriminator="type")]
HEAD_CONFIGS: dict[str, type[AnyHeadConfig]] = {
    head.model_fields["type"].default: head for head in get_args(AnyHeadConfig)
}
HEAD_TYPES = tuple(HEAD_CONFIGS)
