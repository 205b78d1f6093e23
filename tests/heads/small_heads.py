"""Heads and images small enough for property tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codetr.config import (
    AnyHeadConfig,
    AtssConfig,
    FasterRcnnConfig,
    FcosConfig,
    GflConfig,
    MaskConfig,
    MaskRcnnConfig,
    PaaConfig,
    PositiveQueryConfig,
    RcnnConfig,
    RetinaNetConfig,
    RpnConfig,
)
from codetr.heads import Head, build_head
from codetr.structures import Size, Targets

STRIDES = (8, 16, 32, 64)
SIZE: Size = (64, 96)
CHANNELS = 16
CLASSES = 3
RPN = RpnConfig(samples=32, train_nms_pre=50, test_nms_pre=40, keep=30)
RCNN = RcnnConfig(samples=16, fc_dim=8, finest_scale=28, test_keep=20)
CONFIGS: dict[str, AnyHeadConfig] = {
    "atss": AtssConfig(test_keep=20),
    "faster_rcnn": FasterRcnnConfig(rpn=RPN, rcnn=RCNN),
    "retinanet": RetinaNetConfig(test_keep=20),
    "fcos": FcosConfig(test_keep=20),
    "paa": PaaConfig(test_keep=20),
    "gfl": GflConfig(test_keep=20),
    "mask_rcnn": MaskRcnnConfig(
        rpn=RPN, rcnn=RCNN, mask=MaskConfig(convs=1, channels=8, roi_size=4)
    ),
}


def small_head(kind: str, seed: int = 0, *, called: str | None = None, **positives: Any) -> Head:
    """A head of a kind, called by it or otherwise: its draws are by its name."""
    torch.manual_seed(seed)
    return build_head(
        CONFIGS[kind],
        name=called or kind,
        channels=CHANNELS,
        num_classes=CLASSES,
        strides=STRIDES,
        positive_config=PositiveQueryConfig(**positives),
        groups=4,
    )


def random_pyramid(batch: int, seed: int = 0, size: Size = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, CHANNELS, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for s in STRIDES
    ]


def random_targets(counts: list[int], seed: int = 0, size: Size = SIZE) -> list[Targets]:
    """Seeded images, so that draws do not depend on the batch."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    targets = []
    for number, count in enumerate(counts):
        corner = torch.rand(count, 2, generator=generator) * extent * 0.6
        sides = 8 + torch.rand(count, 2, generator=generator) * extent * 0.3
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        boxes = torch.cat((corner, corner + sides), -1)
        masks = ellipses(boxes, size)
        targets.append(Targets(boxes, labels, image_id=number, seed=number, masks=masks))
    return targets


def ellipses(boxes: Tensor, size: Size) -> Tensor:
    """(n, h, w) masks of the ellipses that fill the boxes."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    across, down = (2 * x - x1 - x2) / (x2 - x1), (2 * y - y1 - y2) / (y2 - y1)
    return across**2 + down**2 <= 1
