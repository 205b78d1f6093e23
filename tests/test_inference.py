"""Detecting in image files, and pictures of what was found."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import CLASSES, tiny_detector
from torchvision.ops import box_iou

from codetr.config import DataConfig
from codetr.data import DataError, open_dataset
from codetr.data.digits import make_digits
from codetr.detector import CoDETR
from codetr.inference import comparison, draw, predict
from codetr.metrics import to_coco_results
from codetr.structures import Detections, Targets

MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CoDETR(tiny_detector("atss")).eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, train_images=1, val_images=9)
    return open_dataset(DataConfig(path=folder, short_sides=()), "val")


def detections(boxes, scores, labels):
    return Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels))


@pytest.mark.parametrize("mode", MODES)
def test_predicts_in_images_of_every_mode(mode, model, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = (
        image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16") else "image.png")
    image.save(path)
    (found,) = predict(model, [path], DataConfig(short_sides=(64,)))
    assert found.path == path
    assert found.image.shape == (3, 40, 60)
    assert found.image.dtype == torch.uint8
    boxes = found.detections.boxes
    assert len(boxes) > 0
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 60).all()
    assert (boxes[:, 3] <= 40).all()


def test_boxes_are_in_pixels_of_the_file_whatever_the_network_sees(model, digits):
    paths = [digits.images / name for name in digits.table.names[:3].tolist()]
    whole = DataConfig(short_sides=())
    for path, found in zip(paths, predict(model, paths, whole, batch_size=2), strict=True):
        enlarged = path.parent / f"{path.stem}-twice.png"
        with Image.open(path) as image:
            image.resize((192, 192), Image.Resampling.NEAREST).save(enlarged)
        (twice,) = predict(model, [enlarged], DataConfig(short_sides=(96,)))
        assert twice.image.shape == (3, 192, 192)
        best = box_iou(found.detections.boxes * 2, twice.detections.boxes).max(1).values
        assert best.mean() > 0.9
        assert found.path == path


def test_a_batch_finds_what_single_images_do(model, digits):
    paths = [digits.images / name for name in digits.table.names[:3].tolist()]
    together = predict(model, paths, DataConfig(short_sides=()), batch_size=3)
    for one, other in zip(predict(model, paths, DataConfig(short_sides=())), together, strict=True):
        torch.testing.assert_close(one.detections.scores, other.detections.scores)


def test_auxiliary_branch(model, digits):
    path = digits.images / digits.table.names[0]
    (found,) = predict(model, [path], DataConfig(short_sides=()), branch="atss")
    assert len(found.detections) > 0


def test_predictions_are_coco_json(model, digits):
    path = digits.images / digits.table.names[0]
    (found,) = predict(model, [path], DataConfig(short_sides=()))
    results = json.loads(json.dumps(to_coco_results({1: found.detections}, CLASSES)))
    assert {r["category_id"] for r in results} <= set(CLASSES.category_ids)


@pytest.mark.parametrize("content", [None, b"no image"])
def test_files_that_are_no_image_are_named(content, model, tmp_path):
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        list(predict(model, [path], DataConfig()))


# ---------------------------------------------------------------------------------------- pictures


def test_small_images_are_enlarged_and_large_ones_are_not():
    nothing = detections([[0.0, 0, 1, 1]], [0.1], [0])
    sizes = [
        draw(torch.zeros(3, *size, dtype=torch.uint8), nothing, CLASSES).size
        for size in ((24, 96), (600, 500), (96, 1))
    ]
    assert sizes == [(480, 120), (500, 600), (5, 480)]


def test_boxes_are_drawn_where_they_are_and_only_confident_ones():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    two = detections([[10.0, 20, 60, 80], [70.0, 70, 90, 90]], [0.9, 0.2], [1, 2])
    painted = np.asarray(draw(image, two, CLASSES, side=500)).any(-1)
    rows, columns = np.nonzero(painted)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (50, 100, 300, 400)
    everything = np.asarray(draw(image, two, CLASSES, side=500, min_score=0.1)).any(-1)
    assert np.nonzero(everything)[1].max() == 450


def test_nothing_is_drawn_on_an_image_without_objects():
    image = torch.full((3, 50, 50), 90, dtype=torch.uint8)
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert (np.asarray(draw(image, empty, CLASSES)) == 90).all()


@pytest.mark.parametrize(("images", "rows"), [(4, 2), (1, 1), (50, 5)])
def test_comparison_has_a_row_for_every_two_images(images, rows, digits):
    found = {
        i: detections([[10.0, 10, 50, 50]], [0.8], [3]) for i in digits.table.image_ids.tolist()
    }
    picture = comparison(digits, found, images=images, side=200)
    columns = 4 if images > 1 else 2
    assert picture.size == (columns * 205 + 5, 20 + rows * 205)
    assert digits.transform is not None
