"""Detectors, memories and data for the tests of the analyses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coco_files
import torch
from tiny_training import FASTER_RCNN, tiny_detector, tiny_training
from torch import Tensor

from codetr.analysis.frame import Subject
from codetr.checkpoint import Checkpoint
from codetr.config import DataConfig, DetectorConfig
from codetr.data import Classes, CocoDataset, open_dataset
from codetr.detector import CoDETR
from codetr.structures import Memory, Size
from codetr.training import TrainingState

CLASSES = Classes(("cat", "dog", "bird"), (3, 7, 90))
BOTH = ("atss", FASTER_RCNN)
DATA = DataConfig(short_sides=(), crop=False)


def checkpoint_of(config: DetectorConfig, *, epoch: int = 1, seed: int = 7) -> Checkpoint:
    """An untrained detector whose heads are loud enough to have maps, as a checkpoint."""
    state = TrainingState.start(
        config,
        tiny_training(),
        DATA,
        CLASSES,
        seed=seed,
        steps_per_epoch=1,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(seed + epoch)
    for name, parameter in state.model.named_parameters():
        if "backbone" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    state.epoch = epoch
    return state.checkpoint()


def subject(*heads: Any, **settings: Any) -> Subject:
    """An untrained detector; ``settings`` as of ``tiny_detector``."""
    return Subject.of(checkpoint_of(tiny_detector(*heads, **settings)), torch.device("cpu"))


def model(*heads: Any, **settings: Any) -> CoDETR:
    return subject(*heads, **settings).model


def dataset(
    folder: Path, sizes: list[Size], empty: tuple[int, ...] = (), config: DataConfig = DATA
) -> CocoDataset:
    """A validation split: images of these sizes, each with two objects, or with none."""
    images = [coco_files.image(i, width, height) for i, (height, width) in enumerate(sizes)]
    annotations = [
        coco_files.annotation(2 * i + n, i, box, category)
        for i in range(len(sizes))
        if i not in empty
        for n, (box, category) in enumerate((([4, 6, 20 + i, 18], 3), ([30, 20, 14, 25 + i], 7)))
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": coco_files.CATEGORIES,
    }
    coco_files.write(folder, content, "val")
    return open_dataset(config.model_copy(update={"path": folder}), "val")


def random_memory(
    shapes: list[Size], valid: list[list[Size]], channels: int = 5, seed: int = 0
) -> Memory:
    """Noise, also in the padding, of images that cover ``valid[image][level]`` cells."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(h * w for h, w in shapes)
    tokens = torch.randn(len(valid), count, channels, generator=generator)
    padding, ratios = [], []
    for image in valid:
        masks = []
        for (height, width), (used_height, used_width) in zip(shapes, image, strict=True):
            mask = torch.ones(height, width, dtype=torch.bool)
            mask[:used_height, :used_width] = False
            masks.append(mask.flatten())
        padding.append(torch.cat(masks))
        ratios.append([(w / W, h / H) for (H, W), (h, w) in zip(shapes, image, strict=True)])
    return Memory(tokens, shapes, torch.stack(padding), torch.tensor(ratios))


def levels_of(memory: Memory, image: int, values: Tensor | None = None) -> list[Tensor]:
    """(h, w, …) of one image's levels, padding and all, by plain slicing."""
    rows = (memory.tokens if values is None else values)[image]
    found, start = [], 0
    for height, width in memory.shapes:
        found.append(rows[start : start + height * width].reshape(height, width, *rows.shape[1:]))
        start += height * width
    return found
