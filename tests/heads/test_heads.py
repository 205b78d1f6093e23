"""What holds for every auxiliary head."""

from __future__ import annotations

import math

import pytest
import torch
from small_heads import CLASSES, CONFIGS, SIZE, random_pyramid, random_targets, small_head

from codetr.structures import HeadOutput, Positives, Targets

HEADS = pytest.mark.parametrize("name", CONFIGS)
PADDED = (40, 56)


def total(output: HeadOutput) -> torch.Tensor:
    return torch.stack([*output.losses.values()]).sum()


@HEADS
@pytest.mark.parametrize("counts", [[3, 2], [4, 0], [0, 0]])
def test_every_parameter_gets_a_finite_gradient(name: str, counts: list[int]) -> None:
    """Also in batches without objects: a missing gradient would hang DDP."""
    head = small_head(name)
    output = head(random_pyramid(2), [SIZE, PADDED], random_targets(counts))
    assert list(output.losses) == list(CONFIGS[name].loss_weights())
    assert all(value.shape == () and value.isfinite() for value in output.losses.values())
    total(output).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@HEADS
def test_positives_are_what_the_decoder_needs(name: str) -> None:
    targets = random_targets([3, 0, 2])
    sizes = [SIZE, SIZE, PADDED]
    pyramid = [level.requires_grad_() for level in random_pyramid(3)]
    output = small_head(name)(pyramid, sizes, targets)
    for positives, t in zip(output.positives, targets, strict=True):
        check_positives(positives, t)
    # Features are not detached: positive queries train the encoder (equation 4).
    output.positives[0].features.sum().backward()
    assert all(level.grad is not None for level in pyramid[:-1])


def check_positives(positives: Positives, targets: Targets) -> None:
    assert positives.boxes.shape == (len(positives.features) * positives.per_feature, 4)
    assert not positives.boxes.requires_grad
    assert not set(positives.positive.tolist()) & set(positives.negative.tolist())
    assert len(positives.positive) == len(positives.labels) == len(positives.targets)
    assert (len(positives.positive) > 0) == (len(targets) > 0)
    for box, label in zip(positives.targets, positives.labels, strict=True):
        assert label in targets.labels[(targets.boxes == box).all(1)]


@HEADS
def test_an_images_positives_do_not_depend_on_its_batch(name: str) -> None:
    """Draws belong to the image, and padding objects of the batch change nothing."""
    head, pyramid, targets = small_head(name), random_pyramid(3), random_targets([2, 5, 0])
    together = head(pyramid, [SIZE] * 3, targets).positives
    torch.rand(1)
    for image in range(3):
        one = [level[image : image + 1] for level in pyramid]
        (alone,) = head(one, [SIZE], targets[image : image + 1]).positives
        for field in ("positive", "negative", "labels", "targets"):
            assert torch.equal(getattr(alone, field), getattr(together[image], field)), field
        torch.testing.assert_close(alone.boxes, together[image].boxes)


@HEADS
def test_detections_are_inside_the_image_and_best_first(name: str) -> None:
    head = small_head(name)
    detections = head.detect(random_pyramid(2), [SIZE, PADDED])
    assert len(detections) == 2
    for found, (height, width) in zip(detections, (SIZE, PADDED), strict=True):
        assert 0 < len(found) <= 20
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2)).all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.labels >= 0) & (found.labels < CLASSES)).all()


@HEADS
def test_autocast_leaves_losses_in_float32(name: str) -> None:
    head, pyramid, targets = small_head(name), random_pyramid(2), random_targets([3, 2])
    exact = head(pyramid, [SIZE] * 2, targets)
    with torch.autocast("cpu", torch.bfloat16):
        output = head([level.bfloat16() for level in pyramid], [SIZE] * 2, targets)
    for term, value in output.losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.losses[term], rtol=0.1, atol=0.02)


@HEADS
def test_initial_weights_depend_on_seed_and_name_alone(name: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    once = small_head(name).state_dict()
    after = torch.rand(3)
    torch.testing.assert_close(expected, after)  # building drew nothing from the global stream
    again = small_head(name).state_dict()
    other_seed = small_head(name, seed=1).state_dict()
    matrices = [k for k, v in once.items() if v.dim() > 1]
    assert all(torch.equal(once[k], again[k]) for k in once)
    assert not any(torch.equal(once[k], other_seed[k]) for k in matrices)


@HEADS
def test_initial_loss_is_what_chance_gives(name: str) -> None:
    """Classification starts at a probability of 0.01 (focal), one half (RPN) and uniform; the
    boxes' quality at one half."""
    losses = small_head(name)(random_pyramid(2), [SIZE] * 2, random_targets([3, 3])).losses
    expected = {
        "centerness": 0.69,
        "iou": 0.69,
        "rpn_cls": 0.69,
        "rcnn_cls": math.log(CLASSES + 1),
    }
    for term in expected.keys() & losses.keys():
        assert losses[term].item() == pytest.approx(expected[term], abs=0.1), term
    assert losses["rcnn_giou" if "rcnn" in name else "giou"] < 1.2
