"""Annotation files: what is read, and that each kind of nonsense is named."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pytest
from coco_files import CATEGORIES, annotation, content, image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codetr.data import Classes, DataError
from codetr.data.annotations import Annotations, read_annotations

Data = dict[str, Any]


def read(folder: Path, data: Any) -> Annotations:
    path = folder / "instances_train.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_annotations(path)


def test_reads_what_is_there(tmp_path: Path) -> None:
    table = read(tmp_path, content())
    assert table.classes == Classes(("cat", "dog", "bird"), (3, 7, 90))
    assert table.image_ids.tolist() == [5, 2, 11, 8]
    assert table.names.tolist() == ["5.png", "2.png", "11.png", "8.png"]
    assert table.sizes.tolist() == [[30, 40], [30, 40], [50, 20], [30, 40]]
    assert [table.ids[table.of(i)].tolist() for i in range(4)] == [
        [101, 104],
        [],
        [100, 102],
        [103],
    ]
    assert table.labels[table.of(2)].tolist() == [2, 1]
    assert table.crowd[table.of(2)].tolist() == [False, True]
    assert table.problems == ()
    assert table.lvis is None


def test_clips_boxes_that_reach_outside(tmp_path: Path) -> None:
    table = read(tmp_path, content())
    assert table.clipped(2).tolist() == [[0, 10, 10, 50], [0, 0, 20, 20]]
    assert table.boxes[table.of(2)][0].tolist() == [-5, 10, 15, 60], "metrics see the file's own"


def test_area_defaults_to_the_box(tmp_path: Path) -> None:
    data = content()
    del data["annotations"][1]["area"]
    assert 200 in read(tmp_path, data).areas.tolist()


def broken_annotation(**changes: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["annotations"][1].update(changes)

    return change


def broken_image(**changes: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["images"][0].update(changes)

    return change


def without_key(part: str, key: str, position: int) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        del data[part][position][key]

    return change


BROKEN = {
    "no area": (broken_annotation(bbox=[1, 2, 0, 5]), "annotation 101, image 5: box", "no area"),
    "negative": (broken_annotation(bbox=[1, 2, 3, -5]), "annotation 101, image 5: box", "no area"),
    "nan": (broken_annotation(bbox=[1, math.nan, 3, 5]), "annotation 101, image 5", "not finite"),
    "infinite": (broken_annotation(bbox=[1, 2, math.inf, 5]), "annotation 101", "not finite"),
    "outside": (
        broken_annotation(bbox=[41, 0, 5, 5]),
        "annotation 101, image 5",
        "outside",
        "40×30",
    ),
    "three numbers": (broken_annotation(bbox=[1, 2, 3]), "annotation 101, image 5", "[1, 2, 3]"),
    "text": (broken_annotation(bbox=["a", 2, 3, 4]), "annotation 101, image 5", "'a'"),
    "no box": (
        without_key("annotations", "bbox", 1),
        "annotation 101, image 5",
        "'bbox' is missing",
    ),
    "category": (broken_annotation(category_id=4), "annotation 101, image 5", "category id 4"),
    "orphan": (broken_annotation(image_id=77), "annotation 101, image 77", "no such image"),
    "repeated": (broken_annotation(id=100), "annotation 100, image 5", "another annotation"),
    "area": (broken_annotation(area=-3), "annotation 101, image 5", "area -3.0"),
    "float id": (broken_annotation(id=1.5), "annotations[1]", "image 5", "1.5"),
    "no id": (without_key("annotations", "id", 1), "annotations[1]", "'id' is missing"),
    "huge id": (broken_annotation(id=2**70), "annotation 11805", "an integer up to"),
    "repeated image": (broken_image(id=2), "image 2", "this id too"),
    "no width": (without_key("images", "width", 0), "image 5", "'width' is missing"),
    "no height": (broken_image(height=0), "image 5", "40 and 0"),
    "no name": (without_key("images", "file_name", 0), "image 5", "'file_name' is missing"),
    "wrong name": (broken_image(file_name=3), "image 5", "'file_name' is 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_names_each_problem(tmp_path: Path, case: str) -> None:
    change, *expected = BROKEN[case]
    data = content()
    change(data)
    problems = read(tmp_path, data).problems
    assert len([p for p in problems if "no such image" not in p.what or case == "orphan"]) == 1
    for text in ("instances_train.json", *expected):
        assert text in str(problems[0])


STRUCTURE = {
    "not json": ("hello", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "nested": ("[" * 100_000, "not valid JSON"),
    "list": ([], "no list 'images'"),
    "no annotations": ({"images": [], "categories": []}, "no list 'annotations'"),
    "no classes": (content() | {"categories": []}, "'categories' is empty"),
    "no name": (content() | {"categories": [{"id": 1}]}, "categories[0]"),
    "text id": (content() | {"categories": [{"id": "1", "name": "a"}]}, "categories[0]"),
    "class twice": (content() | {"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "the id 3"),
    "name twice": (content() | {"categories": [*CATEGORIES, {"id": 4, "name": "cat"}]}, "'cat'"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_refuses_files_as_a_whole(tmp_path: Path, case: str) -> None:
    data, expected = STRUCTURE[case]
    with pytest.raises(DataError, match=r"instances_train\.json") as error:
        read(tmp_path, data)
    assert expected in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        read_annotations(tmp_path / "none.json")


def test_classes_that_differ_are_shown() -> None:
    mine, theirs = Classes(("a", "b"), (1, 2)), Classes(("a", "c"), (1, 2))
    mine.require_same(mine, "train", "val")
    with pytest.raises(DataError, match=r"train has 2, .*2 'b'; val has 2, .*2 'c';"):
        mine.require_same(theirs, "train", "val")


common = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@common
@given(cut=st.integers(0, len(json.dumps(content())) - 1))
def test_any_truncation_is_one_clear_error(tmp_path: Path, cut: int) -> None:
    with pytest.raises(DataError, match="truncated"):
        read(tmp_path, json.dumps(content())[:cut])


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.none() | st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@common
@given(junk=junk, draw=st.data())
def test_no_content_escapes_validation(tmp_path: Path, junk: Any, draw: st.DataObject) -> None:
    data: Any = copy.deepcopy(content())
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = draw.draw(st.sampled_from(list(keys)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.draw(st.booleans()):
            place = place[key]
        else:
            place[key] = junk
            break
    # Either it is refused as a whole, or what is left is sound.
    with contextlib.suppress(DataError):
        table = read(tmp_path, data)
        assert np.isfinite(table.boxes).all()
        for i in range(len(table)):
            corners = table.clipped(i)
            assert (corners[:, 2:] > corners[:, :2]).all()


@st.composite
def datasets(draw: st.DrawFn) -> Data:
    ids = draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=6, unique=True))
    category_ids = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True))
    numbers = draw(st.lists(st.integers(1, 10**12), max_size=12, unique=True))
    side = st.floats(0.5, 100)
    return {
        "images": [image(i, 100, 80) for i in ids],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [
            annotation(
                n,
                draw(st.sampled_from(ids)),
                [draw(st.floats(-0.4, 99)), draw(st.floats(-0.4, 79)), draw(side), draw(side)],
                draw(st.sampled_from(category_ids)),
                iscrowd=draw(st.integers(0, 1)),
            )
            for n in numbers
        ],
    }


@common
@given(data=datasets())
def test_agrees_with_pycocotools(tmp_path: Path, data: Data) -> None:
    table = read(tmp_path, data)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = pycocotools.coco.COCO(str(table.path))
    assert table.problems == ()
    assert list(table.classes.category_ids) == sorted(reference.getCatIds())
    for i, image_id in enumerate(table.image_ids.tolist()):
        expected = reference.loadAnns(reference.getAnnIds(imgIds=[image_id]))
        rows = table.of(i)
        assert table.ids[rows].tolist() == [a["id"] for a in expected]
        assert table.boxes[rows].tolist() == [a["bbox"] for a in expected]
        assert table.crowd[rows].tolist() == [a["iscrowd"] for a in expected]
        ids = np.array(table.classes.category_ids)[table.labels[rows]].tolist()
        assert ids == [a["category_id"] for a in expected]


@common
@given(data=datasets(), draw=st.data())
def test_selection_keeps_images_whole(tmp_path: Path, data: Data, draw: st.DataObject) -> None:
    table = read(tmp_path, data)
    chosen = draw.draw(st.lists(st.integers(0, len(table) - 1), unique=True))
    part = table.select(np.array(chosen, np.int64))
    assert part.image_ids.tolist() == table.image_ids[chosen].tolist()
    for new, old in enumerate(chosen):
        assert part.ids[part.of(new)].tolist() == table.ids[table.of(old)].tolist()
    assert part.owners().tolist() == sorted(part.owners().tolist())
