"""The report on a data set counts what is there and lists everything that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from coco_files import annotation, content, image, write

from codetr.data.check import check_dataset


def test_counts(tmp_path: Path) -> None:
    data = content()
    data["images"].append(image(20, 300, 300))
    data["annotations"] += [
        annotation(200, 20, [0, 0, 32, 32]),
        annotation(201, 20, [0, 0, 96, 96]),
    ]
    for split in ("train", "val"):
        write(tmp_path, data, split)
    seen: list[tuple[int, int]] = []
    report = check_dataset(tmp_path, progress=lambda *n: seen.append(n))
    assert report.problems == []
    assert [s.split for s in report.splits] == ["train", "val"]
    train = report.splits[0]
    assert (train.images, train.empty_images, train.objects, train.crowds) == (5, 1, 6, 1)
    assert train.class_objects == {"cat": 4, "dog": 1, "bird": 1}
    assert train.class_images == {"cat": 3, "dog": 1, "bird": 1}
    assert train.sizes == {"small": 3, "medium": 2, "large": 1}
    assert not train.lvis
    assert seen[4] == (5, 5)


def test_lists_every_problem(tmp_path: Path) -> None:
    data = content()
    data["annotations"][1]["bbox"][2] = 0
    data["annotations"].append(annotation(300, 77, [0, 0, 1, 1]))
    data["images"] += [image(30), image(31)]
    write(tmp_path, data)
    (tmp_path / "train" / "30.png").unlink()
    (tmp_path / "train" / "31.png").write_bytes(b"no image")
    write(tmp_path, content() | {"categories": data["categories"][:1]}, "val")
    report = check_dataset(tmp_path)
    found = [(p.image_id, p.annotation_id) for p in report.splits[0].problems]
    assert found == [(77, 300), (5, 101), (30, None), (31, None)]
    assert report.splits[0].images == 3
    text = "\n".join(report.problems)
    for expected in ("no area", "no such image", "no file", "31.png: cannot be decoded"):
        assert expected in text
    assert len(report.splits[1].problems) == 4
    assert "classes differ: instances_train.json has 3" in report.failures[0]
    assert len(check_dataset(tmp_path, decode=False).splits[0].problems) == 3


def test_whole_splits_that_fail(tmp_path: Path) -> None:
    write(tmp_path, content() | {"annotations": []})
    report = check_dataset(tmp_path)
    assert len(report.failures) == 2
    assert "no object to learn from" in report.failures[0]
    assert "instances_val*.json" in report.failures[1]
    (tmp_path / "annotations" / "instances_train.json").write_text("{")
    assert "not valid JSON" in check_dataset(tmp_path).problems[0]


def test_needs_no_torch() -> None:
    code = (
        "import sys, codetr.data.check, codetr.data.digits, codetr.data.sources; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
