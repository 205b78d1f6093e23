"""COCO's twelve numbers and LVIS's, with AP for each class."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import hotcoco
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from numpy.typing import NDArray

from codetr.config import ConfigError
from codetr.data.annotations import Annotations
from codetr.data.coco import CocoDataset
from codetr.metrics.results import require_images, to_array
from codetr.structures import Detections

Engine = Literal["hotcoco", "pycocotools"]

COCO_SUMMARY = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""In the order of the engines' ``stats``."""

LVIS_SUMMARY = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75",
    "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    "APr": "APr", "APc": "APc", "APf": "APf",
    "AR@300": "AR_300", "ARs@300": "AR_small", "ARm@300": "AR_medium", "ARl@300": "AR_large",
}  # fmt: skip
"""LVIS's names, and ours."""


@dataclass(frozen=True)
class Metrics:
    """The result of an evaluation; all numbers are fractions of 1.

    Attributes:
        summary: the standard numbers; NaN where nothing could be measured (no large object).
        per_class: AP by class name; classes without any ground truth are absent.
    """

    summary: dict[str, float]
    per_class: dict[str, float]


def evaluate(
    dataset: CocoDataset, detections: Mapping[int, Detections], engine: Engine = "hotcoco"
) -> Metrics:
    """Compare detections with the ground truth of exactly the images of ``dataset``.

    COCO counts at most 100 detections of a class in an image. LVIS counts 300 in an image over all
    classes, and of those only classes that are annotated there or known to be absent; where a class
    is not annotated exhaustively, detections without a match are not held against the detector.

    Args:
        dataset: an LVIS annotation file gives LVIS's numbers.
        detections: by image id, an entry for every image; boxes in pixels of the original image.
        engine: what computes the numbers; both agree to the bit.

    Raises:
        DataError: names images that are missing or unknown, or a detection that is none.
        ConfigError: pycocotools was chosen for LVIS, which it does not know.
    """
    table = dataset.table
    require_images(detections, table.image_ids.tolist())
    results = to_array({i: detections[i] for i in table.image_ids.tolist()}, table.classes)
    if engine == "pycocotools":
        if dataset.is_lvis:
            raise ConfigError("data.engine: pycocotools has no LVIS metrics; use hotcoco")
        run = _pycocotools(table, results)
    else:
        run = _hotcoco(table, results)
    # Both engines print their summary; ours is the returned value.
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
        run.summarize()
    if dataset.is_lvis:
        stats = run.get_results()
        summary = {ours: stats[theirs] for theirs, ours in LVIS_SUMMARY.items()}
    else:
        summary = dict(zip(COCO_SUMMARY, run.stats, strict=True))
    # The engines write -1 for what is undefined.
    return Metrics(
        {name: float(v) if v >= 0 else float("nan") for name, v in summary.items()},
        _per_class(run.eval["precision"], table.classes.names),
    )


def _per_class(precision: NDArray[np.float64], names: tuple[str, ...]) -> dict[str, float]:
    """AP of each class from (IoU, recall, class, area, detections), of all areas."""
    curves = precision[:, :, :, 0, -1].transpose(2, 0, 1).reshape(len(names), -1)
    return {
        name: float(curve[curve >= 0].mean())
        for name, curve in zip(names, curves, strict=True)
        if (curve >= 0).any()
    }


def _hotcoco(table: Annotations, results: NDArray[np.float64]) -> Any:
    truth = hotcoco.COCO.from_arrays(
        _images(table),
        _categories(table),
        table.image_ids[table.owners()],
        np.array(table.classes.category_ids)[table.labels],
        table.boxes,
        ids=np.arange(1, len(table.ids) + 1),
        area=table.areas,
        iscrowd=table.crowd.astype(np.int64),
    )
    found = truth.load_res(results)
    return hotcoco.COCOeval(truth, found, "bbox", lvis_style=table.lvis is not None)


def _pycocotools(table: Annotations, results: NDArray[np.float64]) -> Any:
    truth = pycocotools.coco.COCO()
    found = pycocotools.coco.COCO()
    categories = _categories(table)
    truth.dataset = {
        "images": _images(table),
        "categories": categories,
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": table.classes.category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image_id, label, box, area, crowd) in enumerate(
                zip(
                    table.image_ids[table.owners()].tolist(),
                    table.labels.tolist(),
                    table.boxes.tolist(),
                    table.areas.tolist(),
                    table.crowd.tolist(),
                    strict=True,
                ),
                1,
            )
        ],
    }
    # Not loadRes: it crashes where there is no detection.
    found.dataset = {
        "images": truth.dataset["images"],
        "categories": categories,
        "annotations": [
            {
                "id": number,
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": box,
                "area": box[2] * box[3],
                "score": score,
                "iscrowd": 0,
            }
            for number, (image_id, *box, score, category_id) in enumerate(results.tolist(), 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
    return pycocotools.cocoeval.COCOeval(truth, found, "bbox")


def _images(table: Annotations) -> list[dict[str, Any]]:
    images = [
        {"id": image_id, "height": height, "width": width}
        for image_id, (height, width) in zip(
            table.image_ids.tolist(), table.sizes.tolist(), strict=True
        )
    ]
    if table.lvis is not None:
        for image, negative, partial in zip(
            images, table.lvis.negative, table.lvis.not_exhaustive, strict=True
        ):
            image["neg_category_ids"] = list(negative)
            image["not_exhaustive_category_ids"] = list(partial)
    return images


def _categories(table: Annotations) -> list[dict[str, Any]]:
    classes = table.classes
    frequency = classes.frequency or (None,) * len(classes)
    return [
        {"id": i, "name": name} | ({"frequency": group} if group else {})
        for i, name, group in zip(classes.category_ids, classes.names, frequency, strict=True)
    ]
