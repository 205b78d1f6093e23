"""Detections in COCO's form, validated: the engines accept nonsense in silence, or crash on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codetr.data.annotations import Classes
from codetr.data.errors import DataError
from codetr.structures import Detections

COLUMNS = 7
"""image id, x, y, width, height, score, category id."""


def to_array(detections: Mapping[int, Detections], classes: Classes) -> NDArray[np.float64]:
    """(n, 7) rows of image id, x, y, width, height, score, category id; pixels.

    Raises:
        DataError: names the first image with a wrong shape, a box that is not finite or of
            negative size, a score outside [0, 1] or NaN, or a class that does not exist.
    """
    category_ids = np.array(classes.category_ids, np.float64)
    rows = [np.zeros((0, COLUMNS))]
    for image_id, found in detections.items():
        _validate(image_id, found, len(classes))
        boxes = found.boxes.detach().double().cpu().numpy()
        array = np.empty((len(found), COLUMNS))
        array[:, 0] = image_id
        array[:, 1:3] = boxes[:, :2]
        array[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
        array[:, 5] = found.scores.detach().double().cpu().numpy()
        array[:, 6] = category_ids[found.labels.cpu().numpy()]
        rows.append(array)
    return np.concatenate(rows)


def to_coco_results(detections: Mapping[int, Detections], classes: Classes) -> list[dict[str, Any]]:
    """COCO's results format, as evaluation servers take it.

    Args:
        detections: by image id, in pixels of the original images.
        classes: of the data set.

    Raises:
        DataError: as :func:`to_array`.
    """
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_id),
            "bbox": box,
            "score": score,
        }
        for image_id, *box, score, category_id in to_array(detections, classes).tolist()
    ]


def require_images(detections: Mapping[int, Detections], image_ids: Collection[int]) -> None:
    """Every image must have an entry, if only an empty one, and there must be no others.

    Raises:
        DataError: an image was forgotten, which would only look like a low AP, or is unknown.
    """
    known = set(image_ids)
    for ids, what in (
        (detections.keys() - known, "detections for images that are not in the data set"),
        (known - detections.keys(), "no detections, not even an empty entry, for images"),
    ):
        if ids:
            first = ", ".join(map(str, sorted(ids)[:3]))
            raise DataError(
                f"{what}: {len(ids)} of {len(known)}, ids {first}{', …' * (len(ids) > 3)}"
            )


def _validate(image_id: int, found: Detections, classes: int) -> None:
    count = len(found.scores)
    if found.boxes.shape != (count, 4) or found.labels.shape != (count,):
        raise DataError(
            f"detections of image {image_id}: {count} scores need boxes ({count}, 4) and labels "
            f"({count},), got {tuple(found.boxes.shape)} and {tuple(found.labels.shape)}"
        )
    for wrong, what in (
        (~torch.isfinite(found.boxes).all(1), "box is not finite"),
        ((found.boxes[:, 2:] < found.boxes[:, :2]).any(1), "box has a negative size"),
        (~((found.scores >= 0) & (found.scores <= 1)), "score is not within 0..1"),
        ((found.labels < 0) | (found.labels >= classes), f"class is not one of {classes}"),
    ):
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise DataError(
                f"detections of image {image_id}: {what}: box {found.boxes[i].tolist()}, "
                f"score {found.scores[i].item()}, class {found.labels[i].item()}"
            )
