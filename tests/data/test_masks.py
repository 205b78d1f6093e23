"""Masks: read as pycocotools reads them, moved with their image, and refused where they are not."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pytest
import torch
from coco_files import annotation, content, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from codetr.config import DataConfig
from codetr.data import CocoDataset, DataError, open_dataset
from codetr.data.annotations import read_annotations
from codetr.data.digits import make_digits
from codetr.data.masks import decompressed, encoded
from codetr.data.transforms import build_transform

TRIANGLE = [2.0, 3.0, 11.0, 4.0, 6.0, 22.0]
SQUARES = [[20.0, 5.0, 24.0, 5.0, 24.0, 9.0, 20.0, 9.0], [25.0, 10.0, 28.0, 10.0, 28.0, 13.0]]


def runs(height: int, width: int, compressed: bool) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[10:45, 1:9] = 1
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = np.concatenate([[0], mask.flatten(order="F"), [0]])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges, [height * width]]))
    return {"size": [height, width], "counts": lengths.tolist()}


def with_masks(compressed: bool = True) -> dict[str, Any]:
    data = content()
    segmentations = {
        100: runs(50, 20, compressed),
        101: [TRIANGLE],
        102: runs(50, 20, False),
        103: [[0.0, 0.0, 40.0, 0.0, 40.0, 30.0, 0.0, 30.0]],
        104: SQUARES,
    }
    for entry in data["annotations"]:
        entry["segmentation"] = segmentations[entry["id"]]
    return data


def opened(folder: Path, data: dict[str, Any], **more: Any) -> CocoDataset:
    path = write(folder, data)
    return CocoDataset(path, folder / "train", training=True, masks=True, **more)


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_are_pycocotools(tmp_path: Path, compressed: bool) -> None:
    """Polygons of one part and of two, and both kinds of run lengths; crowds are no targets."""
    dataset = opened(tmp_path, with_masks(compressed))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = pycocotools.coco.COCO(str(dataset.annotations))
    for image, targets in (dataset[i] for i in range(len(dataset))):
        entries = theirs.loadAnns(theirs.getAnnIds(targets.image_id, iscrowd=False))
        assert targets.masks is not None
        assert targets.masks.dtype == torch.bool
        assert targets.masks.shape == (len(targets), *image.shape[1:])
        for mask, entry in zip(targets.masks, entries, strict=True):
            assert np.array_equal(mask.numpy(), theirs.annToMask(entry))


def test_without_being_asked_for_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, with_masks())
    assert CocoDataset(path, tmp_path / "train", training=True)[0][1].masks is None
    assert read_annotations(path).masks is None


def test_a_limited_data_set_keeps_its_masks_in_order(tmp_path: Path) -> None:
    whole, part = (opened(tmp_path, with_masks(), limit=n) for n in (None, 3))
    for index in range(3):
        assert torch.equal(whole[index][1].masks, part[index][1].masks)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "has no 'segmentation', which mask heads and copy-paste need"),
        ([], "must be a list of polygons or an object of run lengths"),
        ("x", "must be a list of polygons or an object of run lengths"),
        ([[1, 2, 3, 4]], "a polygon that is no list of three or more points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon that is no list of three or more points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon that is no list of three or more points"),
        ([1, 2, 3, 4, 5, 6], "a polygon that is no list of three or more points"),
        ([["a", 2, 3, 4, 5, 6]], "a polygon that is no list of three or more points"),
        ({"size": [30, 41], "counts": [1230]}, r"has the size \[30, 41\], its image \[30, 40\]"),
        ({"size": [30, 40], "counts": [600, 601]}, "do not add up to its image"),
        ({"size": [30, 40], "counts": [-1, 1201]}, "do not add up to its image"),
        ({"size": [30, 40], "counts": "zzzz"}, "do not add up to its image"),
        ({"size": [30, 40], "counts": "!"}, "do not add up to its image"),
        ({"size": [30, 40], "counts": "`1"}, "do not add up to its image"),
        ({"size": [30, 40], "counts": 7}, "do not add up to its image"),
        ({"size": [30, 40]}, "do not add up to its image"),
    ],
)
def test_a_broken_mask_is_named_and_can_be_left_out(
    tmp_path: Path, segmentation: Any, message: str
) -> None:
    data = with_masks()
    data["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path, data)
    assert "101" in str(error.value)
    assert "\n" not in str(error.value)
    dataset = opened(tmp_path, data, skip_bad=True)
    assert dataset.skipped == 1
    assert 5 not in dataset.table.image_ids
    assert len(read_annotations(dataset.annotations)) == 4  # no problem without mask heads


def test_data_without_any_mask_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no object has a 'segmentation'") as error:
        opened(tmp_path, content())
    assert "take the head out of 'heads'" in str(error.value)
    assert "\n" not in str(error.value)


def test_digits_have_masks_that_fill_their_boxes(tmp_path: Path) -> None:
    folder = make_digits(tmp_path / "digits", train_images=4, val_images=2, size=64)
    config = DataConfig(path=folder, short_sides=(), flip=0)
    dataset = open_dataset(config, "train", masks=True)
    count = 0
    for _, targets in (dataset[i] for i in range(len(dataset))):
        for box, mask in zip(targets.boxes, targets.masks, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            count += 1
    assert count >= 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(100, 300), width=st.integers(100, 300))
def test_masks_stay_on_their_objects(seed: int, height: int, width: int) -> None:
    """Through flips, resizes and crops a mask stays on the pixels that it was drawn on."""
    torch.manual_seed(seed)
    config = DataConfig(mean=(0, 0, 0), std=(1, 1, 1), short_sides=(120, 200))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wide, high = width / 5, height / 4
    mask = ((x - 2 * wide) / wide) ** 2 + ((y - 2 * high) / high) ** 2 <= 1
    box = [wide, high, 3 * wide, 3 * high]
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([box, [0, 0, 0.1, 0.1]]), format="XYXY", canvas_size=(height, width)
    )
    objects = {
        "boxes": boxes,
        "labels": torch.tensor([4, 5]),
        "masks": tv_tensors.Mask(torch.stack((mask, torch.zeros_like(mask))).to(torch.uint8)),
    }
    image = tv_tensors.Image(mask.to(torch.uint8).expand(3, -1, -1) * 255)
    pixels, found = build_transform(config, training=True)(image, objects)
    assert len(found["masks"]) == len(found["labels"]) == len(found["boxes"])
    for label, moved in zip(found["labels"], found["masks"], strict=True):
        assert moved.shape == pixels.shape[1:]
        if label == 4:
            white = pixels[0] > 0.5
            overlap = (moved.bool() & white).sum() / (moved.bool() | white).sum()
            assert overlap > 0.9


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_compressed_run_lengths_are_pycocotools(seed: int, h: int, w: int, share: float) -> None:
    mask = np.asfortranarray(np.random.default_rng(seed).random((h, w)) < share, np.uint8)
    rle = coco_mask.encode(mask)
    runs = decompressed(rle["counts"].decode())
    assert runs is not None
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.flatten(order="F"))
    segmentation = {"size": [h, w], "counts": rle["counts"].decode()}
    assert encoded(segmentation, (h, w)) == rle["counts"]


def test_only_annotations_of_masks_cost_memory(tmp_path: Path) -> None:
    """Crowds and boxes alone take no byte, and reading one image decodes no other."""
    data = with_masks()
    data["annotations"] += [annotation(200, 2, [1, 1, 5, 5], segmentation=[TRIANGLE])]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    table = read_annotations(path, masks=True)
    assert table.masks is not None
    lengths = np.diff(table.masks.spans, axis=1).squeeze(1)
    assert (lengths[table.crowd] == 0).all()
    assert (lengths[~table.crowd] > 0).all()
    assert table.masks.runs.nbytes == lengths.sum()
