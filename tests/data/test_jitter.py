"""Large-scale jitter: geometry by hand, boxes on their masks, and the canvas seen as image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import annotation, content, image, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name

from codetr.config import ConfigError, DataConfig, parse
from codetr.data import build_loader, open_dataset
from codetr.data.loader import collate
from codetr.data.transforms import build_canvas, build_transform
from codetr.inference import detect
from codetr.structures import Detections, ImageBatch, Targets

EDGES = torch.tensor([0, 0, 1, 1])
"""torchvision's boxes of masks end at the last pixel, ours behind it."""


def config(**jitter: Any) -> DataConfig:
    """A canvas of 96 pixels, images as they are."""
    return parse(
        DataConfig,
        {
            "jitter": {"enabled": True, "canvas": 96, **jitter},
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "flip": 0,
        },
        "test",
    )


def noise(height: int, width: int) -> tv_tensors.Image:
    draw = torch.Generator().manual_seed(height * width)
    return tv_tensors.Image(
        torch.randint(256, (3, height, width), dtype=torch.uint8, generator=draw)
    )


def objects(boxes: list[list[int]], height: int, width: int, masks: bool) -> dict[str, Any]:
    """Rectangles, with masks that leave their first row free."""
    given = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes).float(), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(len(boxes)),
    }
    if masks:
        drawn = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(drawn, boxes, strict=True):
            mask[top + 1 : bottom, left:right] = 1
        given["masks"] = tv_tensors.Mask(drawn)
    return given


sides = st.integers(20, 160)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), height=sides, width=sides)
def test_an_image_is_scaled_and_cropped(seed: int, height: int, width: int) -> None:
    """The same random numbers, and the same by torchvision's functions."""
    pixels = noise(height, width)
    boxes = [[2, 3, 12, 18], [width - 9, height - 8, width - 1, height]]
    torch.manual_seed(seed)
    cropped, found = build_transform(config(), training=True)(
        pixels, objects(boxes, height, width, masks=False)
    )

    torch.manual_seed(seed)
    factor = min(96 / height, 96 / width) * (0.1 + torch.rand(1) * 1.9)
    size = [int(height * factor), int(width * factor)]
    scaled = F.resize(pixels, size)
    kept = [int(torch.randint(k, k + 1, ())) for k in (min(96, side) for side in size)]
    top, left = (
        int(torch.randint(0, side - k + 1, ())) for side, k in zip(size, kept, strict=True)
    )
    expected = scaled[:, top : top + kept[0], left : left + kept[1]]
    assert torch.equal((cropped * 255).round().byte(), expected)

    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    moved = torch.tensor(boxes) * scale - torch.tensor([left, top, left, top])
    limits = torch.tensor([kept[1], kept[0]] * 2)
    moved = moved.clamp(min=0).minimum(limits.float())
    lengths = moved[:, 2:] - moved[:, :2]
    remains = (lengths > 0.01).all(1)
    assert found["labels"].tolist() == remains.nonzero()[:, 0].tolist()
    assert torch.allclose(found["boxes"].as_subclass(torch.Tensor), moved[remains], atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), height=sides, width=sides)
def test_boxes_are_those_of_the_masks(seed: int, height: int, width: int) -> None:
    torch.manual_seed(seed)
    boxes = [[0, 0, 15, 20], [5, 5, 7, 7], [width - 10, height - 8, width, height]]
    pixels, found = build_transform(config(), training=True)(
        noise(height, width), objects(boxes, height, width, masks=True)
    )
    assert found["masks"].shape == (len(found["labels"]), *pixels.shape[1:])
    assert found["masks"].flatten(1).any(1).all(), "an object with an empty mask is gone"
    assert torch.equal(found["boxes"], masks_to_boxes(found["masks"]) + EDGES)


def test_a_stripe_keeps_a_pixel() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        pixels, found = build_transform(config(), training=True)(
            noise(2, 400), objects([[0, 0, 400, 2]], 2, 400, masks=False)
        )
        assert min(pixels.shape) > 0
        assert len(found["boxes"]) == 1


def test_the_scale_is_uniform_in_its_range() -> None:
    """A square that fits is never cropped: its side tells the factor."""
    transform = build_transform(config(scale=[0.25, 0.75]), training=True)
    torch.manual_seed(0)
    found = [
        transform(noise(48, 48), objects([[0, 0, 48, 48]], 48, 48, masks=False))[0].shape[1] / 96
        for _ in range(200)
    ]
    assert 0.24 < min(found) < 0.27
    assert 0.73 < max(found) <= 0.75
    assert torch.tensor(found).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("size", "fitted"), [((48, 64), (72, 96)), ((200, 100), (96, 48))])
def test_evaluation_fits_to_the_canvas(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    pixels = build_transform(config(), training=False)(noise(*size))
    assert tuple(pixels.shape[1:]) == fitted


# ---------------------------------------------------------------------------------------- canvas


def samples(*sizes: tuple[int, int]) -> list[tuple[torch.Tensor, Targets]]:
    return [
        (
            torch.rand(3, *size),
            Targets(torch.zeros(1, 4), torch.zeros(1).long(), masks=torch.ones(1, *size).bool()),
        )
        for size in sizes
    ]


def test_the_canvas_is_grey_before_normalisation() -> None:
    normalised = config().model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 2)})
    canvas = build_canvas(normalised)
    assert canvas is not None
    grey = 114 / 255
    expected = [(grey - 0.5) / 0.5, (grey - 0.4) / 0.25, (grey - 0.3) / 2]
    assert canvas.colour.tolist() == pytest.approx(expected)
    ((pixels, _),) = samples((30, 60))
    held = canvas.hold(pixels)
    assert held.shape == (3, 96, 96)
    assert torch.equal(held[:, :30, :60], pixels)
    assert held[:, 30:].flatten(1).unique(dim=1).flatten().tolist() == canvas.colour.tolist()
    assert held[:, :, 60:].flatten(1).unique(dim=1).flatten().tolist() == canvas.colour.tolist()
    assert build_canvas(DataConfig()) is None


def test_the_canvas_is_image_unless_it_is_masked() -> None:
    given = samples((30, 60), (96, 20))
    batch, targets = collate(given, build_canvas(config()))
    assert batch.sizes == [(96, 96)] * 2
    assert batch.contents == [(30, 60), (96, 20)]
    assert not batch.padding_mask().any()
    for t, (pixels, _) in zip(targets, given, strict=True):
        assert t.masks is not None
        assert t.masks.shape == (1, 96, 96)
        assert t.masks.sum() == pixels[0].numel()

    masked, targets = collate(given, build_canvas(config(padding_mask=True)))
    assert torch.equal(masked.pixels, batch.pixels)
    assert masked.sizes == [(30, 60), (96, 20)]
    assert masked.contents is None
    assert masked.padding_mask().flatten(1).sum(1).tolist() == [96 * 96 - 1800, 96 * 76]
    assert targets[0].masks is not None
    assert targets[0].masks.shape == (1, 30, 60)


class Told(nn.Module):
    """Detects what it is told."""

    def __init__(self, boxes: torch.Tensor) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.boxes = boxes

    def detect(self, _batch: ImageBatch, _branch: str) -> list[Detections]:
        return [Detections(self.boxes, torch.ones(len(self.boxes)), torch.zeros(len(self.boxes)))]


def test_detections_are_scaled_back_by_the_image_not_the_canvas() -> None:
    original = [[10, 5, 50, 20], [0, 0, 64, 48]]
    transform = build_transform(config(), training=False)
    pixels, found = transform(noise(48, 64), objects(original, 48, 64, masks=False))
    batch, _ = collate([(pixels, samples((72, 96))[0][1])], build_canvas(config()))
    beyond = torch.tensor([[90.0, 60, 96, 90]])  # half of it on the free part of the canvas
    model = Told(torch.cat((found["boxes"].as_subclass(torch.Tensor), beyond)))
    (detections,) = detect(model, batch, [(48, 64)])
    assert torch.allclose(detections.boxes[:2], torch.tensor(original).float())
    assert detections.boxes[2].tolist() == [60, 40, 64, 48]


def test_a_loader_lays_images_on_the_canvas(tmp_path: Path) -> None:
    write(tmp_path, content())
    write(tmp_path, content(), split="val")
    data = config().model_copy(update={"path": tmp_path})
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    for batch, _ in build_loader(train, 2, training=True):
        assert batch.pixels.shape == (2, 3, 96, 96)
        assert batch.sizes == [(96, 96)] * 2
    shapes = [batch.contents for batch, _ in build_loader(val, 4, training=False)]
    assert shapes == [[(72, 96), (72, 96), (96, 38), (72, 96)]]
    first = [train[i][0].shape for i in range(4)]
    assert [train[i][0].shape for i in range(4)] == first
    train.set_epoch(1)
    assert [train[i][0].shape for i in range(4)] != first


def test_padding_keeps_where_the_images_are() -> None:
    batch, _ = collate(samples((30, 60)), build_canvas(config()))
    assert batch.padded(64).contents == [(30, 60)]
    assert replace(batch).to("cpu").contents == [(30, 60)]


def test_a_range_must_ascend() -> None:
    with pytest.raises(ConfigError, match=r"jitter: scale=\[2.0, 0.1\] must be the smallest"):
        config(scale=[2, 0.1])


@pytest.mark.parametrize("short_side", [96, 120])
def test_evaluation_where_the_long_side_alone_decides(short_side: int, tmp_path: Path) -> None:
    """As in coco-system-pretraining on the laptop: no short side is below the longest long one."""
    data = DataConfig(short_sides=(80, short_side), max_side=96)
    assert build_transform(data, training=False)(noise(48, 64)).shape == (3, 72, 96)
    write(tmp_path, {**content(), "images": [image(5)], "annotations": [annotation(1, 5, [1] * 4)]})
    opened = open_dataset(data.model_copy(update={"path": tmp_path}), "train")
    assert max(opened[0][0].shape) == 96
