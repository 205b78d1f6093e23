"""Finding the splits of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_files import content, write

from codetr.config import DataConfig
from codetr.data import DataError, open_dataset
from codetr.data.sources import find_split


def lay(directory: Path, *names: str) -> Path:
    """Create empty files and folders; a name with a dot is a file."""
    for name in names:
        path = directory / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    return directory


@pytest.mark.parametrize(
    ("names", "annotations", "images"),
    [
        (["annotations/instances_train2017.json", "train2017"], "instances_train2017", "train2017"),
        (["annotations/instances_train.json", "images/train"], "instances_train", "images/train"),
        (["annotations/instances_train2017.json", "train"], "instances_train2017", "train"),
        (["annotations/instances_train.json", "images"], "instances_train", "images"),
        (["annotations/lvis_v1_train.json", "train2017", "val2017"], "lvis_v1_train", "."),
        (
            [
                "annotations/instances_train2017.json",
                "annotations/instances_val2017.json",
                "annotations/captions_train2017.json",
                "train2017",
                "val2017",
            ],
            "instances_train2017",
            "train2017",
        ),
    ],
)
def test_finds_a_split(tmp_path: Path, names: list[str], annotations: str, images: str) -> None:
    files = find_split(lay(tmp_path, *names), "train")
    assert files.annotations == tmp_path / "annotations" / f"{annotations}.json"
    assert files.images == tmp_path / images


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no folder 'annotations'"),
        (
            ["annotations/other.json"],
            r"no file instances_train\*\.json or lvis_.*; found: other\.json",
        ),
        (["annotations"], "found: nothing"),
        (
            ["annotations/instances_train2014.json", "annotations/instances_train2017.json"],
            r"found instances_train2014\.json, instances_train2017\.json; keep one",
        ),
        (
            ["annotations/instances_train2017.json", "pictures"],
            "looked for train2017, images/train2017, train, .*folders there: annotations, pictures",
        ),
    ],
)
def test_says_what_is_missing(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_split(lay(tmp_path, *names), "train")


def test_opens_what_the_configuration_says(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, content(), split)
    config = DataConfig(dataset="coco", path=tmp_path, train_images=3, val_images=1)
    train, val = open_dataset(config, "train", seed=4), open_dataset(config, "val")
    assert (len(train), len(val), train.seed) == (3, 1, 4)
    assert min(val[0][0].shape[1:]) == 800


@pytest.mark.parametrize(
    ("path", "message"), [(None, "data.path is needed"), ("/no/where", "/no/where: no such folder")]
)
def test_no_folder(path: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(DataConfig(path=None if path is None else Path(path)), "train")
