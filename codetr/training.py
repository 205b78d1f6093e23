"""Training of a detector: one epoch, one evaluation, and the state that they advance.

The batch size is global and every loss is normalised over all ranks, so that any number of
workers takes the same steps as one worker (see :mod:`codetr.distributed`). Nothing here knows who
starts the workers: it is enough that they share an initialised process group, or that there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, Self, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from codetr.analysis.stability import Matches, MatchRecorder
from codetr.averaging import advance_average, begin_average
from codetr.checkpoint import Checkpoint, CheckpointError, PartialEpoch, without_download
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
)
from codetr.inference import detect
from codetr.parameter_groups import parameter_groups
from codetr.progress import EpochReport, Progress, StepReport, StepValues
from codetr.queries.selection import QUERY
from codetr.randomness import (
    EPOCH,
    INITIALISATION,
    generator_states,
    restore_generators,
    seed_everything,
)
from codetr.sampling import with_seeds
from codetr.start import Start, load_start
from codetr.structures import Detections, ImageBatch, LossOutput, Targets
from codetr.weights import load_weights

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


# ----------------------------------------------------------------------------------- threads, ranks


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
    """AdamW with the reference's learning rates: see :func:`parameter_groups`."""
    return AdamW(
        parameter_groups(model, config),
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


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
        parts: in which each rank computes its share of a batch (``training.accumulate``, or more
            where fewer ranks share it).
        epoch: epochs finished.
        partial: what was done of the epoch after those.
        cost: of all of them and of their evaluations.
        metrics: of the last evaluation.
        average: of the model's weights; None without ``training.ema``.
        started: what it began with; None without ``training.start_from``.
    """

    model: CoDETR
    parallel: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    training: TrainingConfig
    data: DataConfig
    classes: Classes
    seed: int
    parts: int = 1
    epoch: int = 0
    partial: PartialEpoch | None = None
    cost: Cost = field(default_factory=Cost)
    metrics: dict[str, float] = field(default_factory=dict)
    average: AveragedModel | None = None
    started: Start | None = None

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
        class_images: Sequence[int] | None = None,
    ) -> Self:
        """An untrained detector; its weights depend on the seed alone, not on the data's order, or
        are those of ``training.start_from``.

        Args:
            class_images: how many training images have each class, for federated loss.

        Raises:
            CheckpointError: the weights to start from cannot be read, or are of another detector.
        """
        weights = load_weights(training.start_from) if training.start_from else None
        seed_everything(seed, INITIALISATION)
        model = CoDETR(without_download(detector) if weights else detector)
        started = load_start(model, weights) if weights else None
        model.to(device)
        if detector.query_loss.federated.enabled and class_images is not None:
            model.federated.learn(class_images)
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
            parts=training.accumulate,
            average=begin_average(model, training),
            started=started,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def evaluated(self) -> CoDETR:
        """What is to be evaluated and used: the average, or the model itself if there is none."""
        return self.model if self.average is None else cast(CoDETR, self.average.module)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.schedule.last_epoch

    @property
    def taken(self) -> int:
        """How many of them belong to an epoch that is not finished."""
        return len(self.partial.taken) if self.partial else 0

    def hold(self, detector: DetectorConfig, training: TrainingConfig) -> None:
        """Train with these settings from the next step on.

        The learning rate is then what it would be had training begun with them: warm-up and drops
        go on where they are. The optimiser keeps its moments.

        Args:
            detector: differs from what it was in the weights of losses at most.
            training: in learning rate, weight decay and norm of clipping.
        """
        self.model.config, self.training = detector, training
        schedule = self.schedule
        anew = parameter_groups(self.model, training)
        for group, wanted in zip(self.optimizer.param_groups, anew, strict=True):
            group["initial_lr"], group["weight_decay"] = wanted["lr"], wanted["weight_decay"]
        schedule.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        now = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        schedule._last_lr = now
        for group, rate in zip(self.optimizer.param_groups, now, strict=True):
            group["lr"] = rate

    def checkpoint(self) -> Checkpoint:
        """What a training continues from. Equal on all ranks; one of them should save it."""
        return Checkpoint(
            model=self.evaluated.state_dict(),
            trained=self.model.state_dict() if self.average is not None else None,
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
            partial=self.partial,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was written; on all ranks.

        Raises:
            CheckpointError: it belongs to another detector or seed; names what differs.
            DataError: its classes are not those of the training data.
        """
        self._require_same_training(checkpoint)
        if self.average is not None and checkpoint.trained is not None:
            self.model.load_state_dict(checkpoint.trained)
            self.average.module.load_state_dict(checkpoint.model)
            self.average.n_averaged.fill_(checkpoint.step)
        else:
            self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.schedule.load_state_dict(checkpoint.schedule)
        self.epoch, self.metrics, self.cost = checkpoint.epoch, checkpoint.metrics, checkpoint.cost
        self.partial = checkpoint.partial

    def _require_same_training(self, checkpoint: Checkpoint) -> None:
        checkpoint.classes.require_same(self.classes, checkpoint.source, "the training data")
        theirs, ours = without_download(checkpoint.detector), without_download(self.model.config)
        differing = [name for name, value in ours if value != getattr(theirs, name)]
        differing += [
            f"training.{name}"
            for name in ("ema", "ema_warmup")
            if getattr(checkpoint.training, name) != getattr(self.training, name)
        ]
        if checkpoint.seed != self.seed:
            differing.append("seed")
        if differing:
            raise CheckpointError(
                f"{checkpoint.source} is of another training, with different "
                f"{', '.join(differing)}: give this run another name to start afresh"
            )


# ------------------------------------------------------------------------------------------- epoch


def train_epoch(
    state: TrainingState,
    loader: Loader,
    on_step: Callable[[StepReport], None] | None = None,
    leave: Callable[[int], bool] | None = None,
) -> EpochReport | None:
    """Train for one epoch, or for what is left of it, and advance the state.

    Args:
        state: on every rank the same.
        loader: this rank's share of each global batch that has not been taken yet (of those after
            ``state.taken``).
        on_step: called after every step.
        leave: asked after every step but the epoch's last, which it gets counted from 1, whether to
            leave the epoch there; must answer the same on all ranks.

    Returns:
        None where the epoch was left: ``state.partial`` then holds what was done of it, and the
        next call goes on after that, to the same weights as if it had not been left.

    Raises:
        NonFiniteLoss: on all ranks alike, before the offending step changes a weight.
    """
    epoch, device, config = state.epoch + 1, state.device, state.training
    _seed_epoch(state)
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    steps = state.taken + len(loader)
    meter, progress = CostMeter(device), Progress(epoch, config.epochs, steps, state.partial)
    state.parallel.train()

    for batch, targets in _on_device(loader, device):
        state.optimizer.zero_grad()
        output = compute_gradients(state, batch, targets)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])

        # One communication beside DDP's and one copy to the host, once all work is queued.
        values = StepValues.over_ranks(output, norm, len(batch))
        if not values.finite:
            raise _not_finite(state, output, targets, epoch, progress.step + 1)
        clip_grads_with_norm_(parameters, config.clip_norm, norm)
        learning_rate = float(state.schedule.get_last_lr()[0])
        state.optimizer.step()
        state.schedule.step()
        if state.average is not None:
            advance_average(state.average, state.model, state.step, config)
        report = progress.advance(values, learning_rate)
        if on_step:
            on_step(report)
        if leave and progress.step < steps and leave(progress.step):
            generators = gather(generator_states(device))
            state.partial = progress.partial(meter.read(), generators)
            return None

    _broadcast_buffers(state.model)
    if state.average is not None:
        _broadcast_buffers(state.evaluated)
    epoch_report = progress.summary(meter.read())
    state.epoch, state.cost, state.partial = epoch, state.cost + epoch_report.cost, None
    return epoch_report


def _seed_epoch(state: TrainingState) -> None:
    """Seed the generators for an epoch, or have them go on within it."""
    stream = (EPOCH, state.epoch + 1, rank())
    if state.partial is None:
        seed_everything(state.seed, *stream)
    elif len(state.partial.generators) == world_size():
        restore_generators(state.partial.generators[rank()], state.device)
    else:  # as good as any: other ranks draw for other images
        seed_everything(state.seed, *stream, state.taken)


def compute_gradients(
    state: TrainingState, batch: ImageBatch, targets: list[Targets]
) -> LossOutput:
    """The losses of this rank's share of a batch; their gradients are added to the parameters'."""
    targets = with_seeds(targets)  # now: what is computed in parts is computed twice
    parts = _parts(batch, targets, state.parts)
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
        matches: the query of each object, if they were asked for; on rank 0.
    """

    metrics: Metrics
    detections: dict[int, Detections]
    cost: Cost
    matches: Matches = field(default_factory=dict)


def evaluate(
    model: CoDETR,
    loader: Loader,
    dataset: CocoDataset,
    engine: Engine = "hotcoco",
    *,
    branch: str = QUERY,
    record_matches: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Detect in every image of the data set, in fp32, and measure on rank 0.

    Args:
        model: the bare detector; left in evaluation mode.
        loader: this rank's share of the images; the ranks' shares may differ in length.
        dataset: what the loader reads, with its annotations.
        engine: see :func:`codetr.metrics.evaluate`.
        branch: see :meth:`CoDETR.detect`.
        record_matches: also match the objects with the queries; only of the query branch.
        on_batch: called after each batch with this rank's number of batches done and in all.
    """
    from codetr.metrics import evaluate as compute_metrics  # the engines are not needed to train

    meter = CostMeter(next(model.parameters()).device)
    own: dict[int, Detections] = {}
    recorder = MatchRecorder(model)
    model.eval()
    with recorder if record_matches else nullcontext():
        for done, (batch, targets) in enumerate(loader, start=1):
            found = detect(model, batch, [t.original_size for t in targets], branch)
            own |= {t.image_id: detections for t, detections in zip(targets, found, strict=True)}
            if record_matches:
                recorder.note(targets, batch.sizes)
            if on_batch:
                on_batch(done, len(loader))
    shares = gather_on_rank_zero((own, recorder.matches))
    detections = {image: found for share, _ in shares for image, found in share.items()}
    matches = {image: found for _, share in shares for image, found in share.items()}
    metrics = from_rank_zero(lambda: compute_metrics(dataset, detections, engine))
    return Evaluation(metrics, detections, meter.read(), matches)
