"""Settings of the auxiliary heads; :mod:`codetr.config` has the rest.

Defaults are each head's own paper's with Co-DETR's changes: one stacked convolution, GIoU losses.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

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

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term by its name."""
        raise NotImplementedError


class AtssConfig(OneStageConfig):
    """ATSS head (table 1): one-stage, centre-based adaptive assignment."""

    type: Literal["atss"] = "atss"
    topk: PositiveInt = 9
    """Candidates of each object on each level."""
    anchor_scale: PositiveFloat = 8
    """Side of the square anchor in strides."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 2.0
    centerness_weight: NonNegativeFloat = 1.0

    def loss_weights(self) -> dict[str, float]:
        return {
            "cls": self.cls_weight,
            "giou": self.giou_weight,
            "centerness": self.centerness_weight,
        }


class RetinaNetConfig(OneStageConfig):
    """RetinaNet head (table 1): nine anchors per cell, assigned by IoU thresholds."""

    type: Literal["retinanet"] = "retinanet"
    anchor_scales_per_octave: PositiveInt = 3
    octave_base_scale: PositiveFloat = 4
    ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    positive_iou: Threshold = 0.5
    negative_iou: Threshold = 0.4
    """Anchors between the two are neither, but each object keeps its best anchor."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 2.0

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(
                f"negative_iou={self.negative_iou} is above positive_iou={self.positive_iou}"
            )
        return self

    def loss_weights(self) -> dict[str, float]:
        return {"cls": self.cls_weight, "giou": self.giou_weight}


class FcosConfig(OneStageConfig):
    """FCOS head (table 1): points instead of anchors, positive near the centre of an object."""

    type: Literal["fcos"] = "fcos"
    centre_radius: PositiveFloat = 1.5
    """Positives are within so many strides of the object's centre, along each axis."""
    range_scale: PositiveFloat = 8
    """A level regresses distances up to so many strides; the coarsest all longer ones."""
    box_scale: PositiveFloat = 8
    """Side, in strides, of the box that a positive point becomes as a query (table 1)."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 1.0
    centerness_weight: NonNegativeFloat = 1.0

    def loss_weights(self) -> dict[str, float]:
        return {
            "cls": self.cls_weight,
            "giou": self.giou_weight,
            "centerness": self.centerness_weight,
        }


class PaaConfig(OneStageConfig):
    """PAA head: a mixture of two Gaussians splits each object's anchors by their losses."""

    type: Literal["paa"] = "paa"
    candidate_iou: Threshold = 0.1
    """Anchors from this overlap on are candidates of the object that they overlap most."""
    topk: PositiveInt = 9
    """Candidates of lowest loss that each object keeps on each level."""
    anchor_scale: PositiveFloat = 8
    """Side of the square anchor in strides."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 1.3
    iou_weight: NonNegativeFloat = 0.5

    def loss_weights(self) -> dict[str, float]:
        return {"cls": self.cls_weight, "giou": self.giou_weight, "iou": self.iou_weight}


class GflConfig(OneStageConfig):
    """GFL head: class scores that tell the box's quality, and distributions of its four sides."""

    type: Literal["gfl"] = "gfl"
    topk: PositiveInt = 9
    """Candidates of each object on each level, as in ATSS."""
    anchor_scale: PositiveFloat = 8
    """Side, in strides, of the square anchor that is assigned."""
    bins: PositiveInt = 16
    """Largest distance from the centre to a side, in strides: ``bins`` + 1 values."""
    cls_weight: NonNegativeFloat = 1.0
    giou_weight: NonNegativeFloat = 2.0
    dfl_weight: NonNegativeFloat = 0.25

    def loss_weights(self) -> dict[str, float]:
        return {"cls": self.cls_weight, "giou": self.giou_weight, "dfl": self.dfl_weight}


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


class FasterRcnnConfig(Strict):
    """Faster R-CNN head (table 1): RPN on all levels, RCNN on all but the extra one."""

    type: Literal["faster_rcnn"] = "faster_rcnn"
    rpn: RpnConfig = RpnConfig()
    rcnn: RcnnConfig = RcnnConfig()

    def loss_weights(self) -> dict[str, float]:
        return _two_stage_weights(self.rpn, self.rcnn)


class MaskRcnnConfig(Strict):
    """Mask R-CNN head: Faster R-CNN, and a mask for each positive; needs data with masks."""

    type: Literal["mask_rcnn"] = "mask_rcnn"
    rpn: RpnConfig = RpnConfig()
    rcnn: RcnnConfig = RcnnConfig()
    mask: MaskConfig = MaskConfig()

    def loss_weights(self) -> dict[str, float]:
        return _two_stage_weights(self.rpn, self.rcnn) | {"mask": self.mask.weight}


def _two_stage_weights(rpn: RpnConfig, rcnn: RcnnConfig) -> dict[str, float]:
    return {
        "rpn_cls": rpn.cls_weight,
        "rpn_l1": rpn.l1_weight,
        "rcnn_cls": rcnn.cls_weight,
        "rcnn_giou": rcnn.giou_weight,
    }


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
