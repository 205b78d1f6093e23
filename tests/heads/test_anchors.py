from __future__ import annotations

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from codetr.heads.anchors import anchors_for

STRIDES = (8, 16)
MAPS = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3)]


def test_grid_is_torchvisions() -> None:
    """torchvision rounds its anchors to whole pixels; on sizes where that changes nothing, both
    agree up to its order of scales and ratios."""
    ours = anchors_for(MAPS, STRIDES, [4, 8])
    generator = AnchorGenerator(((32, 64), (64, 128)), ((1.0,), (1.0,)))
    theirs = generator(ImageList(torch.zeros(2, 1, 32, 48), [(32, 48)] * 2), MAPS)[0]
    torch.testing.assert_close(ours.boxes, theirs)
    assert ours.counts == (48, 12)
    assert ours.levels.tolist() == [0] * 48 + [1] * 12


def test_ratios_keep_the_area_and_come_before_scales() -> None:
    anchors = anchors_for(MAPS, STRIDES, [4, 8], [0.5, 1, 2])
    sides = anchors.boxes[:6, 2:] - anchors.boxes[:6, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 0.5, 1, 1, 2, 2]))
    torch.testing.assert_close(sides.prod(1).sqrt(), torch.tensor([32.0, 64.0] * 3))
    torch.testing.assert_close((anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2, anchors.centres)


def test_centres_stand_on_multiples_of_the_stride() -> None:
    anchors = anchors_for(MAPS, STRIDES, [8])
    assert anchors.centres[:7].tolist() == [[8.0 * i, 0] for i in range(6)] + [[0, 8.0]]


def test_anchors_in_the_padding_are_not_valid() -> None:
    valid = anchors_for(MAPS, STRIDES, [8]).valid([(32, 48), (17, 16)])
    assert valid[0].all()
    rows_and_columns = valid[1, :24].view(4, 6).nonzero().tolist()
    assert rows_and_columns == [[row, column] for row in range(3) for column in range(2)]
    assert valid[1, 24:].view(2, 3).nonzero().tolist() == [[0, 0], [1, 0]]


def test_grids_made_in_inference_serve_training() -> None:
    maps = [torch.zeros(1, 1, 5, 7)]
    with torch.inference_mode():
        anchors_for(maps, [8], [3])
    deltas = torch.ones(35, 4, requires_grad=True)
    (anchors_for(maps, [8], [3]).boxes * deltas).sum().backward()
    assert deltas.grad is not None
