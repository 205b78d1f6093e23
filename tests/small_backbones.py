"""One small backbone of each family."""

from __future__ import annotations

from typing import Any

RESNET = {"name": "resnet18", "width": 8, "pretrained": False}
SWIN = {"name": "swin_tiny", "width": 16, "depths": [1, 2, 2, 1], "window": 4, "pretrained": False}
VIT = {
    "name": "eva02_large",
    "width": 64,
    "depth": 3,
    "window": 3,
    "global_every": 3,
    "position_grid": 4,
    "pretrained": False,
}
SMALL: dict[str, dict[str, Any]] = {"resnet": RESNET, "swin": SWIN, "vit": VIT}
