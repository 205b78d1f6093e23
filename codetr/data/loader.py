"""Batches whose content depends on the experiment, not on how many workers share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from codetr.config import ConfigError
from codetr.data.coco import CocoDataset, stable_seed
from codetr.data.errors import DataError
from codetr.structures import ImageBatch, Targets

Batch = tuple[ImageBatch, list[Targets]]


def collate(samples: list[tuple[Tensor, Targets]]) -> Batch:
    """Pad images (3, h, w) on the right and at the bottom to the largest of the batch."""
    images = [image for image, _ in samples]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    pixels = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(pixels, sizes), [targets for _, targets in samples]


def batches(
    count: int,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    training: bool,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Positions of the images in each batch of this rank.

    The epoch's order depends on seed and epoch; batch g of all ranks together is the same for any
    world size, and rank r takes every world_size-th image of it. In training the last incomplete
    batch is dropped; in evaluation every image occurs exactly once over all ranks.
    """
    order = torch.arange(count)
    if training:
        generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch))
        order = torch.randperm(count, generator=generator)
        order = order[: count - count % batch_size]
    shares = [chunk[rank::world_size].tolist() for chunk in order.split(batch_size)]
    return [share for share in shares if share]


def build_loader(
    dataset: CocoDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
    taken: int = 0,
    workers: int = 0,
) -> DataLoader[Any]:
    """Batches ``(ImageBatch, list[Targets])`` of one epoch for one of ``world_size`` workers.

    Args:
        dataset: its epoch and seed are set to these.
        batch_size: of all ranks together.
        rank: this worker.
        world_size: how many workers share each batch.
        training: shuffled, complete batches; otherwise in order, every image once.
        seed: of order, transforms and draws.
        epoch: another order, other transforms and draws.
        taken: so many of the epoch's first batches are left out.
        workers: processes that load images; 0 loads in this one.

    Raises:
        ConfigError: the batch is smaller than the number of workers.
        DataError: there are fewer images than one batch needs.
    """
    if batch_size < world_size:
        raise ConfigError(
            f"batch_size={batch_size} is less than one image for each of {world_size} workers"
        )
    if training and len(dataset) < batch_size:
        raise DataError(
            f"{dataset.annotations}: {len(dataset)} usable images are less than one batch of "
            f"{batch_size}; lower training.batch_size"
        )
    dataset.seed = seed
    dataset.set_epoch(epoch)
    shares = batches(
        len(dataset),
        batch_size,
        rank=rank,
        world_size=world_size,
        training=training,
        seed=seed,
        epoch=epoch,
    )
    return DataLoader(
        dataset,
        batch_sampler=shares[taken:],
        collate_fn=collate,
        num_workers=workers,
        # Of its own: the loader would otherwise draw from the generator of the training.
        generator=torch.Generator().manual_seed(stable_seed("loader", seed, epoch)),
    )
