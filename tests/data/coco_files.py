"""Small COCO data sets on disk, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "bird"}]


def image(image_id: int, width: int = 40, height: int = 30, **more: Any) -> dict[str, Any]:
    return {
        "id": image_id,
        "file_name": f"{image_id}.png",
        "width": width,
        "height": height,
    } | more


def annotation(
    number: int, image_id: int, bbox: list[float], category_id: int = 3, **more: Any
) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": area,
        "iscrowd": 0,
    } | more


def content() -> dict[str, Any]:
    """Four images; the second has no object, the third a crowd and a box reaching outside."""
    return {
        "images": [image(5), image(2), image(11, 20, 50), image(8)],
        "annotations": [
            annotation(100, 11, [-5, 10, 15, 60], 90),
            annotation(101, 5, [1.5, 2.5, 10, 20], 3),
            annotation(102, 11, [0, 0, 20, 20], 7, iscrowd=1),
            annotation(104, 5, [20, 5, 8, 8], 7),
            annotation(103, 8, [0, 0, 40, 30], 3),
        ],
        "categories": [dict(category) for category in reversed(CATEGORIES)],
    }


def write(directory: Path, data: dict[str, Any], split: str = "train", images: bool = True) -> Path:
    """Write annotations, and noise for every image; returns the annotation file."""
    path = directory / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    folder = directory / split
    folder.mkdir(exist_ok=True)
    if images:
        rng = np.random.default_rng(0)
        for entry in data["images"]:
            pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / entry["file_name"])
    return path
