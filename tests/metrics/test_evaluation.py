"""COCO's and LVIS's numbers against pycocotools, a naive reference and hand-derived cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_detections import random_detections, random_objects, write_dataset
from torchvision.ops import box_iou

from codetr.config import ConfigError
from codetr.data import CocoDataset, DataError
from codetr.metrics import evaluate, to_coco_results
from codetr.structures import Detections

CATEGORIES = [{"id": i, "name": name} for i, name in ((2, "a"), (5, "b"), (9, "c"), (40, "d"))]
COCO_KEYS = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]


def found(*rows: tuple[list[float], float, int]) -> Detections:
    """Detections of (xyxy, score, class)."""
    return Detections(
        torch.tensor([row[0] for row in rows]).reshape(-1, 4).float(),
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


def coco(directory: Path, seed: int, images: int = 12) -> CocoDataset:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:images].tolist()
    objects = random_objects(rng, ids, [2, 5, 9])
    crowds = set(np.flatnonzero(rng.random(len(objects)) < 0.1).tolist())
    return write_dataset(directory, objects, [{"id": i} for i in ids], CATEGORIES, crowds)


# -------------------------------------------------------------------------------------------- COCO


@pytest.mark.parametrize("seed", range(8))
def test_engines_agree(tmp_path: Path, seed: int) -> None:
    dataset = coco(tmp_path, seed)
    rng = np.random.default_rng(seed)
    detections = random_detections(rng, dataset, noise=150 if seed == 7 else 6, ties=seed % 2 == 1)
    ours = evaluate(dataset, detections, "hotcoco")
    reference = evaluate(dataset, detections, "pycocotools")
    assert list(ours.summary) == COCO_KEYS
    assert ours.summary == pytest.approx(reference.summary, abs=1e-12, nan_ok=True)
    assert ours.per_class == pytest.approx(reference.per_class, abs=1e-12)
    assert ours.per_class.keys() == {"a", "b", "c"}, "without ground truth there is no AP"
    assert ours.summary["AP"] == pytest.approx(np.mean(list(ours.per_class.values())))
    assert 0.1 < ours.summary["AP"] < 0.9 or seed == 7


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_hand_derived_average_precision(tmp_path: Path, engine: Any) -> None:
    box, other = [10.0, 10.0, 100.0, 100.0], [120.0, 120.0, 60.0, 60.0]
    dataset = write_dataset(
        tmp_path, [(1, 2, box), (1, 2, other), (1, 5, box)], [{"id": 1}, {"id": 3}], CATEGORIES
    )
    detections = {
        1: found(
            # IoU 0.8 with the first: a match at seven of ten thresholds (0.5 … 0.8).
            ([10, 10, 110, 90], 0.9, 0),
            ([0, 150, 20, 170], 0.8, 0),
            ([120, 120, 180, 180], 0.7, 0),
        ),
        3: found(),
    }
    metrics = evaluate(dataset, detections, engine)
    # Class a. Up to 0.8: precision 1 for recall 0…0.5 (51 of 101 points), then 2/3 (50 points).
    # Above: the first is false; one of two objects found at rank 3: precision 1/3 up to 0.5.
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    assert metrics.per_class == pytest.approx({"a": (7 * both + 3 * one) / 10, "b": 0.0})
    assert metrics.summary["AP"] == pytest.approx(metrics.per_class["a"] / 2)
    assert metrics.summary["AP50"] == pytest.approx(both / 2)
    assert metrics.summary["AR_1"] == pytest.approx(0.5 * 0.7 / 2)
    assert metrics.summary["AR_100"] == pytest.approx((0.5 * 0.7 + 0.5) / 2)
    assert math.isnan(metrics.summary["AP_small"]), "there is no small object"


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_perfect_and_empty_detections(tmp_path: Path, engine: Any) -> None:
    dataset = coco(tmp_path, 0)
    table = dataset.table
    perfect, nothing = {}, {}
    for i, image_id in enumerate(table.image_ids.tolist()):
        rows = table.of(i)
        labels = torch.from_numpy(table.labels[rows].astype(np.int64))
        perfect[image_id] = Detections(
            torch.from_numpy(table.clipped(i)), torch.ones(len(labels)), labels
        )
        nothing[image_id] = found()
    best, worst = (evaluate(dataset, d, engine) for d in (perfect, nothing))
    assert best.summary["AP"] == pytest.approx(1)
    assert set(worst.summary.values()) == {0.0}
    assert worst.per_class == {"a": 0.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_without_any_ground_truth_nothing_is_defined(tmp_path: Path, engine: Any) -> None:
    dataset = write_dataset(tmp_path, [], [{"id": 1}], CATEGORIES)
    metrics = evaluate(dataset, {1: found(([0, 0, 5, 5], 0.5, 0))}, engine)
    assert all(math.isnan(value) for value in metrics.summary.values())
    assert metrics.per_class == {}


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_a_limit_evaluates_those_images_only(tmp_path: Path, engine: Any) -> None:
    whole = coco(tmp_path, 3)
    detections = random_detections(np.random.default_rng(3), whole)
    part = CocoDataset(whole.annotations, whole.images, training=False, limit=5)
    own = {i: detections[i] for i in part.table.image_ids.tolist()}
    alone = write_dataset(
        tmp_path / "part",
        [
            (i, whole.classes.category_ids[label], box)
            for i, label, box in zip(
                part.table.image_ids[part.table.owners()].tolist(),
                part.table.labels.tolist(),
                part.table.boxes.tolist(),
                strict=True,
            )
        ],
        [{"id": i} for i in own],
        CATEGORIES,
        set(np.flatnonzero(part.table.crowd).tolist()),
    )
    limited = evaluate(part, own, engine)
    assert limited.summary == pytest.approx(evaluate(alone, own, engine).summary, nan_ok=True)
    assert limited.summary["AP"] != evaluate(whole, detections, engine).summary["AP"]


def test_the_order_of_images_does_not_matter(tmp_path: Path) -> None:
    dataset = coco(tmp_path, 5)
    detections = random_detections(np.random.default_rng(5), dataset, ties=True)
    backwards = dict(reversed(detections.items()))
    assert evaluate(dataset, detections) == evaluate(dataset, backwards)


def test_engines_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = coco(tmp_path, 0)
    for engine in ("hotcoco", "pycocotools"):
        evaluate(dataset, random_detections(np.random.default_rng(0), dataset), engine)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- the input


def test_results_format(tmp_path: Path) -> None:
    dataset = coco(tmp_path, 0)
    detections = {7: found(([1, 2, 4, 8], 0.5, 3), ([0, 0, 0, 0], 0.0, 0)), 8: found()}
    assert to_coco_results(detections, dataset.classes) == [
        {"image_id": 7, "category_id": 40, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 0, 0], "score": 0},
    ]


BROKEN: dict[str, tuple[Callable[[Detections], Detections], str]] = {
    "nan": (lambda d: replace(d, boxes=d.boxes * math.nan), "box is not finite"),
    "infinite": (lambda d: replace(d, boxes=d.boxes + math.inf), "box is not finite"),
    "negative": (lambda d: replace(d, boxes=-d.boxes), "negative size"),
    "score": (lambda d: replace(d, scores=d.scores * 3), "score is not within"),
    "nan score": (lambda d: replace(d, scores=d.scores * math.nan), "score is not within"),
    "class": (lambda d: replace(d, labels=d.labels + 4), "class is not one of 4"),
    "no class": (lambda d: replace(d, labels=d.labels - 1), "class is not one of 4"),
    "count": (lambda d: replace(d, labels=d.labels[:1].repeat(9)), r"labels \(1,\), got"),
    "shape": (lambda d: replace(d, boxes=d.boxes[:, :3]), r"boxes \(1, 4\)"),
}


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("case", BROKEN)
def test_names_each_broken_detection(tmp_path: Path, case: str, engine: Any) -> None:
    change, message = BROKEN[case]
    dataset = write_dataset(tmp_path, [(4, 2, [0, 0, 9, 9])], [{"id": 4}], CATEGORIES)
    good = found(([1, 2, 4, 8], 0.5, 0))
    evaluate(dataset, {4: good}, engine)
    with pytest.raises(DataError, match=rf"detections of image 4: .*{message}"):
        evaluate(dataset, {4: change(good)}, engine)


def test_images_must_be_those_of_the_data_set(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [], [{"id": 4}, {"id": 6}], CATEGORIES)
    with pytest.raises(DataError, match="not in the data set: 1 of 2, ids 9"):
        evaluate(dataset, {4: found(), 6: found(), 9: found()})
    with pytest.raises(DataError, match="not even an empty entry, for images: 1 of 2, ids 6"):
        evaluate(dataset, {4: found()})


# -------------------------------------------------------------------------------------------- LVIS


def lvis(directory: Path, seed: int, **options: Any) -> CocoDataset:
    rng = np.random.default_rng(seed)
    categories = [{"id": 3 * k + 1, "name": f"c{k}", "frequency": "rcf"[k % 3]} for k in range(9)]
    ids = list(range(1, 16))
    objects = random_objects(rng, ids, [c["id"] for c in categories[:8]], mean=8)
    images = []
    for i in ids:
        present = {o[1] for o in objects if o[0] == i}
        absent = [c["id"] for c in categories if c["id"] not in present]
        images.append(
            {
                "id": i,
                "neg_category_ids": rng.permutation(absent)[:3].tolist(),
                "not_exhaustive_category_ids": rng.permutation(sorted(present))[:2].tolist(),
            }
        )
    dataset = write_dataset(directory, objects, images, categories)
    assert dataset.is_lvis
    return dataset


def naive_lvis(dataset: CocoDataset, detections: dict[int, Detections]) -> dict[str, np.ndarray]:
    """AP at each of ten thresholds by class, with LVIS's rules written out plainly."""
    table = dataset.table
    assert table.lvis is not None
    thresholds = np.linspace(0.5, 0.95, 10)
    result = {}
    for label, name in enumerate(table.classes.names):
        category = table.classes.category_ids[label]
        outcomes: list[tuple[float, np.ndarray, bool]] = []
        objects = 0
        for i, image_id in enumerate(table.image_ids.tolist()):
            rows = table.of(i)
            truth = torch.from_numpy(table.boxes[rows][table.labels[rows] == label])
            objects += len(truth)
            if not len(truth) and category not in table.lvis.negative[i]:
                continue  # nobody looked for this class here
            best = detections[image_id]
            order = torch.argsort(best.scores, descending=True, stable=True)[:300]
            order = order[best.labels[order] == label]
            truth[:, 2:] += truth[:, :2]
            ious = box_iou(best.boxes[order].double(), truth).numpy()
            taken = np.zeros((10, len(truth)), bool)
            for row, score in zip(ious, best.scores[order].tolist(), strict=True):
                hits = np.zeros(10, bool)
                for t, threshold in enumerate(thresholds):
                    free = np.where(taken[t], -1, row)
                    if len(free) and free.max() >= threshold:
                        hits[t] = taken[t, free.argmax()] = True
                outcomes.append((score, hits, category in table.lvis.not_exhaustive[i]))
        if not objects:
            continue
        outcomes.sort(key=lambda o: -o[0])
        result[name] = np.zeros(10)
        for t in range(10):
            hits = np.array([h[t] for _, h, lenient in outcomes if h[t] or not lenient], float)
            recall = hits.cumsum() / objects
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            result[name][t] = np.mean(
                [max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]
            )
    return result


@pytest.mark.parametrize("seed", range(5))
def test_lvis_agrees_with_a_naive_reference(tmp_path: Path, seed: int) -> None:
    dataset = lvis(tmp_path, seed)
    detections = random_detections(
        np.random.default_rng(seed), dataset, noise=350 if seed == 4 else 10
    )
    metrics = evaluate(dataset, detections)
    expected = naive_lvis(dataset, detections)
    assert metrics.per_class == pytest.approx({n: ap.mean() for n, ap in expected.items()})
    assert "c8" not in metrics.per_class
    every = np.stack(list(expected.values()))
    summary = {"AP": every.mean(), "AP50": every[:, 0].mean(), "AP75": every[:, 5].mean()}
    for group, members in (("r", "c0 c3 c6"), ("c", "c1 c4 c7"), ("f", "c2 c5")):
        summary[f"AP{group}"] = np.mean([expected[name] for name in members.split()])
    assert {name: metrics.summary[name] for name in summary} == pytest.approx(summary)
    sizes = ("small", "medium", "large")
    others = {f"{kind}_{size}" for kind in ("AP", "AR") for size in sizes} | {"AR_300"}
    assert metrics.summary.keys() == summary.keys() | others


def federated(directory: Path, **image: list[int]) -> CocoDataset:
    """Image 1 has an object of class a (rare); image 2 has none and nothing is known of it."""
    categories = [
        {"id": 1, "name": "a", "frequency": "r"},
        {"id": 2, "name": "b", "frequency": "f"},
    ]
    known = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    images = [{"id": 1} | known | image, {"id": 2} | known]
    return write_dataset(directory, [(1, 1, [10, 10, 50, 50])], images, categories)


HIT, MISS = ([10, 10, 60, 60], 0.5, 0), ([100, 100, 150, 150], 0.9, 0)


@pytest.mark.parametrize(
    ("image", "first", "second", "expected"),
    [
        pytest.param({}, [HIT], [], 1, id="found"),
        pytest.param({}, [HIT, MISS], [], 0.5, id="a false detection where the class is annotated"),
        pytest.param({}, [HIT], [MISS], 1, id="nobody looked for the class in image 2"),
        pytest.param({"not_exhaustive_category_ids": [1]}, [HIT, MISS], [], 1, id="not exhaustive"),
        pytest.param({}, [], [], 0, id="nothing found"),
    ],
)
def test_federated_rules(
    tmp_path: Path, image: dict[str, list[int]], first: list, second: list, expected: float
) -> None:
    metrics = evaluate(federated(tmp_path, **image), {1: found(*first), 2: found(*second)})
    assert metrics.per_class == pytest.approx({"a": expected})
    assert metrics.summary["APr"] == pytest.approx(expected)
    assert math.isnan(metrics.summary["APf"])
    assert math.isnan(metrics.summary["APc"])


def test_a_false_detection_counts_where_the_class_is_known_to_be_absent(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "a", "frequency": "r"}]
    images: list[dict[str, Any]] = [
        {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"id": 2, "neg_category_ids": [1], "not_exhaustive_category_ids": []},
    ]
    dataset = write_dataset(tmp_path, [(1, 1, [10, 10, 50, 50])], images, categories)
    metrics = evaluate(dataset, {1: found(HIT), 2: found(MISS)})
    assert metrics.per_class == pytest.approx({"a": 0.5})


def test_lvis_counts_300_detections_of_an_image_over_all_classes(tmp_path: Path) -> None:
    dataset = federated(tmp_path)
    filler = [([0, 0, 5, 5], 0.9, 1)]
    within = evaluate(dataset, {1: found(*filler * 299, HIT), 2: found()})
    beyond = evaluate(dataset, {1: found(*filler * 300, HIT), 2: found()})
    assert within.per_class == pytest.approx({"a": 1})
    assert beyond.per_class == pytest.approx({"a": 0})


def test_pycocotools_does_not_know_lvis(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.engine: pycocotools has no LVIS metrics"):
        evaluate(federated(tmp_path), {1: found(), 2: found()}, "pycocotools")
