"""COCO's and LVIS's numbers: ours, through codetr.metrics, beside pycocotools and lvis.

    python benchmarks/evaluation.py [--rounds 3] [--images 1000] [--lvis-images 200]

Random objects of 80 and of 1203 classes, and detections near them: 100 of an image, 300 with LVIS.
All numbers, and the AP of every class, must be equal first. Both sides start from an opened
annotation file and detections in memory: ours as the detector gives them, the peers' as the list of
dicts that they take, which is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame import ROOT, Report, alternate, arguments, settings_of, timed

sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from codetr.data import CocoDataset
from codetr.metrics import Metrics, evaluate, to_coco_results
from codetr.metrics.evaluation import COCO_SUMMARY, LVIS_SUMMARY
from codetr.structures import Detections

TOLERANCE = 1e-9
SIDE = 640
Numbers = dict[str, float]
Found = dict[int, Detections]


def main() -> int:
    options = parse_arguments()
    coco = Report(
        "What does COCO's evaluation take?",
        "pycocotools",
        settings_of(options),
        ("hotcoco", "pycocotools", "numpy"),
    )
    lvis = Report(
        "What does LVIS's evaluation take?",
        "lvis",
        settings_of(options),
        ("hotcoco", "lvis", "numpy"),
    )
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        dataset, found = example(Path(folder) / "coco", options.images, classes=80, detections=100)
        compare(coco, dataset, found, of_pycocotools, options.rounds)
        dataset, found = example(
            Path(folder) / "lvis", options.lvis_images, classes=1203, detections=300, lvis=True
        )
        compare(lvis, dataset, found, of_lvis, options.rounds)
    coco.finish("evaluation_coco", options.out)
    lvis.finish("evaluation_lvis", options.out)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=3, images=1000)
    parser.add_argument("--lvis-images", type=int, default=200)
    return parser.parse_args()


def compare(
    report: Report,
    dataset: CocoDataset,
    found: Found,
    peer: Callable[[CocoDataset, Found], Callable[[], tuple[Numbers, Numbers]]],
    rounds: int,
) -> None:
    case, theirs = f"{len(dataset)} images", peer(dataset, found)
    ours = evaluate(dataset, found)
    summary, per_class = theirs()
    report.require_same(case, "summary", ours.summary, summary, TOLERANCE)
    report.require_same(case, "AP of each class", ours.per_class, per_class, TOLERANCE)
    require_meaning(ours)
    turns = {report.peer: timed(theirs), "codetr": timed(lambda: evaluate(dataset, found))}
    report.add(case, alternate(turns, rounds))


def require_meaning(metrics: Metrics) -> None:
    """Two that find nothing agree, too."""
    if not 0.05 < metrics.summary["AP"] < 0.95:
        raise SystemExit(f"the detections are no example: AP {metrics.summary['AP']}")


# ------------------------------------------------------------------------------------- the peers


def of_pycocotools(dataset: CocoDataset, found: Found) -> Callable[[], tuple[Numbers, Numbers]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = to_coco_results(found, dataset.classes)
    with silence():
        truth = COCO(str(dataset.annotations))

    def run() -> tuple[Numbers, Numbers]:
        with silence():
            evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        summary = dict(zip(COCO_SUMMARY, map(defined, evaluation.stats), strict=True))
        return summary, per_class(dataset, evaluation.eval["precision"][:, :, :, 0, -1])

    return run


def of_lvis(dataset: CocoDataset, found: Found) -> Callable[[], tuple[Numbers, Numbers]]:
    np.float = float  # type: ignore[attr-defined]  # lvis wants the name that NumPy 1.24 dropped
    from lvis import LVIS, LVISEval, LVISResults

    logging.getLogger("lvis").setLevel(logging.ERROR)
    results = to_coco_results(found, dataset.classes)
    truth = LVIS(str(dataset.annotations))

    def run() -> tuple[Numbers, Numbers]:
        evaluation = LVISEval(truth, LVISResults(truth, [dict(r) for r in results]), "bbox")
        evaluation.run()
        stats = evaluation.get_results()
        summary = {ours: defined(stats[theirs]) for theirs, ours in LVIS_SUMMARY.items()}
        return summary, per_class(dataset, evaluation.eval["precision"][:, :, :, 0])

    return run


def defined(value: float) -> float:
    """The peers write -1 for what is undefined."""
    return float(value) if value >= 0 else math.nan


def per_class(dataset: CocoDataset, precision: Any) -> Numbers:
    """AP by class from (IoU, recall, class); classes without an object are absent."""
    curves = precision.transpose(2, 0, 1).reshape(len(dataset.classes), -1)
    return {
        name: float(curve[curve >= 0].mean())
        for name, curve in zip(dataset.classes.names, curves, strict=True)
        if (curve >= 0).any()
    }


def silence() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())


# ------------------------------------------------------------------------------------ the example


def example(
    folder: Path, images: int, *, classes: int, detections: int, lvis: bool = False
) -> tuple[CocoDataset, Found]:
    """About seven objects in each image, and so many detections, of which some are theirs."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    truth = [random_objects(draw, int(draw.integers(1, 14)), classes) for _ in range(images)]
    content = {
        "images": [entry(draw, i, truth[i], classes, lvis) for i in range(images)],
        "categories": [
            {"id": c + 1, "name": f"class {c}"} | ({"frequency": "rcf"[c % 3]} if lvis else {})
            for c in range(classes)
        ],
        "annotations": [
            {
                "image_id": i,
                "category_id": int(label) + 1,
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "area": float(np.prod(box[2:] - box[:2])),
                "iscrowd": 0,
            }
            for i, (boxes, labels) in enumerate(truth)
            for box, label in zip(boxes, labels, strict=True)
        ],
    }
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    for image in content["images"]:
        (folder / image["file_name"]).touch()  # no evaluation reads pixels
    path = folder / "instances_val.json"
    path.write_text(json.dumps(content))
    found = {i: detect(draw, *truth[i], classes, detections) for i in range(images)}
    return CocoDataset(path, folder, training=False), found


Objects = tuple[Any, Any]
"""(n, 4) xyxy in pixels, and (n,) labels."""


def random_objects(draw: np.random.Generator, count: int, classes: int) -> Objects:
    sides = np.exp(draw.uniform(np.log(8), np.log(400), (count, 2)))
    corners = draw.uniform(0, SIDE - sides)
    # A quarter of a pixel: what JSON and float32 both hold exactly.
    boxes = (np.concatenate((corners, corners + sides), 1) * 4).round() / 4
    return boxes, draw.integers(0, classes, count)


def entry(
    draw: np.random.Generator, number: int, objects: Objects, classes: int, lvis: bool
) -> dict[str, Any]:
    image: dict[str, Any] = {
        "id": number, "height": SIDE, "width": SIDE, "file_name": f"{number}.jpg",
    }  # fmt: skip
    if lvis:
        present = {int(label) + 1 for label in objects[1]}
        absent = set(draw.integers(1, classes + 1, 40).tolist()) - present
        image["neg_category_ids"] = sorted(absent)
        image["not_exhaustive_category_ids"] = sorted(present)[:1]
    return image


def detect(
    draw: np.random.Generator, boxes: Any, labels: Any, classes: int, count: int
) -> Detections:
    """Each object twice and displaced, mostly with its class and with higher scores; and noise."""
    near = np.repeat(boxes, 2, axis=0)
    sides = np.tile(near[:, 2:] - near[:, :2], 2)
    near = near + draw.normal(0, 0.05, near.shape) * sides
    noise, wrong = random_objects(draw, count - len(near), classes)
    named = np.repeat(labels, 2)
    mistaken = draw.random(len(named)) < 0.1
    named = np.where(mistaken, draw.integers(0, classes, len(named)), named)
    found = np.concatenate((near, noise))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
    scores = np.concatenate((draw.uniform(0.3, 1, len(near)), draw.uniform(0, 0.6, len(noise))))
    return Detections(
        torch.from_numpy(found).float(),
        torch.from_numpy(scores).float(),
        torch.from_numpy(np.concatenate((named, wrong))),
    )


if __name__ == "__main__":
    sys.exit(main())
