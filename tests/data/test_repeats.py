"""Repeat factors by brute force, epochs of known length, and repeats that differ."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import CATEGORIES, annotation, image, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codetr.config import DataConfig
from codetr.data import CocoDataset, build_loader, open_dataset
from codetr.data.annotations import read_annotations
from codetr.data.loader import batches
from codetr.data.repeats import draw_epoch, repeat_factors

IDS = [category["id"] for category in CATEGORIES]


def data(objects: list[list[tuple[int, bool]]]) -> dict[str, Any]:
    """Each image's objects as (number of the class, whether it is a crowd)."""
    flat = [(i, *which) for i, image_objects in enumerate(objects) for which in image_objects]
    return {
        "images": [image(i + 1) for i in range(len(objects))],
        "annotations": [
            annotation(n + 1, i + 1, [1, 2, 10, 10], IDS[c], iscrowd=int(crowd))
            for n, (i, c, crowd) in enumerate(flat)
        ],
        "categories": CATEGORIES,
    }


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    objects=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=4), min_size=1, max_size=12
    ),
    threshold=st.floats(0.001, 1),
)
def test_factors_are_those_of_the_definition(
    tmp_path: Path, objects: list[list[tuple[int, bool]]], threshold: float
) -> None:
    table = read_annotations(write(tmp_path, data(objects), images=False))
    present = [{c for c, crowd in of_image if not crowd} for of_image in objects]
    # The classes' numbers follow the ids, as CATEGORIES do.
    counts = [sum(c in classes for classes in present) for c in range(3)]
    assert table.class_images().tolist() == counts
    expected = [
        max([1.0, *(math.sqrt(threshold / (counts[c] / len(objects))) for c in classes)])
        for classes in present
    ]
    assert repeat_factors(table, threshold).tolist() == pytest.approx(expected)


factors = st.lists(st.floats(1, 5), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(values=factors, seed=st.integers(0, 2**31))
def test_an_epoch_is_as_long_as_the_data_set(values: list[float], seed: int) -> None:
    epoch = draw_epoch(
        torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    )
    assert len(epoch) == len(values)
    assert len(set(epoch)) == len(epoch), "a repeat of an image occurs once"
    for position, repeat in epoch:
        assert 0 <= repeat < math.ceil(values[position])


def test_images_are_seen_in_proportion_to_their_factors() -> None:
    values = [1.0, 1.0, 1.5, 2.25, 4.0] * 20
    generator = torch.Generator().manual_seed(0)
    seen = Counter(
        position
        for _ in range(200)
        for position, _ in draw_epoch(torch.tensor(values, dtype=torch.float64), generator)
    )
    of_value = Counter()
    for position, count in seen.items():
        of_value[values[position]] += count
    shares = {value: of_value[value] / (200 * len(values)) for value in set(values)}
    total = sum(values)
    expected = {value: value * values.count(value) / total for value in set(values)}
    assert shares == pytest.approx(expected, rel=0.02)


def test_factors_of_one_are_a_permutation() -> None:
    epoch = draw_epoch(torch.ones(30, dtype=torch.float64), torch.Generator().manual_seed(3))
    assert sorted(epoch) == [(i, 0) for i in range(30)]


@settings(max_examples=100, deadline=None)
@given(
    values=factors,
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_world_size_sees_the_same_batches(
    values: list[float], batch_size: int, world_size: int, epoch: int
) -> None:
    fixed = {
        "training": True,
        "seed": 1,
        "epoch": epoch,
        "factors": torch.tensor(values, dtype=torch.float64),
    }
    alone = batches(len(values), batch_size, rank=0, world_size=1, **fixed)
    assert [len(batch) for batch in alone] == [batch_size] * (len(values) // batch_size)
    if batch_size >= world_size:
        ranks = [
            batches(len(values), batch_size, rank=r, world_size=world_size, **fixed)
            for r in range(world_size)
        ]
        for whole, *shares in zip(alone, *ranks, strict=True):
            assert all(share == whole[r::world_size] for r, share in enumerate(shares))


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """The last class is rare: its one image has factor sqrt(12)."""
    write(tmp_path, data([[(0, False)]] * 11 + [[(0, False), (2, False)]]))
    config = DataConfig(path=tmp_path, short_sides=(24, 32), crop=False, repeat_threshold=1)
    return open_dataset(config, "train")


def test_repeats_are_augmented_anew_and_the_first_is_as_without(dataset: CocoDataset) -> None:
    dataset.set_epoch(1)
    plain, first = dataset[11], dataset[11, 0]
    assert torch.equal(plain[0], first[0])
    assert plain[1].seed == first[1].seed
    repeats = [dataset[11, repeat] for repeat in range(4)]
    assert len({targets.seed for _, targets in repeats}) == 4
    assert len({pixels.double().sum().item() for pixels, _ in repeats}) > 1


def test_a_loader_goes_on_within_an_epoch(dataset: CocoDataset) -> None:
    def seen(**more: Any) -> list[list[tuple[int, int | None]]]:
        loader = build_loader(dataset, 3, training=True, seed=2, epoch=3, **more)
        return [[(t.image_id, t.seed) for t in targets] for _, targets in loader]

    whole = seen()
    assert [len(batch) for batch in whole] == [3] * 4
    assert seen(taken=1) == whole[1:]
    assert seen(workers=2) == whole
    assert [batch[1::2] for batch in whole] == seen(rank=1, world_size=2)
    drawn = Counter(
        t.image_id
        for epoch in range(30)
        for _, targets in build_loader(dataset, 3, training=True, seed=2, epoch=epoch)
        for t in targets
    )
    assert drawn[12] > 2 * max(count for image_id, count in drawn.items() if image_id != 12)
    evaluated = build_loader(dataset, 5, training=False)
    assert [t.image_id for _, targets in evaluated for t in targets] == list(range(1, 13))


def test_evaluation_knows_no_repeats(tmp_path: Path) -> None:
    write(tmp_path, data([[(0, False)]] * 4), split="val")
    config = DataConfig(path=tmp_path, repeat_threshold=1)
    assert open_dataset(config, "val").factors is None
    write(tmp_path, data([[(0, False)]] * 4))
    plain = open_dataset(DataConfig(path=tmp_path), "train")
    assert plain.factors is None
