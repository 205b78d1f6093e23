"""What docs/data.md shows is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from codetr.data.check import check_dataset

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_smallest_annotation_file_is_accepted(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (entry,) = json.loads(example)["images"]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(example)
        (tmp_path / split).mkdir()
        Image.new("RGB", (entry["width"], entry["height"])).save(
            tmp_path / split / entry["file_name"]
        )
    report = check_dataset(tmp_path)
    assert report.problems == []
    assert report.splits[0].class_objects == {"dog": 1}


def test_the_problems_are_quoted_as_they_are_said() -> None:
    folder = Path(__file__).parents[2] / "codetr" / "data"
    source = " ".join(path.read_text() for path in folder.glob("*.py"))
    quotes = re.findall(
        r"`([^`]+)`", PAGE[PAGE.index("| it says") : PAGE.index("With `--skip-bad`")]
    )
    words = {"width", "height", "images", "categories"}
    checked = 0
    for quote in quotes:
        for part in re.split(r"…|\d+|'\w+'|×|\[\]", quote):
            if len(part.strip(" ()':")) > 6 and quote not in words:
                assert part.strip(" ()'") in source, quote
                checked += 1
    assert checked > 10
