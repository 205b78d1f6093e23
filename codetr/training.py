"""Training of a detector: one epoch, one evaluation, and the state that they advance.

The batch size is global and every loss is normalised over all ranks, so that any number of
workers takes the same steps as one worker (see :mod:`codetr.distributed`). Nothing here knows who
starts the workers: it is enough that they share an initialised process group, or that there is one.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from codetr.checkpoint import Checkpoint, CheckpointError, without_download
from codetr.config import DataConfig, DetectorConfig, TrainingConfig
from codetr.cost import Cost, CostMeter
from codetr.data import Classes, CocoDataset
from codetr.data.loader import Batch
from codetr.detector import CoDETR
from codetr.distributed import (
    PartCounts,
    from_rank_zero,
    gather,
    gather_on_rank_zero,
    rank,
    world_size,
    world_sum,
)
from codetr.inference import detect
from codetr.queries.selection import QUERY
from codetr.structures import Detections, ImageBatch, LossOutput, Targets

if TYPE_CHECKING:
    from codetr.metrics import Metrics
    from codetr.metrics.evaluation import Engine


class Loader(Protocol):
    """What is needed of a ``DataLoader``: how many batches there are, and the batches."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


class NonFiniteLoss(RuntimeError):  # noqa: N818 - says what happened, as StopIteration does
    """A loss or a gradient is NaN or infinite; the step was not taken.

    Attributes:
        epoch, step: when, counted from 1.
        terms: the loss terms, or, where all losses are finite, parameters by their gradients.
        image_ids: what the ranks with such terms were given in that step.
    """

    def __init__(self, epoch: int, step: int, terms: list[str], image_ids: list[int]) -> None:
        super().__init__(epoch, step, terms, image_ids)  # what pickle hands to a copy
        self.epoch, self.step, self.terms, self.image_ids = epoch, step, terms, image_ids

    def __str__(self) -> str:
        terms = ", ".join(self.terms[:6]) + (", …" if len(self.terms) > 6 else "")
        images = ", ".join(str(image_id) for image_id in self.image_ids)
        return (
            f"epoch {self.epoch}, step {self.step}: {terms} not finite; images {images}. The last "
            "checkpoint stands. Try a lower learning_rate or precision=fp32, and look at the images"
        )


# ---------------------------------------------------------------------- randomness, threads, ranks

INITIALISATION, EPOCH = 0, 1
"""Streams of randomness: the initial weights; what an epoch draws, by epoch and rank."""


def seed_everything(seed: int, *stream: int) -> None:
    """Seed Python's, numpy's and torch's global generators; streams are independent."""
    words = np.random.SeedSequence((seed, *stream)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def limit_threads(processes: int = 1, cores: int | None = None) -> int:
    """Compute on this process' share of the machine; returns the number of threads.

    More threads than free cores slow a small model down by up to ten times, because each of its
    many short operations waits for the slowest thread.

    Args:
        processes: how many compute at the same time on this machine.
        cores: what they share; default: all that the operating system grants this process.
    """
    if cores is None:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux alone knows
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    return threads


def parallelise(model: nn.Module) -> nn.Module:
    """The model itself, or, where there are several ranks, wrapped so that gradients are averaged.

    Every parameter gets a gradient on every step, so DDP need not search for unused ones. A batch
    norm that is trained uses the statistics of each rank's own images; rank 0's are kept.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


# ----------------------------------------------------------------- optimiser, schedule, precision


WARMUP_START = 1e-3
"""Share of the learning rate at which the warm-up begins."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW with the reference's learning rates: the backbone's, and those of sampling offsets and
    reference points, are multiples of the rest's (method.md 63). All decay alike."""
    groups: dict[str, list[nn.Parameter]] = {"detector": [], "backbone": [], "offsets": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name)].append(parameter)
    multipliers = {
        "detector": 1.0,
        "backbone": config.backbone_multiplier,
        "offsets": config.offsets_multiplier,
    }
    return AdamW(
        [
            {"name": name, "params": groups[name], "lr": config.learning_rate * multiplier}
            for name, multiplier in multipliers.items()
            if groups[name]
        ],
        weight_decay=config.weight_decay,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def _group_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    if "sampling_offsets" in name or "reference_points" in name:
        return "offsets"
    return "detector"


def build_schedule(optimizer: Optimizer, config: TrainingConfig, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up, then a drop after each of ``drop_epochs``; to be stepped after every step."""

    def factor(step: int) -> float:
        warm = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        drops = sum(step >= epoch * steps_per_epoch for epoch in config.drop_epochs)
        return (WARMUP_START + (1 - WARMUP_START) * warm) * config.drop_factor**drops

    return LambdaLR(optimizer, factor)


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context of a forward pass in the configured precision; needs no gradient scaling."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = config.precision == "bf16" or (config.precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ------------------------------------------------------------------------------------------- state


@dataclass
class TrainingState:
    """All that training changes, and what it was made from.

    Attributes:
        model: the bare detector.
        parallel: what to call in training: the model, or DDP around it.
        seed: the generators are seeded anew for each (seed, epoch, rank), so seed and epoch are
            the whole state of randomness between epochs, for any number of workers.
        epoch: epochs finished.
        cost: of all of them and of their evaluations.
        metrics: of the last evaluation.
    """

    model: CoDETR
    parallel: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    training: TrainingConfig
    data: DataConfig
    classes: Classes
    seed: int
    epoch: int = 0
    cost: Cost = field(default_factory=Cost)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        detector: DetectorConfig,
        training: TrainingConfig,
        data: DataConfig,
        classes: Classes,
        *,
        seed: int,
        steps_per_epoch: int,
        device: torch.device,
    ) -> Self:
        """An untrained detector; its weights depend on the seed alone, not on the data's order."""
        seed_everything(seed, INITIALISATION)
        model = CoDETR(detector).to(device)
        optimizer = build_optimizer(model, training)
        return cls(
            model=model,
            parallel=parallelise(model),
            optimizer=optimizer,
            schedule=build_schedule(optimizer, training, steps_per_epoch),
            training=training,
            data=data,
            classes=classes,
            seed=seed,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.schedule.last_epoch

    def checkpoint(self) -> Checkpoint:
        """What a training continues from. Equal on all ranks; one of them should save it."""
        return Checkpoint(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            epoch=self.epoch,
            step=self.step,
            seed=self.seed,
            detector=self.model.config,
            training=self.training,
            data=self.data,
            classes=self.classes,
            metrics=self.metrics,
            cost=self.cost,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was written; on all ranks.

        Raises:
            CheckpointError: it belongs to another detector or seed; names what differs.
            DataError: its classes are not those of the training data.
        """
        self._require_same_training(checkpoint)
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.schedule.load_state_dict(checkpoint.schedule)
        self.epoch, self.metrics, self.cost = checkpoint.epoch, checkpoint.metrics, checkpoint.cost

    def _require_same_training(self, checkpoint: Checkpoint) -> None:
        checkpoint.classes.require_same(self.classes, checkpoint.source, "the training data")
        theirs, ours = without_download(checkpoint.detector), without_download(self.model.config)
        differing = [name for name, value in ours if value != getattr(theirs, name)]
        if checkpoint.seed != self.seed:
            differing.append("seed")
        if differing:
            raise CheckpointError(
                f"{checkpoint.source} is of another training, with different "
                f"{', '.join(differing)}: give this run another name to start afresh"
            )


# ------------------------------------------------------------------------------------------- epoch


@dataclass(frozen=True)
class StepReport:
    """A step just taken; epochs and steps count from 1.

    Attributes:
        loss: the total of equation 6, mean over the ranks.
        images_per_second: of all ranks, smoothed over the last steps.
        seconds_left: of the training, without its evaluations.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochReport:
    """An epoch of training; means are over its steps and all ranks.

    Attributes:
        losses: mean of each unweighted loss term.
        statistics: mean of each of the detector's statistics.
        total: mean of equation 6.
        gradient_norm: mean before clipping.
        learning_rate: of the last step, without multiplier.
    """

    epoch: int
    steps: int
    images: int
    losses: dict[str, float]
    statistics: dict[str, float]
    total: float
    gradient_norm: float
    learning_rate: float
    cost: Cost

    @property
    def seconds_per_step(self) -> float:
        return self.cost.seconds / self.steps

    @property
    def images_per_second(self) -> float:
        return self.images / self.cost.seconds


def train_epoch(
    state: TrainingState, loader: Loader, on_step: Callable[[StepReport], None] | None = None
) -> EpochReport:
    """Train for one epoch and advance the state.

    Args:
        state: on every rank the same.
        loader: this rank's share of each global batch.
        on_step: called after every step.

    Raises:
        NonFiniteLoss: on all ranks alike, before the offending step changes a weight.
    """
    epoch, device, config = state.epoch + 1, state.device, state.training
    seed_everything(state.seed, EPOCH, epoch, rank())
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    meter, progress = CostMeter(device), _Progress(epoch, config.epochs, len(loader))
    state.parallel.train()

    for batch, targets in _on_device(loader, device):
        state.optimizer.zero_grad()
        output = compute_gradients(state, batch, targets)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])

        # One communication beside DDP's and one copy to the host, once all work is queued.
        values = _StepValues.over_ranks(output, norm, len(batch))
        if not values.finite:
            raise _not_finite(state, output, targets, epoch, progress.step + 1)
        clip_grads_with_norm_(parameters, config.clip_norm, norm)
        learning_rate = float(state.schedule.get_last_lr()[0])
        state.optimizer.step()
        state.schedule.step()
        report = progress.advance(values, learning_rate)
        if on_step:
            on_step(report)

    _broadcast_buffers(state.model)
    epoch_report = progress.summary(meter.read())
    state.epoch, state.cost = epoch, state.cost + epoch_report.cost
    return epoch_report


def compute_gradients(
    state: TrainingState, batch: ImageBatch, targets: list[Targets]
) -> LossOutput:
    """The losses of this rank's share of a batch; their gradients are added to the parameters'."""
    parts = _parts(batch, targets, state.training.accumulate)
    if len(parts) == 1:
        return _backward(state, parts[0])
    counts = PartCounts()
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    with torch.no_grad():
        for part in parts:
            with counts.measure(), autocast(state.training, state.device):
                state.model(*part)
        # A batch norm that is trained has seen the images once too often.
        for buffer, value in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    outputs = []
    for part in parts:
        with counts.use(), _unshared(state.parallel) if part is not parts[-1] else nullcontext():
            outputs.append(_backward(state, part))
    return LossOutput(
        total=torch.stack([output.total for output in outputs]).sum(),
        losses=_combined([output.losses for output in outputs], torch.sum),
        statistics=_combined([output.statistics for output in outputs], torch.mean),
    )


def _unshared(model: nn.Module) -> AbstractContextManager[None]:
    """Ranks share their gradients once for each batch: not within this context."""
    if isinstance(model, DistributedDataParallel):
        return cast("AbstractContextManager[None]", model.no_sync())
    return nullcontext()


Part = tuple[ImageBatch, list[Targets]]


def _parts(batch: ImageBatch, targets: list[Targets], count: int) -> list[Part]:
    """Nearly equal parts of a batch, as many on every rank; padded as the whole."""
    count = min(count, len(batch))
    bounds = [len(batch) * number // count for number in range(count + 1)]
    return [
        (ImageBatch(batch.pixels[a:b], batch.sizes[a:b]), targets[a:b]) for a, b in pairwise(bounds)
    ]


def _backward(state: TrainingState, part: Part) -> LossOutput:
    with autocast(state.training, state.device):
        output: LossOutput = state.parallel(*part)
    output.total.backward()
    # Without the graph, whose memory the next part needs.
    return LossOutput(
        output.total.detach(),
        {name: loss.detach() for name, loss in output.losses.items()},
        output.statistics,
    )


def _combined(
    rows: Sequence[dict[str, Tensor]], combine: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {name: combine(torch.stack([row[name] for row in rows])) for name in rows[0]}


def _on_device(loader: Loader, device: torch.device) -> Iterator[Batch]:
    for batch, targets in loader:
        moved = [image_targets.to(device, non_blocking=True) for image_targets in targets]
        yield batch.to(device, non_blocking=True), moved


@dataclass(frozen=True)
class _StepValues:
    """A step's numbers, means over the ranks; ``images`` is their sum."""

    total: float
    gradient_norm: float
    images: int
    losses: dict[str, float]
    statistics: dict[str, float]

    @classmethod
    def over_ranks(cls, output: LossOutput, norm: Tensor, images: int) -> Self:
        named = output.losses | output.statistics
        scalars = [output.total, norm, norm.new_full((), images), *named.values()]
        stacked = torch.stack([scalar.detach().float() for scalar in scalars])
        total, norm_, images_, *rest = (world_sum(stacked) / world_size()).tolist()
        values = dict(zip(named, rest, strict=True))
        return cls(
            total=total,
            gradient_norm=norm_,
            images=round(images_ * world_size()),
            losses={name: values[name] for name in output.losses},
            statistics={name: values[name] for name in output.statistics},
        )

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.total, self.gradient_norm, *self.losses.values())))


class _Progress:
    """Keeps an epoch's numbers and makes its reports."""

    def __init__(self, epoch: int, epochs: int, steps: int) -> None:
        self.epoch, self.epochs, self.steps = epoch, epochs, steps
        self.taken: list[_StepValues] = []
        self.learning_rate = 0.0
        self._last, self._pace = time.perf_counter(), 0.0

    @property
    def step(self) -> int:
        return len(self.taken)

    def advance(self, values: _StepValues, learning_rate: float) -> StepReport:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        # Smoothed over about ten steps.
        self._pace = 0.9 * self._pace + 0.1 * seconds if self.taken else seconds
        self.taken.append(values)
        self.learning_rate = learning_rate
        steps_left = (self.epochs - self.epoch + 1) * self.steps - self.step
        return StepReport(
            epoch=self.epoch,
            epochs=self.epochs,
            step=self.step,
            steps=self.steps,
            loss=values.total,
            learning_rate=learning_rate,
            images_per_second=values.images / self._pace,
            seconds_left=steps_left * self._pace,
        )

    def summary(self, cost: Cost) -> EpochReport:
        return EpochReport(
            epoch=self.epoch,
            steps=self.step,
            images=sum(values.images for values in self.taken),
            losses=_means([values.losses for values in self.taken]),
            statistics=_means([values.statistics for values in self.taken]),
            total=fmean(values.total for values in self.taken),
            gradient_norm=fmean(values.gradient_norm for values in self.taken),
            learning_rate=self.learning_rate,
            cost=cost,
        )


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def _not_finite(
    state: TrainingState, output: LossOutput, targets: list[Targets], epoch: int, step: int
) -> NonFiniteLoss:
    """The error that names what this step's ranks found; all ranks must come here."""
    terms = [name for name, loss in output.losses.items() if not loss.isfinite()]
    if not terms and not output.total.isfinite():
        terms = ["total"]
    found = gather((terms, [t.image_id for t in targets]))
    if any(terms for terms, _ in found):
        found = [(terms, images) for terms, images in found if terms]
    else:  # finite losses; DDP has averaged the gradients, so any image may be the cause
        gradients = [
            f"gradient of {name}"
            for name, p in state.model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        found = [(gradients or ["gradient norm"], images) for _, images in found]
    names = dict.fromkeys(name for terms, _ in found for name in terms)
    return NonFiniteLoss(epoch, step, [*names], [i for _, images in found for i in images])


def _broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the batch norm statistics of rank 0: those evaluated are those saved."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


# -------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """An evaluated data set.

    Attributes:
        metrics: equal on all ranks.
        detections: by image id, in pixels of the image files; empty on other ranks than 0.
        cost: of detecting and measuring.
    """

    metrics: Metrics
    detections: dict[int, Detections]
    cost: Cost


def evaluate(
    model: CoDETR,
    loader: Loader,
    dataset: CocoDataset,
    engine: Engine = "hotcoco",
    *,
    branch: str = QUERY,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Detect in every image of the data set, in fp32, and measure on rank 0.

    Args:
        model: the bare detector; left in evaluation mode.
        loader: this rank's share of the images; the ranks' shares may differ in length.
        dataset: what the loader reads, with its annotations.
        engine: see :func:`codetr.metrics.evaluate`.
        branch: see :meth:`CoDETR.detect`.
        on_batch: called after each batch with this rank's number of batches done and in all.
    """
    from codetr.metrics import evaluate as compute_metrics  # the engines are not needed to train

    meter = CostMeter(next(model.parameters()).device)
    own: dict[int, Detections] = {}
    model.eval()
    for done, (batch, targets) in enumerate(loader, start=1):
        found = detect(model, batch, [t.original_size for t in targets], branch)
        own |= {t.image_id: detections for t, detections in zip(targets, found, strict=True)}
        if on_batch:
            on_batch(done, len(loader))
    shares = gather_on_rank_zero(own)
    detections = {image: found for share in shares for image, found in share.items()}
    metrics = from_rank_zero(lambda: compute_metrics(dataset, detections, engine))
    return Evaluation(metrics, detections, meter.read())
