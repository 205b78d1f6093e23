from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import (
    CHANNELS,
    CLASSES,
    SIZE,
    ellipses,
    random_pyramid,
    random_targets,
    small_head,
)
from torchvision.models.detection.roi_heads import maskrcnn_loss

from codetr.config import MaskConfig
from codetr.heads.mask_rcnn import MaskBranch, MaskRcnnHead, mask_targets
from codetr.heads.rcnn import RoiSamples
from codetr.structures import Targets

STRIDES = (8, 16, 32)


def branch(**config: int) -> MaskBranch:
    torch.manual_seed(0)
    config = {"convs": 1, "channels": 8, "roi_size": 4} | config
    return MaskBranch(MaskConfig(**config), CHANNELS, CLASSES, STRIDES, 28)


def random_samples(targets: Targets, seed: int, positives: int = 6, all_: int = 9) -> RoiSamples:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(targets), (positives,), generator=generator)
    jitter = torch.randn(positives, 4, generator=generator) * 2
    boxes = targets.boxes[numbers] + jitter
    negatives = torch.tensor([[1.0, 1, 20, 30]]).expand(all_ - positives, -1)
    matched = targets.boxes[numbers]
    return RoiSamples(
        torch.cat((boxes, negatives)), targets.labels[numbers], matched, numbers, numbers
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_loss_is_torchvisions(seed: int) -> None:
    """But for half a pixel, which torchvision's masks are off: it does not align them."""
    targets, mask = random_targets([3, 2], seed), branch()
    samples = [random_samples(t, seed + i) for i, t in enumerate(targets)]
    pyramid = random_pyramid(2)[:-1]
    ours = mask(pyramid, samples, targets)
    positives = [s.boxes[: len(s.labels)] for s in samples]
    theirs = maskrcnn_loss(
        mask.predict(pyramid, positives),
        [boxes - 0.5 for boxes in positives],
        [t.masks for t in targets],
        [t.labels for t in targets],
        [s.numbers for s in samples],
    )
    torch.testing.assert_close(ours, theirs)


def test_targets_are_the_mask_itself_where_cells_are_pixels() -> None:
    boxes = torch.tensor([[10.0, 5.0, 38.0, 33.0], [3.0, 2.0, 31.0, 30.0]])
    masks = ellipses(boxes, SIZE)
    targets = Targets(boxes, torch.tensor([0, 1]), masks=masks)
    wanted = mask_targets(targets, torch.tensor([1, 0]), boxes.flip(0), 28)
    assert torch.equal(wanted[0], masks[1, 2:30, 3:31].float())
    assert torch.equal(wanted[1], masks[0, 5:33, 10:38].float())


@pytest.mark.parametrize("convs", [0, 1, 5])
def test_masks_are_predicted_at_twice_the_features_resolution(convs: int) -> None:
    boxes = [torch.tensor([[4.0, 4, 30, 30]]), torch.zeros(0, 4)]
    mask = branch(convs=convs, roi_size=7)
    assert mask.predict(random_pyramid(2)[:-1], boxes).shape == (1, CLASSES, 14, 14)


def test_learns_a_mask() -> None:
    """The loss of a region whose mask never changes goes to zero."""
    mask, targets = branch(channels=16), random_targets([1])
    objects = targets[0]
    samples = [RoiSamples(objects.boxes, objects.labels, objects.boxes, *[torch.tensor([0])] * 2)]
    pyramid = random_pyramid(1)[:-1]
    optimizer = torch.optim.Adam(mask.parameters(), 0.01)
    losses = []
    for _ in range(150):
        loss = mask(pyramid, samples, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    logits = mask.predict(pyramid, [objects.boxes])[0, objects.labels[0]]
    wanted = mask_targets(objects, torch.tensor([0]), objects.boxes, mask.size)[0]
    assert losses[-1] < 0.3 * losses[0]
    assert ((logits > 0) == (wanted > 0.5)).float().mean() > 0.95


def test_the_rest_is_faster_rcnn() -> None:
    """The same losses and positives as Faster R-CNN with the same weights and draws, and one loss
    more."""
    faster, mask = small_head("faster_rcnn", called="mask_rcnn"), small_head("mask_rcnn")
    assert isinstance(mask, MaskRcnnHead)
    own = mask.state_dict()
    faster.load_state_dict({k: v for k, v in own.items() if not k.startswith("mask.")})
    pyramid, sizes, targets = random_pyramid(2), [SIZE] * 2, random_targets([3, 2])
    plain, output = (head(pyramid, sizes, targets) for head in (faster, mask))
    for name, value in plain.losses.items():
        assert torch.equal(output.losses[name], value)
    assert set(output.losses) - set(plain.losses) == {"mask"}
    for one, other in zip(plain.positives, output.positives, strict=True):
        assert torch.equal(one.boxes, other.boxes)
    for one, other in zip(faster.detect(pyramid, sizes), mask.detect(pyramid, sizes), strict=True):
        assert torch.equal(one.boxes, other.boxes)


def test_without_masks_it_says_which_image() -> None:
    targets = random_targets([2])
    targets[0].masks, targets[0].image_id = None, 17
    with pytest.raises(ValueError, match="image 17 has no masks"):
        small_head("mask_rcnn")(random_pyramid(1), [SIZE], targets)
