"""Random ground truth on disk and detections for it, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from codetr.data import CocoDataset
from codetr.structures import Detections

SIDE = 200
Objects = list[tuple[int, int, list[float]]]
"""(image id, category id, xywh)."""


def write_dataset(
    directory: Path,
    objects: Objects,
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    crowds: set[int] = frozenset(),  # type: ignore[assignment]
) -> CocoDataset:
    """A validation set; the positions of ``objects`` in ``crowds`` are crowd regions."""
    (directory / "val").mkdir(parents=True, exist_ok=True)
    for entry in images:
        entry |= {"width": SIDE, "height": SIDE, "file_name": f"{entry['id']}.png"}
        path = directory / "val" / entry["file_name"]
        if not path.exists():
            Image.new("L", (SIDE, SIDE)).save(path)
    annotations = [
        {
            "id": number + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            # Segments are smaller than their boxes; size groups go by this.
            "area": 0.7 * box[2] * box[3],
            "iscrowd": int(number in crowds),
        }
        for number, (image_id, category_id, box) in enumerate(objects)
    ]
    path = directory / "instances_val.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return CocoDataset(path, directory / "val", training=False)


def random_objects(
    rng: np.random.Generator, image_ids: list[int], category_ids: list[int], mean: float = 5
) -> Objects:
    objects: Objects = []
    for image_id in image_ids:
        for _ in range(rng.poisson(mean)):
            side = np.exp(rng.uniform(np.log(4), np.log(180), 2))
            corner = rng.uniform(0, SIDE - side)
            box = [round(float(v), 2) for v in (*corner, *side)]
            objects.append((image_id, int(rng.choice(category_ids)), box))
    return objects


def random_detections(
    rng: np.random.Generator, dataset: CocoDataset, noise: int = 6, ties: bool = False
) -> dict[int, Detections]:
    """Most objects found, displaced, some twice or as another class; and noise."""
    table = dataset.table
    found = {}
    for i, image_id in enumerate(table.image_ids.tolist()):
        rows = table.of(i)
        boxes = np.repeat(table.clipped(i), 2, axis=0)
        labels = np.repeat(table.labels[rows], 2)
        size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + rng.normal(0, 0.06, boxes.shape) * size
        corners = rng.uniform(0, SIDE, (noise, 2, 2))
        random = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        boxes = np.concatenate([boxes, random])
        labels = np.concatenate([labels, rng.integers(0, len(table.classes), noise)])
        wrong = rng.random(len(labels)) < 0.1
        labels = np.where(wrong, rng.integers(0, len(table.classes), len(labels)), labels)
        scores = rng.random(len(labels))
        if ties:
            scores = scores.round(1)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        keep = rng.random(len(labels)) < 0.8
        found[image_id] = Detections(
            torch.from_numpy(boxes[keep]).float(),
            torch.from_numpy(scores[keep]).float(),
            torch.from_numpy(labels[keep].astype(np.int64)),
        )
    return found
