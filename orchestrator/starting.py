"""What a plan must know of the weights that a training starts from (``training.start_from``)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from codetr.config import ConfigError, DetectorConfig, TrainingConfig

if TYPE_CHECKING:
    from codetr.weights import Weights


def with_start(
    detector: DetectorConfig, training: TrainingConfig
) -> tuple[TrainingConfig, str | None]:
    """The training with an absolute path to its weights, and what identifies their content: the
    same weights elsewhere are the same start, others in their place are another one.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it holds no weights, or those of another detector.
    """
    if training.start_from is None:
        return training, None
    from codetr.start import new_tensors

    path = training.start_from.expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"training.start_from: {path}: no such file or folder")
    weights = _shapes_of(path)
    new_tensors(detector, weights)
    file = Path(weights.source)
    stat = file.stat()
    fingerprint = _digest(file, stat.st_size, stat.st_mtime_ns)
    return training.model_copy(update={"start_from": path}), fingerprint


@cache
def _shapes_of(path: Path) -> Weights:
    """The weights, each tensor without its content."""
    from codetr.weights import load_weights

    weights = load_weights(path)
    return replace(weights, model={n: tensor.to("meta") for n, tensor in weights.model.items()})


@cache
def _digest(file: Path, _size: int, _changed: int) -> str:
    """Of the content, as long as size and time of change are these."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
