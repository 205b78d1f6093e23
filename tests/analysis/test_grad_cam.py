"""Grad-CAM against derivatives by hand, and class scores against plain sums."""

from __future__ import annotations

import pytest
import torch
from analysis_samples import BOTH, levels_of, model, random_memory
from small_heads import CONFIGS, SIZE, random_pyramid, random_targets, small_head
from tiny_training import tiny_batch

from codetr.analysis.grad_cam import branch_scores, grad_cam, grad_cams, present_classes
from codetr.analysis.maps import to_image
from codetr.heads.anchors import anchors_for
from codetr.structures import Memory, Targets


def targets(*labels: int) -> Targets:
    return Targets(torch.rand(len(labels), 4), torch.tensor(labels, dtype=torch.long))


def test_by_hand() -> None:
    """Two channels on four cells; the score of class 0 is 3 a0 - 2 b2, that of class 1 is b1.

    Mean gradients for class 0: 3/4 on channel a, -2/4 on b. The map is relu(0.75 a - 0.5 b).
    """
    a, b = [1.0, 2.0, 0.0, -1.0], [4.0, 0.0, 1.0, -2.0]
    tokens = torch.tensor([list(zip(a, b, strict=True))])
    memory = Memory(tokens, [(2, 2)], torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 1, 2))

    def scores(of: Memory) -> torch.Tensor:
        (a0, _), (_, b1), (_, b2), _ = of.tokens[0]
        return torch.stack([3 * a0 - 2 * b2, b1])[None]

    maps = grad_cams({"x": scores}, memory, [targets(0)], [(2, 2)])
    torch.testing.assert_close(maps["x"][0], torch.tensor([[0.0, 1.5], [0.0, 0.25]]))
    # Both classes: channel b's mean gradient is -1/4.
    maps = grad_cams({"x": scores}, memory, [targets(0, 1, 1)], [(2, 2)])
    torch.testing.assert_close(maps["x"][0], torch.tensor([[0.0, 1.5], [0.0, 0.0]]))
    maps = grad_cams({"x": scores}, memory, [targets()], [(2, 2)])
    assert (maps["x"][0] == 0).all()


def test_levels_and_padding_against_loops() -> None:
    shapes, valid = [(4, 5), (2, 3)], [(3, 4), (2, 2)]
    memory = random_memory(shapes, [valid, valid])
    gradient = torch.randn(memory.tokens.shape, generator=torch.Generator().manual_seed(3))
    found = grad_cam(memory.tokens, gradient, memory, [(12, 16), (12, 16)])[1]
    total = torch.zeros(12, 16)
    both = zip(levels_of(memory, 1), levels_of(memory, 1, gradient), valid, strict=True)
    for features, slopes, (h, w) in both:
        map_ = torch.zeros(h, w)
        for channel in range(5):
            weight = sum(slopes[i, j, channel] for i in range(h) for j in range(w)) / (h * w)
            for i in range(h):
                for j in range(w):
                    map_[i, j] += weight * features[i, j, channel]
        total += to_image(map_.clamp(min=0), (12, 16)) / 2
    torch.testing.assert_close(found, total)


def test_present_classes() -> None:
    like = torch.zeros(2, 4)
    assert present_classes([targets(3, 1, 3), targets()], like).tolist() == [
        [0, 1, 0, 1],
        [0, 0, 0, 0],
    ]


def test_maps_do_not_depend_on_the_other_images() -> None:
    detector = model(*BOTH)
    batch, objects = tiny_batch([1, 2, 3], [2, 0, 3])
    with torch.no_grad():
        memory = detector.encode(batch)
    together = grad_cams(branch_scores(detector, batch.sizes), memory, objects, batch.sizes)
    assert [*together] == ["query", "atss", "faster_rcnn"]
    alone = Memory(memory.tokens[2:], memory.shapes, memory.padding[2:], memory.valid_ratios[2:])
    sizes = batch.sizes[2:]
    single = grad_cams(branch_scores(detector, sizes), alone, objects[2:], sizes)
    for name, maps in together.items():
        assert (maps[1] == 0).all()
        assert maps[2].any(), name
        torch.testing.assert_close(maps[2], single[name][0], rtol=1e-3, atol=1e-5)


def test_gradients_are_of_the_scores() -> None:
    """A central difference along a random direction, for every branch."""
    detector = model(*BOTH).double()
    batch, _ = tiny_batch([1], [2])
    batch.pixels = batch.pixels.double()
    with torch.no_grad():
        memory = detector.encode(batch)
    step = torch.randn(memory.tokens.shape, dtype=torch.double)
    scores = branch_scores(detector, batch.sizes)
    for name in ("query", "atss"):  # proposals move along, without a gradient
        tokens = memory.tokens.clone().requires_grad_()
        at = Memory(tokens, memory.shapes, memory.padding, memory.valid_ratios)
        (gradient,) = torch.autograd.grad(scores[name](at).sum(), tokens)
        ends = []
        for sign in (1, -1):
            moved = memory.tokens + sign * 1e-4 * step
            at = Memory(moved, memory.shapes, memory.padding, memory.valid_ratios)
            ends.append(float(scores[name](at).double().sum()))
        slope = (ends[0] - ends[1]) / 2e-4
        assert slope == pytest.approx(float((gradient * step).sum()), rel=2e-2), name


# ------------------------------------------------------------------------------ heads' class scores


def test_atss_sums_what_it_says_at_valid_anchors() -> None:
    head, pyramid = small_head("atss"), random_pyramid(2)
    sizes = [SIZE, (40, 50)]
    found = head.class_scores(pyramid, sizes)
    anchors = anchors_for(pyramid, head.strides, [8])
    wanted = torch.zeros(2, 3)
    for image, (height, width) in enumerate(sizes):
        number = 0
        for level in pyramid:
            logits = head.cls(head.cls_tower(level))[image]
            for row in range(logits.shape[1]):
                for column in range(logits.shape[2]):
                    x, y = anchors.centres[number]
                    if x < width and y < height:
                        wanted[image] += logits[:, row, column].sigmoid()
                    number += 1
    torch.testing.assert_close(found, wanted)


def test_faster_rcnn_sums_the_scores_of_all_its_detections() -> None:
    """Detections without any suppression are every pair of proposal and class."""
    head, pyramid = small_head("faster_rcnn"), random_pyramid(2)
    everything = {"test_nms": 1.0, "test_keep": 10_000, "test_score": 0.0}
    head.rcnn.config = head.rcnn.config.model_copy(update=everything)
    sizes = [SIZE, (40, 50)]
    found = head.class_scores(pyramid, sizes)
    for scores, detections in zip(found, head.detect(pyramid, sizes), strict=True):
        wanted = [detections.scores[detections.labels == label].sum() for label in range(3)]
        torch.testing.assert_close(scores, torch.stack(wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_class_scores_of_every_head(name: str) -> None:
    """(B, classes), differentiable, not of the batch: what any head must offer."""
    head, pyramid = small_head(name), random_pyramid(3)
    sizes = [SIZE, (40, 50), SIZE]
    pyramid = [level.requires_grad_() for level in pyramid]
    scores = head.class_scores(pyramid, sizes)
    assert scores.shape == (3, 3)
    assert (scores >= 0).all()
    scores[1].sum().backward()
    gradients = [level.grad for level in pyramid if level.grad is not None]
    assert any(g[1].any() for g in gradients)
    assert not any(g[0].any() or g[2].any() for g in gradients)
    alone = head.class_scores([level[1:2] for level in pyramid], sizes[1:2])
    torch.testing.assert_close(alone[0], scores[1])
    head.train()(pyramid, sizes, random_targets([1, 1, 1]))  # the head is as it was
