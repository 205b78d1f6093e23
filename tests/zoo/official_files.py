"""Official checkpoints for tests: empty ones of full size, and the small recorded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    "co_deformable_r50": "co-deformable-detr-r50",
    "co_dino_r50": "co-dino-5scale-r50",
    "co_dino_swin_l": "co-dino-5scale-swin-l",
    "co_dino_vit_l": "co-dino-5scale-vit-l",
}
"""The recorded key lists, and the name that each detector has in the zoo."""


def full_size(model: str) -> dict[str, Tensor]:
    """Name, shape and type of every tensor in the official checkpoint; without values."""
    state = {}
    for line in (GOLDEN / f"keys_full_{model}.txt").read_text().splitlines():
        name, shape, dtype, *_ = line.split("\t")
        sizes = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
        state[name] = torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    return state


def small(detector: str = "co_dino") -> dict[str, Tensor]:
    """The recorded small detector's state dict: values of the original implementation."""
    return torch.load(GOLDEN / detector / "model.pt", weights_only=True)


def write(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    """A file as mmcv writes it."""
    content = {"meta": {"CLASSES": ("a", "b", "c", "d", "e")}, "state_dict": state}
    torch.save(content | beside, path)
    return path
