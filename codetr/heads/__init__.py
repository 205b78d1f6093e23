"""Auxiliary heads: one file each, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from codetr.config import (
    AnyHeadConfig,
    AtssConfig,
    FasterRcnnConfig,
    FcosConfig,
    GflConfig,
    MaskRcnnConfig,
    PaaConfig,
    PositiveQueryConfig,
    RetinaNetConfig,
)
from codetr.heads.atss import AtssHead
from codetr.heads.faster_rcnn import FasterRcnnHead
from codetr.heads.fcos import FcosHead
from codetr.heads.gfl import GflHead
from codetr.heads.head import Head, HeadContext
from codetr.heads.mask_rcnn import MaskRcnnHead
from codetr.heads.paa import PaaHead
from codetr.heads.retinanet import RetinaNetHead
from codetr.sampling import forked_rng

HEADS: dict[type, Callable[..., Head]] = {
    AtssConfig: AtssHead,
    FasterRcnnConfig: FasterRcnnHead,
    RetinaNetConfig: RetinaNetHead,
    FcosConfig: FcosHead,
    PaaConfig: PaaHead,
    GflConfig: GflHead,
    MaskRcnnConfig: MaskRcnnHead,
}


def build_head(
    config: AnyHeadConfig,
    *,
    name: str,
    channels: int,
    num_classes: int,
    strides: Sequence[int],
    positive_config: PositiveQueryConfig,
    groups: int = 32,
) -> Head:
    """The head of ``config``, initialised at random from torch's current seed and ``name`` alone:
    the same whatever else the detector has, and nothing else draws other numbers because of it.

    Args:
        config: of the head.
        name: unique in the detector (``DetectorConfig.head_names``).
        channels: of the memory pyramid.
        num_classes: without background.
        strides: of the memory pyramid in pixels, finest first, its extra level included.
        positive_config: what becomes of the positives.
        groups: of group norms; a divisor of ``channels``.
    """
    context = HeadContext(
        name, channels, num_classes, tuple(strides), groups, positive_config.official_defects
    )
    with forked_rng(f"head/{name}"):
        return HEADS[type(config)](config, context)
