"""Checkpoint files of the original implementation, read without running what they hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codetr.checkpoint import FORMAT, CheckpointError, load_checkpoint, written_whole
from codetr.config import ConfigError
from codetr.data import Classes
from codetr.data.annotations import read_annotations, same_name
from codetr.weights import SUFFIX, Weights, load_weights, save_weights
from codetr.zoo.conversion import export_official, import_official

TRAINING = "state of a training"
_BESIDE = {"optimizer", "optimizers", "lr_scheduler", "param_schedulers", "message_hub", "amp"}


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        weights: what was read, as ours.
        tensors: how many tensors the file had.
        dropped: names that were left out, and why.
        names: detectors of the zoo that it can be; the settings are those of the first. None: it
            is of a training of ours, which says itself what it is.
    """

    weights: Weights
    tensors: int
    dropped: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] | None = None


def convert(
    file: Path, out: Path, *, name: str | None = None, annotations: Path | None = None
) -> Report:
    """Write an official checkpoint, or one of a training of ours, as a weights file.

    Args:
        file: the checkpoint, or the folder of one of ours.
        out: a ``.safetensors`` file; written whole or not at all.
        name: of the zoo's detector, where several have the same shapes; None: the file's name
            may tell, see :func:`import_official`.
        annotations: a COCO or LVIS annotation file with the classes, where ``file`` does not name
            them and they are not COCO's.

    Raises:
        CheckpointError, ConfigError, DataError: something does not fit; nothing is written.
    """
    if out.suffix != SUFFIX:
        raise ConfigError(
            f"--out {out}: weights are written as {SUFFIX}, name it {out.stem}{SUFFIX}"
        )
    if not file.is_dir() and out.exists() and out.samefile(file):
        raise ConfigError(f"--out {out}: that is the file to convert")
    report = read(file, name=name, annotations=annotations)
    save_weights(report.weights, out)
    return report


def read(file: Path, *, name: str | None = None, annotations: Path | None = None) -> Report:
    """What :func:`convert` writes."""
    given = read_annotations(annotations).classes if annotations is not None else None
    content = None if file.is_dir() or file.suffix == SUFFIX else _plain(file)
    if content is None or content.get("format") == FORMAT:
        weights = load_weights(file) if content is None else Weights.of(load_checkpoint(file))
        if name is not None:
            raise ConfigError(f"--name {name}: {file} says itself which detector it is")
        if given is not None:
            weights.classes.require_same(given, str(file), str(annotations))
        return Report(weights, len(weights.model))
    state, beside = _state_dict(content, file)
    try:
        imported = import_official(state, name, file.stem)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    count = imported.config.num_classes
    named = _named(content.get("meta"))
    for names, origin in ((named, "its own list"), (given and given.names, annotations)):
        if names is not None and len(names) != count:
            raise CheckpointError(f"{file} has {count} classes, but {origin} has {len(names)}")
    if given is not None and named is not None:
        _require_same_names(named, given, str(file), str(annotations))
    classes = given or _classes(named, count, file)
    weights = Weights(imported.state, imported.config, imported.data, classes, str(file))
    return Report(weights, len(state), {**imported.dropped, **beside}, imported.names)


def export(place: Path, out: Path) -> Weights:
    """Write one of our detectors as the original implementation's checkpoint.

    Args:
        place: weights, or the checkpoint of a training.
        out: a ``.pth`` file; written whole or not at all.

    Raises:
        CheckpointError: it cannot be read or written, or the original has no such detector.
        ConfigError: ``out`` is no ``.pth`` file.
    """
    if out.suffix != ".pth":
        raise ConfigError(
            f"--out {out}: official checkpoints are .pth files, name it {out.stem}.pth"
        )
    weights = load_weights(place)
    state = export_official(weights.model, weights.detector)
    content = {"meta": {"CLASSES": tuple(weights.classes.names)}, "state_dict": state}
    with written_whole(out) as draft, draft.open("wb") as file:
        torch.save(content, file)
    return weights


# ------------------------------------------------------------------------------------------ reading


def _plain(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, if it is of plain values, tensors and numbers alone."""
    try:
        with torch.serialization.safe_globals(_numbers()):
            content = torch.load(file, map_location="cpu", weights_only=True)
        damaged = False
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch itself compares no checksums
                damaged = archive.testzip() is not None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(file, str(error))) from None
    except Exception as error:  # zip and torch each raise their own
        raise CheckpointError(f"{file} is damaged, or no checkpoint of PyTorch") from error
    if damaged:
        raise CheckpointError(f"{file} is damaged: checksums differ; get it anew")
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict")
    return content


def _numbers() -> list[Any]:
    """What may be in a file beside torch's own: numbers of numpy, as logs and schedules have."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def _refusal(file: Path, text: str) -> str:
    found = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", text)
    if found is None:
        return f"{file} is damaged, or no checkpoint of PyTorch"
    return (
        f"{file} holds '{found[1]}' beside its tensors: to read it would be to run code that it "
        "names, so nothing of it was read. Where you trust it, save its 'state_dict' alone with "
        "torch.save, and convert that file"
    )


def _state_dict(content: Mapping[str, Any], file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and what stood beside them with the reason why it is left out."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{file} holds no state dict")
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{file}: '{strange[0]}' of its state dict is no tensor")
    beside = {} if state is content else {key: TRAINING for key in content if key in _BESIDE}
    return dict(state), beside


# ------------------------------------------------------------------------------------------ classes


def _named(meta: Any) -> tuple[str, ...] | None:
    """The classes that a checkpoint names; None if it names none."""
    meta = meta if isinstance(meta, Mapping) else {}
    newer = meta.get("dataset_meta")  # where MMDetection 3 has them
    named = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, Mapping) else None)
    if named is None:
        return None
    return (named,) if isinstance(named, str) else tuple(str(name) for name in named)


def _require_same_names(named: Sequence[str], given: Classes, file: str, annotations: str) -> None:
    """An annotation file gives ids to the classes that a checkpoint names, not other classes."""
    both = zip(given.category_ids, named, given.names, strict=True)
    other = [(i, own, name) for i, own, name in both if not same_name(own, name)]
    if other:
        identity, own, name = other[0]
        raise CheckpointError(
            f"{file} names {len(other)} of its classes otherwise than {annotations}, the first "
            f"{own!r}, which is {identity} {name!r} there: give the annotation file that it was "
            "trained with, or leave --classes out"
        )


def _classes(named: tuple[str, ...] | None, count: int, file: Path) -> Classes:
    """The classes that a checkpoint names, or COCO's, if it has as many.

    Those of COCO have COCO's ids; all others are numbered from 1, as in LVIS and Objects365.
    """
    coco = coco_classes()
    if named is None and count == len(coco):
        return coco
    if named is None:
        raise ConfigError(
            f"{file} has {count} classes and does not name them: give an annotation file that "
            "does with --classes, as lvis_v1_val.json"
        )
    return coco if named == coco.names else Classes(named, tuple(range(1, len(named) + 1)))


def coco_classes() -> Classes:
    """COCO's 80 classes with their ids, which have gaps; torchvision knows them."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    real = {number: name for number, name in enumerate(names) if name not in ("N/A", names[0])}
    return Classes(tuple(real.values()), tuple(real))
