"""Augmentation keeps boxes on their objects and depends on seed, epoch and image alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import annotation, content, image, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from codetr.config import DataConfig
from codetr.data import CocoDataset
from codetr.data.transforms import CROP_SIDES, build_transform

PLAIN = DataConfig(mean=(0, 0, 0), std=(1, 1, 1), crop=False, flip=0, short_sides=())


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[tv_tensors.Image, dict]:
    """A black image with one white box, and a target for it."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    left, top, right, bottom = box
    pixels[:, top:bottom, left:right] = 255
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([box], dtype=torch.float32), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(pixels), {"boxes": boxes, "labels": torch.tensor([4])}


def extent(pixels: Tensor) -> list[float]:
    """xyxy of what is white."""
    rows, columns = (pixels[0].amax(d) > 0.5 for d in (1, 0))
    (top, bottom), (left, right) = ((x.nonzero()[[0, -1], 0].tolist()) for x in (rows, columns))
    return [left, top, right + 1, bottom + 1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(100, 300), width=st.integers(100, 300))
def test_boxes_stay_on_their_objects(seed: int, height: int, width: int) -> None:
    torch.manual_seed(seed)
    box = (width // 4, height // 5, width // 2, height * 3 // 4)
    config = PLAIN.model_copy(update={"short_sides": (120, 200), "crop": True, "flip": 0.5})
    pixels, objects = build_transform(config, training=True)(*scene(height, width, box))
    # torchvision rounds down, so a side can be a pixel short.
    assert min(pixels.shape[1:]) in (119, 120, 199, 200)
    if len(objects["boxes"]):
        assert objects["labels"].tolist() == [4]
        # An edge blurred by the resize of a crop moves by a pixel or two.
        assert torch.allclose(objects["boxes"], torch.tensor([extent(pixels)]).float(), atol=3)
        left, top, right, bottom = objects["boxes"][0].tolist()
        assert 0 <= left < right <= pixels.shape[2]
        assert 0 <= top < bottom <= pixels.shape[1]
    else:
        assert (pixels[0] > 0.99).float().sum() < 50, "the object was cut away"


def test_flip_and_normalise() -> None:
    config = DataConfig(short_sides=(), flip=1, mean=(0.5, 0.5, 0), std=(0.5, 0.25, 1))
    pixels, objects = build_transform(config, training=True)(*scene(10, 20, (2, 3, 8, 9)))
    assert objects["boxes"].tolist() == [[12, 3, 18, 9]]
    assert pixels[:, 0, 0].tolist() == [-1, -2, 0]
    assert pixels[:, 5, 15].tolist() == [1, 2, 1]
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_without_short_sides_images_keep_their_size(training: bool) -> None:
    pixels, objects = build_transform(PLAIN, training=training)(*scene(33, 47, (2, 3, 8, 9)))
    assert pixels.shape == (3, 33, 47)
    assert objects["boxes"].tolist() == [[2, 3, 8, 9]]


def test_evaluation_resizes_to_the_largest_short_side() -> None:
    config = PLAIN.model_copy(update={"short_sides": (60, 80), "max_side": 150, "flip": 1.0})
    transform = build_transform(config, training=False)
    pixels, objects = transform(*scene(20, 30, (3, 4, 6, 8)))
    assert pixels.shape == (3, 80, 120)
    assert objects["boxes"].tolist() == [[12, 16, 24, 32]]
    assert transform(*scene(20, 60, (3, 4, 6, 8)))[0].shape == (3, 50, 150)


def test_half_of_the_images_are_cropped_as_detr_does() -> None:
    torch.manual_seed(0)
    config = PLAIN.model_copy(update={"short_sides": (100,), "crop": True})
    transform = build_transform(config, training=True)
    shapes = [tuple(transform(*scene(400, 400, (0, 0, 400, 400)))[0].shape[1:]) for _ in range(200)]
    # A crop of a square is a square in one of hundreds of cases only.
    squares = sum(shape == (100, 100) for shape in shapes)
    assert 75 <= squares <= 125
    low, high = CROP_SIDES
    assert max(max(shape) / min(shape) for shape in shapes) <= high / low + 0.01


def test_an_object_outside_the_crop_is_gone() -> None:
    torch.manual_seed(0)
    config = PLAIN.model_copy(update={"short_sides": (100,), "crop": True})
    transform = build_transform(config, training=True)
    counts = [len(transform(*scene(400, 400, (0, 0, 5, 5)))[1]["labels"]) for _ in range(60)]
    assert set(counts) == {0, 1}


def make_dataset(directory: Path, seed: int = 0) -> CocoDataset:
    data = content() | {
        "images": [image(i, 60, 50) for i in range(1, 7)],
        "annotations": [annotation(i, i, [5, 5, 30, 20]) for i in range(1, 7)],
    }
    if not (directory / "train").exists():
        write(directory, data)
    return CocoDataset(
        directory / "annotations/instances_train.json",
        directory / "train",
        build_transform(DataConfig(short_sides=(40, 48, 56, 64)), training=True),
        training=True,
        seed=seed,
    )


def everything(dataset: CocoDataset) -> list[list[float]]:
    items = [dataset[i] for i in range(len(dataset))]
    return [[*p.shape, p.double().sum().item(), *t.boxes.flatten().tolist()] for p, t in items]


def test_an_item_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    torch.manual_seed(1)
    first = everything(dataset)
    torch.manual_seed(2)
    assert everything(dataset) == first
    assert [everything(dataset)[i] for i in (3, 1)] == [first[3], first[1]]
    dataset.set_epoch(1)
    assert everything(dataset) != first
    dataset.set_epoch(0)
    assert everything(dataset) == first
    assert everything(make_dataset(tmp_path, seed=1)) != first


def test_the_training_s_own_generator_is_left_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thin_object_survives_where_nothing_is_cropped(tmp_path: Path) -> None:
    data = content() | {"annotations": [annotation(1, 5, [3, 3, 0.25, 20])]}
    write(tmp_path, data)
    dataset = CocoDataset(
        tmp_path / "annotations/instances_train.json",
        tmp_path / "train",
        build_transform(DataConfig(short_sides=(), flip=1), training=True),
        training=True,
    )
    assert dataset[0][1].boxes.tolist() == [[36.75, 3, 37, 23]]


def test_images_are_read_as_stored(tmp_path: Path) -> None:
    write(tmp_path, content())
    dataset = make_plain(tmp_path)
    expected = np.asarray(Image.open(tmp_path / "train" / "5.png")) / 255
    assert np.abs(dataset[0][0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def make_plain(directory: Path) -> CocoDataset:
    return CocoDataset(
        directory / "annotations/instances_train.json",
        directory / "train",
        build_transform(PLAIN, training=True),
        training=True,
    )
