"""Official state dicts into our detectors, and back, with nothing left over.

What a state dict holds beyond the detector's parameters is dropped by the rules of ``DROPPED``
alone, and reported; every other name that is unknown, missing or of another shape is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codetr.backbones.names import COUNTERS
from codetr.checkpoint import CheckpointError, without_download
from codetr.config import DataConfig, DetectorConfig
from codetr.detector import CoDETR
from codetr.zoo.backbone_names import canvas_rotations, derived_buffers
from codetr.zoo.catalogue import Entry, entry
from codetr.zoo.measure import on_meta
from codetr.zoo.official import from_official_names, to_official_names
from codetr.zoo.recognition import Shapes, class_count, fitting, recognise

State = dict[str, Tensor]

MASKS = "mask branch; boxes are found without it"
AVERAGES = "copy kept by the averaging of weights; those in use are under their own names"
DERIVED = "follows from the configuration"
DROPPED = {
    r"(roi_head\.\d+\.)?mask_(iou_)?head\..*": MASKS,
    r"ema_.*": AVERAGES,
    r"backbone\..*\.relative_position_index": DERIVED,
    r"backbone\.(.*\.)?rope\w*\.freqs_(cos|sin)": DERIVED,
}
"""Names that have no place in our detector, and why."""

_HASH = re.compile(r"-[0-9a-f]{8}$")
"""At the end of the names that MMDetection gives to files which it hosts."""

LISTED = 20
"""Names that an error lists of each kind."""


@dataclass(frozen=True)
class Imported:
    """An official detector as ours.

    Attributes:
        config, data: of the detector, and how its images are resized.
        state: under our names; the tensors are those of the official state dict.
        dropped: official names that were left out, and why.
        names: detectors of the zoo that it can be; ``config`` and ``data`` are those of the first.
    """

    config: DetectorConfig
    data: DataConfig
    state: State
    dropped: dict[str, str]
    names: tuple[str, ...]

    def build(self) -> CoDETR:
        """The detector in evaluation mode, on the CPU."""
        model = CoDETR(without_download(self.config))
        model.load_state_dict(self.state)
        model.data = self.data
        return model.eval()


def from_official(state: Mapping[str, Tensor]) -> CoDETR:
    """The detector of an official state dict, in evaluation mode; see :func:`import_official`."""
    return import_official(state).build()


def import_official(
    state: Mapping[str, Tensor], name: str | None = None, file_name: str = ""
) -> Imported:
    """Recognise an official detector by names and shapes, and bring it under our names.

    Args:
        state: ``state_dict`` of an official checkpoint.
        name: of the zoo's detector that it is, where several have the same shapes; None: that
            whose checkpoints have this ``file_name``, or the plainest.
        file_name: of the checkpoint, without its suffix.

    Raises:
        CheckpointError: it is no official detector, not that of ``name``, or names are unknown,
            missing or of another shape; lists them.
        ConfigError: the zoo has no such name.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    dropped = {key: why for key in state if (why := _why_dropped(key)) is not None}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    config, fits = _named(name, shapes) if name is not None else _recognised(shapes, file_name)
    expected = _expected(config)
    _require_complete(state, dropped, expected)
    _require_derived(state, config)
    kept = {key: value for key, value in state.items() if key not in dropped}
    kept |= {
        key: torch.zeros((), dtype=torch.long)
        for key in expected
        if key.endswith(COUNTERS) and key not in kept
    }
    return Imported(
        config=config,
        data=fits[0].data_config if fits else DataConfig(),
        state=from_official_names(kept, config),
        dropped=dropped,
        names=tuple(fit.name for fit in fits),
    )


def export_official(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """The official state dict of one of our detectors: the inverse of :func:`import_official`, to
    the bit, but for what was dropped.

    Raises:
        CheckpointError: the original has no name for a part of this detector.
    """
    try:
        return to_official_names(state, config)
    except KeyError as error:
        raise CheckpointError(
            f"the official implementation has no such detector: {error.args[0][:300]}"
        ) from None


def _named(name: str, shapes: Shapes) -> tuple[DetectorConfig, list[Entry]]:
    """The zoo's detector of that name, with the classes of a state of these shapes; whether it is
    that is not asked."""
    try:
        count = {"num_classes": class_count(shapes)}
    except KeyError:
        count = {}  # it will be missed with all else that is missing
    return entry(name).config.model_copy(update=count), [entry(name)]


def _recognised(shapes: Shapes, file_name: str) -> tuple[DetectorConfig, list[Entry]]:
    """The detector of these shapes, and those of the zoo that have them: where there are several,
    the one whose checkpoints are named so, else those of which there are checkpoints."""
    read = recognise(shapes)
    fits = fitting(read)
    released = [fit for fit in fits if fit.official]
    named = _HASH.sub("", file_name)
    fits = [fit for fit in released if named in fit.official] or released or fits
    if not fits:
        return read, []
    return fits[0].config.model_copy(update={"num_classes": read.num_classes}), fits


def _why_dropped(name: str) -> str | None:
    return next((why for pattern, why in DROPPED.items() if re.fullmatch(pattern, name)), None)


def _expected(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of all that this detector has."""
    exported = to_official_names(on_meta(config).state_dict(), config)
    return {name: tuple(value.shape) for name, value in exported.items()}


def _require_complete(
    state: Mapping[str, Tensor],
    dropped: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [
        name
        for name in expected
        if name not in state and not name.endswith(COUNTERS) and _why_dropped(name) is None
    ]
    unknown = [name for name in state if name not in expected and name not in dropped]
    shapes = [
        f"{name} is {tuple(value.shape)} instead of {expected[name]}"
        for name, value in state.items()
        if name in expected and tuple(value.shape) != expected[name]
    ]
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:LISTED])}"
        + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
        for kind, found in (("unknown", unknown), ("missing", missing), ("of other shape", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(f"not the official detector it looks like: {'; '.join(problems)}")


def _require_derived(state: Mapping[str, Tensor], config: DetectorConfig) -> None:
    """What follows from the configuration must be in the file as it follows, to its precision."""
    for name, value in (derived_buffers(config) | canvas_rotations(state, config)).items():
        given = state.get(name)
        if given is None or given.is_meta:
            continue
        # Rotations lie in [-1, 1], where the half types keep three digits.
        precise = given.dtype not in (torch.float16, torch.bfloat16)
        atol = 1e-4 if precise else torch.finfo(given.dtype).eps
        same_shape = given.shape == value.shape
        if not same_shape or not torch.allclose(given.double(), value.double(), atol=atol, rtol=0):
            raise CheckpointError(f"{name} has other values than those that its detector implies")
