"""Checkpoints: one file of plain values and tensors, written whole or not at all."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from codetr.config import DataConfig, DetectorConfig, TrainingConfig, parse
from codetr.cost import Cost
from codetr.data import Classes
from codetr.detector import CoDETR

FORMAT = "codetr checkpoint 1"
FILE_NAME = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used; its text names the file and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not there, or not what was written: nobody will ever read it. One on a
    disk that does not answer, or of another version, is not damaged."""


@dataclass(frozen=True)
class PartialEpoch:
    """An epoch that was left before its end.

    Attributes:
        taken: what each of its steps so far has measured, as plain values.
        learning_rate: of the last of them.
        cost: of them.
        generators: every rank's random generators after them, for as many ranks to go on with.
    """

    taken: list[dict[str, Any]]
    learning_rate: float
    cost: Cost
    generators: list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps, with all that continues or evaluates it.

    Attributes:
        model, optimizer, schedule: state dicts; the model's are the weights to be used.
        trained: the weights that training goes on from, where those to be used are their average
            (``training.ema``).
        epoch, step: finished epochs and optimiser steps.
        seed: with the epoch all there is of randomness: every epoch seeds its own generators.
        partial: what was done of the epoch after those; None between two epochs.
        detector, training, data: the configuration.
        classes: of the data it was trained on, by class number.
        metrics: of the last evaluation, as fractions.
        cost: of all its epochs.
        source: the file it was read from, for error messages.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    epoch: int
    step: int
    seed: int
    detector: DetectorConfig
    training: TrainingConfig
    data: DataConfig
    classes: Classes
    metrics: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    partial: PartialEpoch | None = None
    trained: dict[str, Tensor] | None = None
    source: str = "this checkpoint"

    @property
    def last_begun(self) -> int:
        """The epoch whose settings it holds: the last that was begun, counted from 1."""
        return self.epoch + (self.partial is not None)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``path`` whole: whatever happens meanwhile, there is the old file or the new one.

    Raises:
        CheckpointError: the disk is full or not writable; a previous file is untouched.
    """
    content = {
        "format": FORMAT,
        "model": checkpoint.model,
        "trained": checkpoint.trained,
        "optimizer": checkpoint.optimizer,
        "schedule": checkpoint.schedule,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "seed": checkpoint.seed,
        "detector": checkpoint.detector.model_dump(mode="json"),
        "training": checkpoint.training.model_dump(mode="json"),
        "data": checkpoint.data.model_dump(mode="json"),
        "classes": asdict(checkpoint.classes),
        # numpy's numbers are refused when a checkpoint is read.
        "metrics": {name: float(value) for name, value in checkpoint.metrics.items()},
        "cost": asdict(checkpoint.cost),
        "partial": checkpoint.partial and asdict(checkpoint.partial),
    }
    with written_whole(path) as draft, draft.open("wb") as file:
        torch.save(content, file)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at ``path``: whatever happens meanwhile, the old file is
    there afterwards, or all of the new one.

    Raises:
        CheckpointError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    # torch and safetensors turn some of the file's errors into their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot write {path}: {reason}; a previous file there is untouched"
        ) from error
    finally:
        if draft.exists():
            draft.unlink()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in a folder, to the CPU; never runs code that it holds.

    Raises:
        DamagedCheckpointError: there is none, or it is truncated or changed.
        CheckpointError: it cannot be reached, or is not CoDETR's.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
            intact = archive.testzip() is None
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch looks for the end of an archive before a short file
            raise DamagedCheckpointError(_why_unreadable(path)) from error
        kind = DamagedCheckpointError if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # pickle, zip and torch each raise their own
        raise DamagedCheckpointError(_why_unreadable(path)) from error
    if not intact:
        raise DamagedCheckpointError(
            f"{path} is damaged: checksums differ; use an earlier checkpoint"
        )
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        official = isinstance(content, dict) and "state_dict" in content
        raise CheckpointError(
            f"{path} is not a checkpoint that this version of codetr wrote"
            + ("; 'codetr convert' reads the original implementation's" if official else "")
        )
    for key, config in (
        ("detector", DetectorConfig),
        ("training", TrainingConfig),
        ("data", DataConfig),
    ):
        content[key] = parse(config, content[key], f"{path}: {key}")
    content["classes"] = Classes(**content["classes"])
    content["cost"] = Cost(**content["cost"])
    if (partial := content.get("partial")) is not None:
        content["partial"] = PartialEpoch(**{**partial, "cost": Cost(**partial["cost"])})
    return Checkpoint(**content, source=str(path))


class Trained(Protocol):
    """What a detector is built from: a checkpoint, or weights without a training."""

    @property
    def model(self) -> dict[str, Tensor]: ...
    @property
    def detector(self) -> DetectorConfig: ...
    @property
    def source(self) -> str: ...


def build_model(checkpoint: Trained) -> CoDETR:
    """The trained detector in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the weights do not fit the configuration beside them.
    """
    model = CoDETR(without_download(checkpoint.detector))
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.source}: {reason[:300]}") from error
    return model.eval()


def without_download(detector: DetectorConfig) -> DetectorConfig:
    """The same detector with a backbone that starts from nothing: all its weights are at hand."""
    backbone = detector.backbone.model_copy(update={"pretrained": False})
    return detector.model_copy(update={"backbone": backbone})


def _why_unreadable(path: Path) -> str:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and not zipfile.is_zipfile(path):
        return f"{path} is truncated: its end is missing; use an earlier checkpoint"
    return f"{path} is damaged, or not a checkpoint of codetr"
