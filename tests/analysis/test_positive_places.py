"""Where queries and positives lie, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analysis_samples import BOTH, dataset, subject
from matplotlib.figure import Figure
from tiny_training import FASTER_RCNN, tiny_batch

from codetr.analysis.frame import measure
from codetr.analysis.queries import (
    Queries,
    assigned_objects,
    draw_links,
    draw_objects,
    head_colours,
    positive_centres,
    query_distances,
)
from codetr.boxes import xyxy_to_cxcywh
from codetr.structures import ImageBatch, Positives, Targets


def test_distances_by_hand() -> None:
    """A 3-4-5 image of 30 x 40: the diagonal is 50."""
    queries = torch.tensor([[0.0, 0.0], [40.0, 30.0], [3.0, 4.0], [10.0, 0.0]])
    positives = torch.tensor([[0.0, 10.0], [3.0, 0.0], [20.0, 20.0]])
    matched = (torch.tensor([1, 2]), torch.tensor([1, 0]))  # object 2 has no query
    objects = torch.tensor([1, 0, 2])
    own, others = query_distances(positives, objects, queries, matched, (30, 40))
    assert own == pytest.approx([math.hypot(40, 20) / 50, 4 / 50])
    wanted = [
        (math.hypot(x - 0, y - 0) + math.hypot(x - 10, y - 0)) / 2 / 50
        for x, y in positives.tolist()
    ]
    assert others == pytest.approx(wanted)


def test_without_free_queries_there_is_no_distance_from_them() -> None:
    matched = (torch.tensor([0]), torch.tensor([0]))
    own, others = query_distances(
        torch.zeros(1, 2), torch.tensor([0]), torch.ones(1, 2), matched, (3, 4)
    )
    assert own == pytest.approx([math.sqrt(2) / 5])
    assert len(others) == 0


def test_positives_know_their_objects() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [2, 2, 8, 6]])
    targets = Targets(boxes, torch.tensor([1, 0, 1]))
    positives = Positives(
        boxes=torch.tensor([[9.0, 9, 9, 9], [0, 0, 2, 2], [4, 4, 8, 6], [0, 0, 4, 8]]),
        features=torch.zeros(4, 1),
        positive=torch.tensor([1, 2, 3]),
        negative=torch.tensor([0]),
        labels=torch.tensor([0, 1, 1]),
        targets=boxes[[1, 2, 0]],
    )
    assert assigned_objects(positives, targets).tolist() == [1, 2, 0]
    assert positive_centres(positives).tolist() == [[1, 1], [6, 5], [2, 4]]


def test_counts_and_distances_of_a_detector(tmp_path) -> None:
    """The numbers of a data set from the head's own output, image by image."""
    one, data = subject(*BOTH), dataset(tmp_path, [(48, 64)] * 3, empty=(1,))
    found = measure(Queries, one, data)
    counts = dict.fromkeys(one.model.config.head_names, 0)
    covered = dict.fromkeys(counts, 0)
    for place in range(3):
        pixels, targets = data[place]
        batch, _ = tiny_batch([0], [0])
        batch.pixels, batch.sizes = pixels[None], [(48, 64)]
        with torch.no_grad():
            pyramid = one.model.memory_pyramid(one.model.encode(batch))
            for name, head in zip(counts, one.model.heads, strict=True):
                (positives,) = head(pyramid, batch.sizes, [targets]).positives
                counts[name] += len(positives.positive)
                covered[name] += len({tuple(box) for box in positives.targets.tolist()})
    assert found.facts["objects"] == 4
    for name, count in counts.items():
        assert found.numbers[f"positives_per_object/{name}"] == count / 4
        assert found.numbers[f"objects_without/{name}"] == 1 - covered[name] / 4
        assert found.arrays[f"unmatched/{name}"].sum() == count
        assert found.arrays[f"matched/{name}"].sum() == count
    assert found.numbers["positives_per_object/atss"] > 1


def test_a_sampler_hides_positives_from_the_decoder_and_not_from_the_count(tmp_path) -> None:
    """An R-CNN that is given one positive an image, where each of two objects is one itself."""
    small = {**FASTER_RCNN, "rcnn": {**FASTER_RCNN["rcnn"], "samples": 4}}
    one, data = subject(small, "atss"), dataset(tmp_path, [(48, 64)] * 3)
    found = measure(Queries, one, data).numbers
    head, every = one.model.heads[0], 0
    for place in range(3):
        pixels, targets = data[place]
        batch, sizes = ImageBatch(pixels[None], [(48, 64)]), [(48, 64)]
        with torch.no_grad():
            pyramid = one.model.memory_pyramid(one.model.encode(batch))
            (proposals,) = head.rpn.propose(head.rpn(pyramid), sizes, head.config.rpn.train_nms_pre)
        candidates = torch.cat((targets.boxes, proposals)).tolist()
        every += sum(
            max(overlap(candidate, box) for box in targets.boxes.tolist()) >= 0.5
            for candidate in candidates
        )
    assert found["positives_per_object/faster_rcnn"] == every / 6 >= 1
    assert found["queries_per_object/faster_rcnn"] == 3 / 6
    assert found["objects_without/faster_rcnn"] == 0
    assert found["queries_per_object/atss"] == found["positives_per_object/atss"]


@pytest.mark.parametrize(("limits", "wanted"), [({"max": 3}, 3 / 2), ({"enabled": False}, 0)])
def test_the_decoder_is_handed_what_the_settings_let_through(tmp_path, limits, wanted) -> None:
    one = subject("atss", positive_queries=limits)
    found = measure(Queries, one, dataset(tmp_path, [(48, 64)] * 2)).numbers
    assert found["positives_per_object/atss"] > 3 / 2
    assert found["queries_per_object/atss"] == wanted


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two xyxy boxes."""
    sides = [
        max(min(first[axis + 2], second[axis + 2]) - max(first[axis], second[axis]), 0)
        for axis in (0, 1)
    ]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    shared = math.prod(sides)
    return shared / (sum(areas) - shared)


def test_examples_are_in_the_pixels_of_their_picture(tmp_path) -> None:
    one, data = subject("atss"), dataset(tmp_path, [(48, 64)])
    found = measure(Queries, one, data).arrays
    assert found["image/0"].shape == (48, 64, 3)
    _, targets = data[0]
    np.testing.assert_allclose(found["boxes/0"], targets.boxes)
    assert len(found["points/0/query"]) == 2
    centres = xyxy_to_cxcywh(targets.boxes)[:, :2]
    nearest = torch.cdist(torch.from_numpy(found["points/0/atss"]), centres).min(1).values
    assert float(nearest.max()) < 24


def test_each_query_is_linked_with_its_object(tmp_path) -> None:
    found = measure(Queries, subject("atss"), dataset(tmp_path, [(48, 64)]))
    boxes = found.arrays["boxes/0"]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert sorted(found.arrays["objects/0/query"]) == [0, 1]
    for head in ("query", "atss"):
        axes = Figure().subplots()
        draw_links(axes, found, 0, head, "red")
        points = found.arrays[f"points/0/{head}"]
        objects = found.arrays[f"objects/0/{head}"]
        assert len(axes.lines) == len(points)
        for line, point, number in zip(axes.lines, points, objects, strict=True):
            np.testing.assert_allclose(line.get_xydata(), [point, centres[number]])


def test_every_head_has_a_colour_of_its_own() -> None:
    """The paper's where the paper has one."""
    colours = head_colours(["atss", "faster_rcnn", "paa", "retinanet", "fcos", "gfl", "mask_rcnn"])
    assert (colours["query"], colours["faster_rcnn"], colours["atss"]) == ("red", "blue", "orange")
    assert len({*colours.values()}) == len(colours) == 8


def test_objects_are_drawn_in_the_images_own_pixels(tmp_path) -> None:
    """A box from edge to edge frames the picture; what lies beyond is cut off."""
    found = measure(Queries, subject("atss"), dataset(tmp_path, [(48, 64)]))
    found.arrays["boxes/0"] = np.array([[0.0, 0, 64, 48], [-5, -5, 90, 90]])
    axes = Figure().subplots()
    draw_objects(axes, found, 0)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 64), (48, 0))
    assert axes.images[0].get_extent() == [0, 64, 48, 0]
    frame = axes.lines[0].get_xydata()
    assert (frame.min(0).tolist(), frame.max(0).tolist()) == ([0, 0], [64, 48])
