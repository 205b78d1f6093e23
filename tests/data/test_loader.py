"""Batches are the experiment's, however many workers share them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coco_files import annotation, content, image, write
from hypothesis import given, settings
from hypothesis import strategies as st

from codetr.config import ConfigError, DataConfig
from codetr.data import CocoDataset, DataError, build_loader
from codetr.data.loader import Batch, batches, collate
from codetr.data.transforms import build_transform
from codetr.structures import Targets

sharing = {
    "count": st.integers(1, 60),
    "batch_size": st.integers(1, 12),
    "world_size": st.integers(1, 5),
    "seed": st.integers(0, 5),
    "epoch": st.integers(0, 5),
}


@settings(max_examples=200, deadline=None)
@given(**sharing)
def test_every_world_size_sees_the_same_batches(
    count: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    fixed = {"training": True, "seed": seed, "epoch": epoch}
    alone = batches(count, batch_size, rank=0, world_size=1, **fixed)
    assert [len(batch) for batch in alone] == [batch_size] * (count // batch_size)
    assert len({i for batch in alone for i in batch}) == len(alone) * batch_size
    if batch_size >= world_size:
        ranks = [
            batches(count, batch_size, rank=r, world_size=world_size, **fixed)
            for r in range(world_size)
        ]
        for whole, *shares in zip(alone, *ranks, strict=True):
            assert sorted(whole) == sorted(i for share in shares for i in share)
            assert all(share == whole[r::world_size] for r, share in enumerate(shares))


@settings(max_examples=200, deadline=None)
@given(**sharing)
def test_evaluation_sees_every_image_once(
    count: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    seen = [
        i
        for rank in range(world_size)
        for batch in batches(
            count,
            batch_size,
            rank=rank,
            world_size=world_size,
            training=False,
            seed=seed,
            epoch=epoch,
        )
        for i in batch
    ]
    assert sorted(seen) == list(range(count))
    if world_size == 1:
        assert seen == list(range(count))


def test_the_order_changes_with_epoch_and_seed() -> None:
    orders = {
        tuple(batches(50, 50, rank=0, world_size=1, training=True, seed=s, epoch=e)[0])
        for s in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


def test_collate_pads_right_and_below_with_zeros() -> None:
    first, second = torch.ones(3, 4, 6), torch.full((3, 5, 2), 2.0)
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch, targets = collate([(first, none), (second, none)])
    assert batch.pixels.shape == (2, 3, 5, 6)
    assert batch.sizes == [(4, 6), (5, 2)]
    assert torch.equal(batch.pixels[0, :, :4], first)
    assert torch.equal(batch.pixels[1, :, :, :2], second)
    assert batch.pixels[batch.padding_mask()[:, None].expand(-1, 3, -1, -1)].abs().sum() == 0
    assert batch.pixels.sum() == first.sum() + second.sum()
    assert targets == [none, none]


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    ids = range(1, 12)
    data = content() | {
        "images": [image(i, 20 + i, 30) for i in ids],
        "annotations": [annotation(i, i, [1, 2, 10, 10]) for i in ids if i % 3],
    }
    write(tmp_path, data)
    return CocoDataset(
        tmp_path / "annotations/instances_train.json",
        tmp_path / "train",
        build_transform(DataConfig(short_sides=(24, 32)), training=True),
        training=True,
    )


def content_of(batch: Batch) -> list[tuple[int, list[float], int | None, float]]:
    images, targets = batch
    return [
        (t.image_id, t.boxes.flatten().tolist(), t.seed, pixels.double().sum().item())
        for t, pixels in zip(targets, images.pixels, strict=True)
    ]


def test_batches_do_not_depend_on_processes_or_ranks(dataset: CocoDataset) -> None:
    common = {"training": True, "seed": 3, "epoch": 2}
    alone = [content_of(b) for b in build_loader(dataset, 4, **common)]
    processes = [content_of(b) for b in build_loader(dataset, 4, workers=2, **common)]
    assert len(alone) == 2
    assert processes == alone
    ranks = [
        [content_of(b) for b in build_loader(dataset, 4, rank=r, world_size=2, **common)]
        for r in range(2)
    ]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert first == whole[0::2]
        assert second == whole[1::2]
    assert alone != [content_of(b) for b in build_loader(dataset, 4, **(common | {"epoch": 3}))]


def test_batches_that_were_taken_are_left_out(dataset: CocoDataset) -> None:
    common = {"training": True, "seed": 3, "epoch": 2}
    whole = [content_of(b) for b in build_loader(dataset, 4, **common)]
    assert [content_of(b) for b in build_loader(dataset, 4, taken=1, **common)] == whole[1:]
    assert len(build_loader(dataset, 4, taken=2, **common)) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_training_s_generator_alone(dataset: CocoDataset, workers: int) -> None:
    state = torch.get_rng_state()
    list(build_loader(dataset, 4, training=True, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_keeps_the_incomplete_batch(dataset: CocoDataset) -> None:
    loader = build_loader(dataset, 4, training=False)
    assert [len(batch) for batch, _ in loader] == [4, 4, 3]
    assert [t.image_id for _, targets in loader for t in targets] == list(range(1, 12))


def test_fewer_images_than_a_batch(dataset: CocoDataset) -> None:
    with pytest.raises(DataError, match="11 usable images are less than one batch of 12"):
        build_loader(dataset, 12, training=True)
    assert len(build_loader(dataset, 12, training=False)) == 1


def test_fewer_images_in_a_batch_than_workers(dataset: CocoDataset) -> None:
    with pytest.raises(ConfigError, match="batch_size=2 is less than one image for each of 3"):
        build_loader(dataset, 2, world_size=3, training=True)


def test_a_broken_file_is_named_from_a_loader_process(dataset: CocoDataset) -> None:
    path = dataset.images / "4.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"4\.png: cannot be decoded") as error:
        list(build_loader(dataset, 4, training=False, workers=1))
    assert str(error.value).startswith(str(path)), "and not with the traceback of that process"
    assert "\n" not in str(error.value)
