"""The embedded data set: the same bytes every time, and true to its description."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

from codetr.config import DataConfig
from codetr.data import DataError, digits, open_dataset
from codetr.data.check import check_dataset
from codetr.data.digits import cached_digits, make_digits, mask_box


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("plain") / "set", train_images=150, val_images=20)


@pytest.fixture(scope="module")
def long_tailed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lvis") / "set"
    return make_digits(folder, lvis=True, train_images=300, val_images=60)


def annotations(directory: Path, split: str = "train") -> dict[str, Any]:
    return json.loads((directory / "annotations" / f"instances_{split}.json").read_text())


def masks(data: dict[str, Any], image_id: int) -> list[np.ndarray]:
    return [
        coco_mask.decode(a["segmentation"]).astype(bool)
        for a in data["annotations"]
        if a["image_id"] == image_id
    ]


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("lvis", [False, True])
def test_the_same_bytes_every_time(tmp_path: Path, lvis: bool) -> None:
    made = [
        hashes(make_digits(tmp_path / name, lvis=lvis, seed=seed, train_images=5, val_images=3))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert len(made[0]) == 10
    assert made[0] == made[1]
    assert not set(made[0].values()) & set(made[2].values())


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path, plain: Path) -> None:
    few = make_digits(tmp_path / "few", train_images=3, val_images=1)
    names = ("000001.jpg", "000002.jpg", "000003.jpg")
    assert [(few / "train" / n).read_bytes() for n in names] == [
        (plain / "train" / n).read_bytes() for n in names
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_visible_pixels(plain: Path, split: str) -> None:
    data = annotations(plain, split)
    for image in data["images"]:
        found = masks(data, image["id"])
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        assert 1 <= len(objects) <= 6
        assert np.stack(found).sum(0).max() == 1, "a pixel belongs to one object"
        boxes = [a["bbox"] for a in objects]
        assert boxes == [mask_box(mask) for mask in found]
        assert [a["area"] for a in objects] == [box[2] * box[3] for box in boxes]
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes)) - np.eye(len(boxes))
        assert ious.max() < 0.3


def test_numbers_and_sizes(plain: Path) -> None:
    data = annotations(plain)
    counts = Counter(a["image_id"] for a in data["annotations"])
    assert 3.1 < np.mean(list(counts.values())) < 3.9
    sides = [max(a["bbox"][2:]) for a in data["annotations"]]
    assert max(sides) <= 48
    # Log-uniform between 12 and 48: as many below 24 as above, but for what is covered.
    assert 0.4 < np.mean(np.array(sides) <= 24) < 0.65
    assert np.percentile(sides, 5) >= 11
    assert {a["category_id"] for a in data["annotations"]} == set(range(1, 11))
    assert 0.1 < np.mean([a["area"] >= 32**2 for a in data["annotations"]]) < 0.4


def test_digits_stand_out(plain: Path) -> None:
    data = annotations(plain)
    differences = []
    for image in data["images"]:
        found = masks(data, image["id"])
        luma = np.asarray(Image.open(plain / "train" / image["file_name"]).convert("L")) / 255.0
        background = ~np.any(found, axis=0)
        for mask in found:
            x, y, width, height = mask_box(mask)
            around = np.zeros_like(mask)
            around[y : y + height, x : x + width] = True
            around &= background
            if around.sum() > 20:
                differences.append(abs(np.median(luma[mask]) - np.median(luma[around])))
    assert np.mean(differences) > 0.3
    assert np.mean(np.array(differences) < 0.1) < 0.1


def test_no_object_is_more_than_half_covered() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        placed: list[np.ndarray] = []
        full: list[int] = []
        for _ in range(6):
            shape = rng.random((rng.integers(12, 49), rng.integers(6, 30))) < 0.7
            position = digits._place(shape, placed, full, 96, rng)
            if position is not None:
                placed = position[2]
                full.append(int(shape.sum()))
        assert all(m.sum() >= area / 2 for m, area in zip(placed, full, strict=True))
        assert len(placed) >= 2


def test_handwriting_is_divided_between_the_splits() -> None:
    train, val = (digits._samples(split) for split in ("train", "val"))
    source = load_digits()
    assert sum(map(len, train)) + sum(map(len, val)) == len(source.target)
    assert 0.74 < sum(map(len, train)) / len(source.target) < 0.76
    for digit in range(10):
        assert min(len(train[digit]), len(val[digit])) > 30
        seen = {sample.tobytes() for sample in train[digit]}
        assert sum(sample.tobytes() in seen for sample in val[digit]) <= 1


def test_photographs_are_divided_between_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 640)[None, :, None], (427, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(digits, "_photographs", lambda: (ramp, ramp))
    for index in range(40):
        train, val = (
            digits._background(split, 96, np.random.default_rng(index)) * 255
            for split in ("train", "val")
        )
        assert train.max() <= 255 * 2 / 3 < val.min() + 1


def test_size_is_free(tmp_path: Path) -> None:
    directory = make_digits(tmp_path / "set", train_images=3, val_images=1, size=160)
    assert Image.open(directory / "train" / "000001.jpg").size == (160, 160)
    assert check_dataset(directory).problems == []


# -------------------------------------------------------------------------------------------- LVIS


def test_the_long_tail_has_all_of_lvis_s_groups(long_tailed: Path) -> None:
    train, val = annotations(long_tailed), annotations(long_tailed, "val")
    assert len(train["categories"]) == 30
    assert Counter(c["frequency"] for c in train["categories"]).keys() == {"r", "c", "f"}
    assert [c["frequency"] for c in val["categories"]] == [
        c["frequency"] for c in train["categories"]
    ], "frequency is that of training, in both files"
    for category in train["categories"]:
        owners = [a["image_id"] for a in train["annotations"] if a["category_id"] == category["id"]]
        assert category["instance_count"] == len(owners)
        assert category["image_count"] == len(set(owners))
        expected = "r" if len(set(owners)) <= 10 else "c" if len(set(owners)) <= 100 else "f"
        assert category["frequency"] == expected
    # Half of val is uniform: rare classes occur there, relative to its size, far more often.
    rare = {c["id"] for c in train["categories"] if c["frequency"] == "r"}
    shares = [np.mean([a["category_id"] in rare for a in d["annotations"]]) for d in (train, val)]
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_federated_annotations(long_tailed: Path, split: str) -> None:
    data = annotations(long_tailed, split)
    hidden = 0
    for image in data["images"]:
        present = {a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]}
        assert len(set(image["neg_category_ids"])) == 4
        assert not present & set(image["neg_category_ids"])
        partial = image["not_exhaustive_category_ids"]
        assert len(partial) <= 1
        assert set(partial) <= present, "one instance is hidden, another is annotated"
        hidden += len(partial)
    assert hidden > 0
    assert all("iscrowd" not in a for a in data["annotations"])


def test_the_reader_takes_it_for_lvis(long_tailed: Path) -> None:
    config = DataConfig(dataset="coco", path=long_tailed, short_sides=())
    train, val = (open_dataset(config, split) for split in ("train", "val"))
    assert train.is_lvis
    assert val.is_lvis
    assert len(train.classes) == 30
    train.classes.require_same(val.classes, "train", "val")
    assert check_dataset(long_tailed).problems == []


# --------------------------------------------------------------------------------- files and cache


def test_progress_and_completeness(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_digits(tmp_path / "set", train_images=3, val_images=2, progress=lambda *n: seen.append(n))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_digits(tmp_path / "set", train_images=1, val_images=1)
    with pytest.raises(DataError, match="not empty; choose a new folder"):
        make_digits(tmp_path / "set", train_images=1, val_images=1)


@pytest.mark.parametrize("wrong", [{"train_images": 0}, {"size": 8}, {"seed": -1}])
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="digits need"):
        make_digits(tmp_path / "set", **wrong)


def test_nothing_is_left_of_an_interrupted_attempt(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / "set", train_images=3, val_images=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/set: cannot be written \("):
        make_digits(tmp_path / "file" / "set", train_images=1, val_images=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written .*XDG_CACHE_HOME"):
        cached_digits()


SMALL = """
import codetr.data.digits as digits
digits.embedded_recipe = lambda *, lvis: digits.Recipe(lvis, 0, 30, 5, 96)
made = []
print(digits.cached_digits(lvis=False, progress=lambda done, total: made.append(done)), len(made))
"""


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    leftover = tmp_path / "codetr" / ".digits-v2-30+5-96px-seed0-killed"
    leftover.mkdir(parents=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SMALL], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    lines = sorted(process.communicate(timeout=120)[0].split() for process in processes)
    directory = tmp_path / "codetr" / "digits-v2-30+5-96px-seed0"
    assert lines == [[str(directory), "0"], [str(directory), "0"], [str(directory), "35"]]
    assert check_dataset(directory).problems == []
    assert not leftover.exists()


def test_made_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "embedded_recipe", lambda *, lvis: digits.Recipe(lvis, 0, 4, 2, 96))
    config = DataConfig(dataset="digits", short_sides=())
    train, val = (open_dataset(config, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 2)
    assert train.classes.names == tuple("0123456789")
    assert train.annotations.is_relative_to(tmp_path / "codetr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_digits(lvis=True).is_relative_to(tmp_path / "home" / ".cache" / "codetr")
