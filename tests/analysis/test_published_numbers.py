"""What each analysis publishes, computed once more from the detector by plain loops.

Image by image, without batches: on images as they are, and on the canvas of large-scale jitter,
where the detector takes for image what no number may count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from analysis_samples import BOTH, DATA, dataset, levels_of, subject
from numpy.typing import NDArray
from scipy.stats import entropy
from torch import Tensor

from codetr.analysis import analysis
from codetr.analysis.attention import sampling, splat
from codetr.analysis.frame import measure
from codetr.analysis.iof_iob import GRID
from codetr.analysis.maps import to_image
from codetr.config import JitterConfig
from codetr.data.loader import collate
from codetr.matching.hungarian import hungarian
from codetr.structures import ImageBatch, Memory, Size, Targets

SIDE = 96
CANVAS = DATA.model_copy(update={"jitter": JitterConfig(enabled=True, canvas=SIDE)})
SIZES = [(48, 64), (64, 48), (48, 64), (40, 72)]
EMPTY = 2
BRANCHES = ("query", "atss", "faster_rcnn")


@dataclass
class One:
    """An image: as the detector is given it, its memory, and its own (height, width)."""

    batch: ImageBatch
    targets: Targets
    memory: Memory
    size: Size

    def cut(self, values: Tensor | None = None) -> list[Tensor]:
        """(h, w, …) of the memory's levels, or of ``values`` in its place: the cells whose first
        pixel lies in the image."""
        levels = []
        for level in levels_of(self.memory, 0, values):
            rows, columns = (
                sum(cell * whole // cells < own for cell in range(cells))
                for cells, whole, own in zip(
                    level.shape[:2], self.batch.pixels.shape[-2:], self.size, strict=True
                )
            )
            levels.append(level[:rows, :columns])
        return levels

    def objects(self) -> NDArray[np.bool_]:
        """(H, W), whether a box covers the pixel's centre."""
        height, width = self.size
        return np.array(
            [
                [
                    any(
                        left <= x + 0.5 < right and top <= y + 0.5 < bottom
                        for left, top, right, bottom in self.targets.boxes.tolist()
                    )
                    for x in range(width)
                ]
                for y in range(height)
            ]
        )


@pytest.fixture(scope="module", params=["plain", "canvas"])
def data(request, tmp_path_factory):
    config = DATA if request.param == "plain" else CANVAS
    return dataset(tmp_path_factory.mktemp("data"), SIZES, empty=(EMPTY,), config=config)


@pytest.fixture(scope="module")
def detector():
    return subject(*BOTH)


@pytest.fixture
def images(data, detector):
    found = []
    for place in range(len(SIZES)):
        pixels, targets = data[place]
        batch, _ = collate([(pixels, targets)], data.canvas)
        with torch.no_grad():
            memory = detector.model.encode(batch)
        found.append(One(batch, targets, memory, (pixels.shape[1], pixels.shape[2])))
    assert all((one.size == one.batch.sizes[0]) == (data.canvas is None) for one in found)
    return found


@pytest.fixture
def found(request, data, detector):
    """What the analysis of that name finds, several images at a time."""
    return measure(analysis(request.param), detector, data, batch_size=3)


def norm_scores(one: One) -> NDArray[Any]:
    """(H, W) of equation 7."""
    levels = [level.norm(dim=-1) for level in one.cut()]
    maps = [to_image(level / level.max(), one.size) for level in levels]
    return np.mean([map_.double().numpy() for map_ in maps], axis=0)


@pytest.mark.parametrize("found", ["discriminability", "conflicts", "queries"], indirect=True)
def test_pictures_show_the_image_alone(found, images) -> None:
    for number in (0, 1, 3):
        assert found.arrays[f"image/{number}"].shape == (*images[number].size, 3)


@pytest.mark.parametrize("found", ["discriminability"], indirect=True)
def test_discriminability(found, images) -> None:
    rows = []
    for one in images:
        score, objects = norm_scores(one), one.objects()
        if objects.any():
            rows.append((score[objects].mean(), score[~objects].mean(), score.std(ddof=1)))
    assert len(rows) == len(SIZES) - 1
    assert found.numbers == pytest.approx(
        {
            "foreground": fmean(inside for inside, _, _ in rows),
            "background": fmean(outside for _, outside, _ in rows),
            "contrast": fmean(inside - outside for inside, outside, _ in rows),
            "separation": fmean((inside - outside) / spread for inside, outside, spread in rows),
        },
        rel=1e-4,
    )  # fmt: skip


def attention_of(model: Any, one: One) -> Tensor:
    """(T,) mean over layers, queries and heads of what each token is given."""
    heard: list[Tensor] = []

    def hear(module: Any, given: Any) -> None:
        query, frame, memory = given
        heard.append(splat(*sampling(module, query, frame), memory.shapes)[0])

    hooks = [
        layer.cross_attention.register_forward_pre_hook(hear) for layer in model.decoder.layers
    ]
    with torch.no_grad():
        model.decoder([model.queries(one.memory).group], one.memory)
    for hook in hooks:
        hook.remove()
    assert len(heard) == 2
    assert not torch.allclose(heard[0], heard[1])
    return (heard[0] + heard[1]) / 2


@pytest.mark.parametrize("found", ["iof-iob"], indirect=True)
def test_iof_iob(found, images, detector) -> None:
    areas: dict[str, list[float]] = {"encoder": [], "decoder": []}
    curves: dict[str, list[NDArray[Any]]] = {"encoder": [], "decoder": []}
    outside = []
    for one in images:
        levels = one.cut(attention_of(detector.model, one)[None])
        outside.append(1 - sum(float(level.sum()) for level in levels))
        attended = sum(to_image(level, one.size) * level.numel() for level in levels).numpy()
        objects = one.objects()
        if not objects.any():
            continue
        for name, score in (("encoder", norm_scores(one)), ("decoder", attended)):
            within, without = score[objects], score[~objects]
            above = (within[:, None] > without).mean() + (within[:, None] == without).mean() / 2
            areas[name].append(above)
            # The share of objects where so much of the background is above the threshold.
            thresholds = np.quantile(without, 1 - GRID[1:-1])
            curves[name].append(np.array([(within > t).mean() for t in thresholds]))
    assert found.numbers == pytest.approx(
        {
            "encoder_area": fmean(areas["encoder"]),
            "decoder_area": fmean(areas["decoder"]),
            "attention_outside": fmean(outside),
        },
        rel=1e-3,
        abs=1e-6,
    )
    for name, wanted in curves.items():
        np.testing.assert_allclose(found.arrays[name][1:-1], np.mean(wanted, axis=0), atol=0.02)


def cam(model: Any, one: One, branch: str) -> NDArray[Any]:
    """(H, W) Grad-CAM of the classes that are present, divided by its maximum."""
    tokens = one.memory.tokens.clone().requires_grad_()
    memory = replace(one.memory, tokens=tokens)
    if branch == "query":
        prediction = model.decoder([model.queries(memory).group], memory)["query"]
        scores = prediction.logits[-1][0].sigmoid().sum(0)
    else:
        head = model.heads[BRANCHES.index(branch) - 1]
        scores = head.class_scores(model.memory_pyramid(memory), one.batch.sizes)[0]
    sum(scores[label] for label in {*one.targets.labels.tolist()}).backward()
    maps = []
    for features, slopes in zip(one.cut(tokens.detach()), one.cut(tokens.grad), strict=True):
        level = torch.zeros(features.shape[:2])
        for channel in range(features.shape[2]):
            level += slopes[..., channel].mean() * features[..., channel]
        maps.append(to_image(level.clamp(min=0), one.size))
    mean = torch.stack(maps).mean(0).double().numpy()
    return mean / mean.max()


@pytest.mark.parametrize("found", ["conflicts"], indirect=True)
def test_conflicts(found, images, detector) -> None:
    kinds = [(a, b) for a in BRANCHES for b in BRANCHES if a != b]
    by_pair: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    for one in images:
        if not len(one.targets):
            continue
        odds = {name: np.exp(cam(detector.model, one, name)).flatten() for name in BRANCHES}
        for a, b in kinds:
            by_pair[a, b].append(entropy(odds[a], odds[b]))
    kl = {kind: fmean(values) for kind, values in by_pair.items()}

    def apart(name: str, *others: str) -> float:
        return fmean((kl[name, other] + kl[other, name]) / 2 for other in others)

    between = apart("atss", "faster_rcnn")
    assert found.numbers == pytest.approx(
        {f"kl/{a}/{b}": value for (a, b), value in kl.items()}
        | {
            "distance/atss": between,
            "distance/faster_rcnn": between,
            "conflict": between,
            "from_all/query": apart("query", "atss", "faster_rcnn"),
            "from_all/atss": apart("atss", "query", "faster_rcnn"),
            "from_all/faster_rcnn": apart("faster_rcnn", "query", "atss"),
            "images_without_objects": 1,
        }
        | {f"zero_maps/{name}": 0 for name in BRANCHES},
        rel=1e-3,
    )


def matched_queries(model: Any, one: One) -> tuple[list[list[float]], dict[int, int]]:
    """Where the queries lie, x and y in pixels, and by the number of each object its query."""
    with torch.no_grad():
        group = model.queries(one.memory).group
        prediction = model.decoder([group], one.memory)["query"]
    logits, boxes, cost = prediction.logits[-1], prediction.boxes[-1], model.config.matching_cost
    ((chosen, objects),) = hungarian(logits, boxes, [one.targets], one.batch.sizes, cost)
    (height, width), places = one.batch.sizes[0], group.reference[0].tolist()
    own = dict(zip(objects.tolist(), chosen.tolist(), strict=True))
    return [[x * width, y * height] for x, y, *_ in places], own


@pytest.mark.parametrize("found", ["queries"], indirect=True)
def test_distances_of_queries(found, images, detector) -> None:
    model = detector.model
    for number, name in enumerate(BRANCHES[1:]):
        near, far = [], []
        for one in images:
            queries, own = matched_queries(model, one)
            with torch.no_grad():
                pyramid = model.memory_pyramid(one.memory)
                given = (pyramid, one.batch.sizes, [one.targets])
                (positives,) = model.heads[number](*given).positives
            free = [query for i, query in enumerate(queries) if i not in own.values()]
            boxes, objects = (
                positives.boxes[positives.positive].tolist(),
                one.targets.boxes.tolist(),
            )
            for (left, top, right, bottom), box in zip(
                boxes, positives.targets.tolist(), strict=True
            ):
                centre = [(left + right) / 2, (top + bottom) / 2]
                near.append(
                    math.dist(centre, queries[own[objects.index(box)]]) / math.hypot(*one.size)
                )
                far.append(
                    fmean(math.dist(centre, query) for query in free) / math.hypot(*one.size)
                )
        assert len(near) > 4
        assert found.numbers[f"distance_matched/{name}"] == pytest.approx(fmean(near), rel=1e-4)
        assert found.numbers[f"distance_unmatched/{name}"] == pytest.approx(fmean(far), rel=1e-4)
        for kind, values in (("matched", near), ("unmatched", far)):
            counts = found.arrays[f"{kind}/{name}"]
            assert counts.sum() == len(values)
            assert (counts * (np.arange(100) + 0.5)).sum() / len(values) == pytest.approx(
                100 * fmean(values), abs=0.5
            )


def test_matches(data, images) -> None:
    """Fewer queries than objects: one of two has none."""
    few = subject("atss", queries={"count": 1})
    found = measure(analysis("instability"), few, data, batch_size=3)
    rows = []
    for one in images:
        with torch.no_grad():
            one = replace(one, memory=few.model.encode(one.batch))  # noqa: PLW2901
        _, own = matched_queries(few.model, one)
        rows += [[one.targets.image_id, own.get(n, -1)] for n in range(len(one.targets))]
    assert found.arrays["matches"].tolist() == rows
    assert found.numbers == {"matched": 0.5}
