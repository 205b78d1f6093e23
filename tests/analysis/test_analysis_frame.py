"""All analyses: the same under any batch size; what they refuse, write and read."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from analysis_samples import BOTH, CLASSES, DATA, checkpoint_of, dataset, subject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import FASTER_RCNN, KINDS, tiny_detector

from codetr.analysis import CATALOGUE, analysis
from codetr.analysis.frame import (
    AnalysisError,
    Measurement,
    Subject,
    default_label,
    default_labels,
    look_at,
    measure,
    object_counts,
    spread,
)
from codetr.analysis.instability import Instability, courses
from codetr.analysis.stability import instability
from codetr.data import Classes, DataError, open_dataset
from codetr.data.digits import make_digits
from codetr.inference import AHEAD
from codetr.structures import Targets
from codetr.weights import Weights
from orchestrator.experiment import paper_tables

SIZES = [(48, 64), (64, 48), (48, 64), (48, 64), (40, 72), (64, 48), (48, 64)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data"), SIZES, empty=(2,))


@pytest.fixture(scope="module")
def detectors():
    """One of each kind, with both heads."""
    return {kind: subject(*BOTH, kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def alone(data, detectors):
    """Every analysis of every kind of detector, an image at a time, when it is asked for."""

    class Alone(dict[tuple[str, str], Measurement]):
        def __missing__(self, key: tuple[str, str]) -> Measurement:
            name, kind = key
            self[key] = measure(analysis(name), detectors[kind], data, batch_size=1)
            return self[key]

    return Alone()


def test_the_catalogue_has_every_analysis() -> None:
    assert [analysis(name).name for name in CATALOGUE] == [*CATALOGUE]


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_size=st.integers(2, 8))
def test_exact_under_any_batch_size(name, kind, batch_size, request) -> None:
    """Images of several sizes: no image is padded, so neither are its neighbours seen."""
    data, detectors, alone = map(request.getfixturevalue, ("data", "detectors", "alone"))
    together = measure(analysis(name), detectors[kind], data, batch_size=batch_size)
    wanted = alone[name, kind]
    assert together.numbers.keys() == wanted.numbers.keys()
    for number, value in wanted.numbers.items():
        assert together.numbers[number] == pytest.approx(value, rel=1e-4, abs=1e-5), number
    assert together.arrays.keys() == wanted.arrays.keys()
    if name == "instability":
        assert np.array_equal(together.arrays["matches"], wanted.arrays["matches"])


@pytest.mark.parametrize("name", CATALOGUE)
def test_saved_and_read_again(name, alone, tmp_path) -> None:
    before = alone[name, "one-stage"]
    assert Measurement.load(tmp_path, name) is None
    written = before.save(tmp_path)
    assert {path.name for path in written} == {f"{name}.npz", f"{name}.json"}
    after = Measurement.load(tmp_path, name)
    assert after is not None
    assert (after.numbers, after.facts, after.label) == (
        before.numbers,
        before.facts,
        before.label,
    )
    assert all(np.array_equal(after.arrays[k], v) for k, v in before.arrays.items())
    (tmp_path / f"{name}.npz").write_bytes(b"PK\x03\x04 half of it")
    assert Measurement.load(tmp_path, name) is None


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "instability"])
def test_pages_show_their_pictures(name, alone, tmp_path) -> None:
    """Two detectors and two seeds of one, beside the paper."""
    several = [
        alone[name, "one-stage"],
        replace(alone[name, "one-stage"], label="seed 1"),
        alone[name, "two-stage"],
    ]
    several = [replace(m, group=g) for m, g in zip(several, ("a", "a", "b"), strict=True)]
    page, *pictures = analysis(name).report(several, tmp_path, paper_tables())
    text = page.read_text()
    assert "6 objects" not in text
    assert "7 images with 12 objects" in text
    assert "The paper (" in text
    assert re.findall(r"\]\((.*?)\)", text) == [picture.name for picture in pictures]
    for picture in pictures:
        assert picture.read_bytes()[:4] == b"\x89PNG"
    for number in re.findall(r"\d+\.\d+", text):
        assert float(number) < 100


def test_instability_compares_epochs_of_one_training(data, tmp_path) -> None:
    """Three epochs of one seed and two of another, given in any order."""
    made = [
        Subject.of(checkpoint_of(tiny_detector("atss"), epoch=e, seed=s), torch.device("cpu"))
        for e, s in ((3, 7), (1, 7), (1, 8), (2, 7), (2, 8))
    ]
    Instability.check([one.checkpoint for one in made])
    found = [measure(Instability, one, data) for one in made]
    first, second = courses(found)
    assert [*first.changes] == [2, 3]
    assert [*second.changes] == [2]
    rows = [
        {
            int(i): found[n].arrays["matches"][found[n].arrays["matches"][:, 0] == i, 1].tolist()
            for i in range(len(SIZES))
        }
        for n in (1, 3)
    ]
    assert first.changes[2] == instability(*rows)
    assert first.group == second.group == "K=1 atss"
    for arrays in (found[2].arrays, found[4].arrays):  # seed 8 with other settings
        arrays["training"] = np.array(f"other {arrays['training']}")
    assert [course.group for course in courses(found)] == ["K=1 atss (1)", "K=1 atss (2)"]
    for arrays in (found[2].arrays, found[4].arrays):
        arrays["training"] = np.array(str(arrays["training"]).removeprefix("other "))
    page, picture, numbers = Instability.report(found, tmp_path, {})
    with numbers.open() as file:
        head, *lines = csv.reader(file)
    assert head == ["group", "training", "epoch", "changed", "per_image"]
    assert [(label, int(e), float(a), float(b)) for _, label, e, a, b in lines] == [
        (course.label, epoch, change.changed, change.per_image)
        for course in courses(found)
        for epoch, change in course.changes.items()
    ]
    rows = re.findall(r"^\| (\d) \| (\S+)( \(\S+ to \S+\))? \|$", page.read_text(), re.MULTILINE)
    shares, queries = rows[:2], rows[2:]
    means = (first.changes[2].changed + second.changes[2].changed) / 2, first.changes[3].changed
    assert [float(value) for _, value, _ in shares] == pytest.approx(means, rel=1e-3)
    assert [(epoch, bool(ends)) for epoch, _, ends in queries] == [("2", True), ("3", False)]
    assert picture.exists()


# ---------------------------------------------------------------------------------- what is refused


def test_a_detector_without_the_heads() -> None:
    none, one = checkpoint_of(tiny_detector()), checkpoint_of(tiny_detector("atss"))
    for name in ("conflicts", "queries"):
        analysis(name).check([one])
        with pytest.raises(AnalysisError, match=r"this checkpoint: has no auxiliary head \(K = 0"):
            analysis(name).check([one, none])
    for name in ("discriminability", "iof-iob"):
        analysis(name).check([none])


def test_checkpoints_that_are_no_two_epochs() -> None:
    one = checkpoint_of(tiny_detector())
    with pytest.raises(AnalysisError, match="at least 2"):
        Instability.check([one])
    with pytest.raises(AnalysisError, match="no two of"):
        Instability.check([one, checkpoint_of(tiny_detector(), seed=3, epoch=2)])
    with pytest.raises(AnalysisError, match="no two of"):
        Instability.check([one, one])


def test_weights_without_a_training(data) -> None:
    """They say what their checkpoint says, but nothing of epochs."""
    checkpoint = replace(checkpoint_of(tiny_detector("atss")), source="there/w.safetensors")
    weights = Weights.of(checkpoint)
    analysis("conflicts").check([weights])
    found, before = (
        measure(analysis("conflicts"), Subject.of(one, torch.device("cpu")), data)
        for one in (weights, checkpoint)
    )
    assert found.numbers == before.numbers
    assert found.label == "K=1 atss, w.safetensors"
    assert before.facts == {**found.facts, "seed": 7, "epoch": 1}
    for several in ([weights], [checkpoint, weights]):
        with pytest.raises(AnalysisError, match=r"^there/w\.safetensors: weights without a train"):
            Instability.check(several)


@pytest.mark.parametrize("name", CATALOGUE)
def test_data_without_objects(name, detectors, tmp_path) -> None:
    empty = dataset(tmp_path, [(48, 64)] * 2, empty=(0, 1))
    with pytest.raises(AnalysisError, match=r"instances_val\.json: no object in 2 images"):
        measure(analysis(name), detectors["one-stage"], empty)


def test_classes_that_disagree(data) -> None:
    checkpoint = checkpoint_of(tiny_detector())
    other = replace(checkpoint, classes=Classes(("cat", "dog", "cow"), CLASSES.category_ids))
    with pytest.raises(DataError, match="classes differ"):
        measure(analysis("iof-iob"), Subject.of(other, torch.device("cpu")), data)


# ------------------------------------------------------------------------------------- small things


def test_facts_and_labels(alone) -> None:
    found = alone["conflicts", "one-stage"]
    assert found.label == "K=2 atss + faster_rcnn, seed 7, epoch 1"
    assert (found.facts["k"], found.facts["images"], found.facts["objects"]) == (2, 7, 12)
    json.dumps(found.facts)
    assert default_label(checkpoint_of(tiny_detector())) == "K=0, seed 7, epoch 1"


def test_trainings_that_differ_in_the_seed_alone_are_one_group() -> None:
    one, two = (checkpoint_of(tiny_detector("atss"), seed=s) for s in (7, 8))
    later = replace(one, epoch=2)
    slower = replace(one, training=one.training.model_copy(update={"batch_size": 3}))
    weights = [Weights.of(replace(one, source="w")), Weights.of(replace(two, source="w"))]
    labels = default_labels([one, two, later, slower, replace(slower, seed=9), *weights])
    first, second = "K=1 atss, epoch 1 (1)", "K=1 atss, epoch 1 (2)"
    assert labels == [
        ("K=1 atss, seed 7, epoch 1 (1)", first),
        ("K=1 atss, seed 8, epoch 1", first),
        ("K=1 atss, seed 7, epoch 2", "K=1 atss, seed 7, epoch 2"),
        ("K=1 atss, seed 7, epoch 1 (2)", second),
        ("K=1 atss, seed 9, epoch 1", second),
        ("K=1 atss, w (1)", "K=1 atss, w (1)"),
        ("K=1 atss, w (2)", "K=1 atss, w (2)"),
    ]
    assert default_labels([one, later])[0] == 2 * ("K=1 atss, seed 7, epoch 1",)


def test_objects_are_counted_without_crowds(data) -> None:
    assert object_counts(data).tolist() == [2, 2, 0, 2, 2, 2, 2]


@given(st.integers(1, 50), st.integers(1, 60))
def test_images_are_spread_evenly(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) == min(count, most)
    assert places == sorted(set(places))
    gaps = np.diff([*places, count])
    assert places[0] == 0
    assert gaps.max() - gaps.min() <= 1
    assert spread(count, None) == [*range(count)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 4))
def test_images_that_wait_for_their_like_are_few(sides: list[int], batch_size: int) -> None:
    """However many sizes there are: every image is seen once, and few are held at a time."""

    class Images:
        canvas, held = None, 0

        def __getitem__(self, place: int) -> tuple[torch.Tensor, Targets]:
            self.held += 1
            assert self.held <= AHEAD * batch_size
            return torch.zeros(3, 4, sides[place]), Targets(torch.zeros(0, 4), torch.zeros(0))

    images, seen = Images(), []
    for some in look_at(images, range(len(sides)), batch_size):
        images.held -= len(some.indices)
        seen += some.indices
        assert len(some.indices) <= batch_size
        assert {sides[place] for place in some.indices} == {some.batch.pixels.shape[-1]}
    assert sorted(seen) == [*range(len(sides))]


def test_a_full_batch_does_not_wait() -> None:
    """Of one size, batches are full; of many, the commonest goes first."""

    class Images:
        canvas = None

        def __init__(self, *sides: int) -> None:
            self.sides = sides

        def batches(self) -> list[list[int]]:
            return [some.indices for some in look_at(self, range(len(self.sides)), 3)]

        def __getitem__(self, place: int) -> tuple[torch.Tensor, Targets]:
            side = self.sides[place]
            return torch.zeros(3, side, side), Targets(torch.zeros(0, 4), torch.zeros(0))

    assert Images(1, 1, 1, 1, 1, 1, 1).batches() == [[0, 1, 2], [3, 4, 5], [6]]
    assert AHEAD == 4
    assert Images(*range(1, 11), 5, 11, 12).batches()[0] == [4, 10]


def test_some_images_only(data, detectors) -> None:
    seen = []
    found = measure(
        analysis("iof-iob"),
        detectors["one-stage"],
        data,
        images=3,
        on_images=lambda done, total: seen.append((done, total)),
    )
    assert found.facts["images"] == 3
    assert seen[-1] == (3, 3)


def test_every_kind_of_head_takes_part(tmp_path) -> None:
    """K = 7; Mask R-CNN's masks are there where heads are trained."""
    heads = (*BOTH, "paa", "gfl", "fcos", "retinanet", {**FASTER_RCNN, "type": "mask_rcnn"})
    one = subject(*heads)
    plain = dataset(tmp_path, [(48, 64)] * 2)
    found = measure(analysis("conflicts"), one, plain)
    assert found.arrays["matrix"].shape == (8, 8)
    assert found.numbers["conflict"] > 0
    assert found.numbers["distance/mask_rcnn"] > 0
    with pytest.raises(ValueError, match="has no masks"):
        measure(analysis("queries"), one, plain)
    assert analysis("queries").trains_heads
    folder = make_digits(tmp_path / "digits", train_images=1, val_images=2, size=64)
    data = open_dataset(DATA.model_copy(update={"path": folder}), "val", masks=True)
    many = checkpoint_of(one.checkpoint.detector.model_copy(update={"num_classes": 10}))
    many = replace(many, classes=data.classes)
    found = measure(analysis("queries"), Subject.of(many, torch.device("cpu")), data)
    for name in one.model.config.head_names:
        assert found.numbers[f"positives_per_object/{name}"] > 0
