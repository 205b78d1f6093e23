"""A detector to use: weights, configuration and class names, of a training or of a weights file.

A weights file is one of safetensors, which can hold no code; the configuration stands in its
metadata. A checkpoint of a training has all that and more, and serves as well.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codetr.checkpoint import (
    FILE_NAME,
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    written_whole,
)
from codetr.config import DataConfig, DetectorConfig, parse
from codetr.data import Classes
from codetr.detector import CoDETR

FORMAT = "codetr weights 1"
WEIGHTS_NAME = "model.safetensors"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Weights:
    """A detector as it can be used.

    Attributes:
        model: state dict.
        detector, data: configuration, and how images are resized and normalised.
        classes: by class number.
        source: the file it was read from, for error messages.
    """

    model: dict[str, Tensor]
    detector: DetectorConfig
    data: DataConfig
    classes: Classes
    source: str = "these weights"

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Weights:
        """Those of a training."""
        return cls(
            dict(checkpoint.model),
            checkpoint.detector,
            checkpoint.data,
            checkpoint.classes,
            checkpoint.source,
        )

    def require_classes(self) -> None:
        """Do nothing if there is a name for each of the detector's classes.

        Raises:
            CheckpointError: says both numbers.
        """
        count, named = self.detector.num_classes, len(self.classes)
        if named != count:
            raise CheckpointError(
                f"{self.source}: the detector has {count} classes, but {named} are named"
            )

    def build(self) -> CoDETR:
        """The detector in evaluation mode, on the CPU.

        Raises:
            CheckpointError: the weights or the classes do not fit the configuration.
        """
        self.require_classes()
        model = build_model(self)
        model.data, model.classes = self.data, self.classes
        return model


def save_weights(weights: Weights, path: Path) -> None:
    """Write ``path`` whole: whatever happens meanwhile, there is the old file or the new one.

    Raises:
        CheckpointError: the classes do not fit, or the file cannot be written; a previous one is
            untouched.
    """
    weights.require_classes()
    metadata = {
        "format": FORMAT,
        "detector": weights.detector.model_dump_json(),
        # Where the training data lay says nothing to anybody else.
        "data": weights.data.model_copy(update={"path": None}).model_dump_json(),
        "classes": json.dumps(asdict(weights.classes)),
    }
    with written_whole(path) as draft:
        save_file(_apart(weights.model), draft, metadata)


def load_weights(path: Path) -> Weights:
    """Read weights, or those of a training's checkpoint, or what a folder holds of the two.

    Raises:
        CheckpointError: there are none, or the file is damaged or not codetr's.
    """
    found = load_trained(path)
    return found if isinstance(found, Weights) else Weights.of(found)


def load_trained(path: Path) -> Checkpoint | Weights:
    """The same, with the training where there is one.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    if path.is_dir():
        inside = path / WEIGHTS_NAME
        path = inside if inside.exists() and not (path / FILE_NAME).exists() else path
    if path.suffix != SUFFIX:
        return load_checkpoint(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds weights without a detector: it is not of codetr. An official Co-DETR "
            "checkpoint becomes one with 'codetr convert'"
        )
    return Weights(
        model,
        parse(DetectorConfig, json.loads(metadata["detector"]), f"{path}: detector"),
        parse(DataConfig, json.loads(metadata["data"]), f"{path}: data"),
        _classes(json.loads(metadata["classes"])),
        str(path),
    )


def _classes(content: dict[str, Any]) -> Classes:
    tuples = {name: value and tuple(value) for name, value in content.items()}
    return Classes(**tuples)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        own = tensor.contiguous()
        apart[name] = own.clone() if pointer in seen and own is tensor else own
        seen.add(pointer)
    return apart
