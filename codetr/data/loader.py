"""Batches whose content depends on the experiment, not on how many workers share it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from codetr.config import ConfigError
from codetr.data.canvas import Canvas
from codetr.data.coco import CocoDataset, Item, stable_seed
from codetr.data.errors import DataError
from codetr.data.repeats import draw_epoch
from codetr.structures import ImageBatch, Targets

Batch = tuple[ImageBatch, list[Targets]]


def collate(samples: list[tuple[Tensor, Targets]], canvas: Canvas | None = None) -> Batch:
    """Pad images (3, h, w) on the right and at the bottom to the largest of the batch, or lay them
    on the ``canvas``. Where that is not masked, it is part of the image, and of its masks."""
    images = [image for image, _ in samples]
    targets = [targets for _, targets in samples]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    if canvas is None:
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        pixels = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(pixels, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return ImageBatch(pixels, sizes), targets
    pixels = torch.stack([canvas.hold(image) for image in images])
    if canvas.masked:
        return ImageBatch(pixels, sizes), targets
    targets = [
        t if t.masks is None else replace(t, masks=canvas.hold_masks(t.masks)) for t in targets
    ]
    return ImageBatch(pixels, [canvas.size] * len(images), contents=sizes), targets


def batches(
    count: int,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    training: bool,
    seed: int,
    epoch: int,
    factors: Tensor | None = None,
) -> list[list[Item]]:
    """Positions of the images in each batch of this rank.

    The epoch's order depends on seed and epoch; batch g of all ranks together is the same for any
    world size, and rank r takes every world_size-th image of it. In training the last incomplete
    batch is dropped; in evaluation every image occurs exactly once over all ranks. With ``factors``
    an epoch of training is :func:`draw_epoch`'s, with which of its repeats each image is.
    """
    order: list[Item] = list(range(count))
    if training:
        generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch))
        if factors is None:
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = list(draw_epoch(factors, generator))
        order = order[: count - count % batch_size]
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shares = [chunk[rank::world_size] for chunk in chunks]
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
        training: shuffled, complete batches, with the data set's repeats; otherwise in order, every
            image once.
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
        factors=dataset.factors,
    )
    return DataLoader(
        dataset,
        batch_sampler=shares[taken:],
        collate_fn=partial(collate, canvas=dataset.canvas),
        num_workers=workers,
        # Of its own: the loader would otherwise draw from the generator of the training.
        generator=torch.Generator().manual_seed(stable_seed("loader", seed, epoch)),
    )
