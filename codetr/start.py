"""Starting a training from the weights of a whole detector, as fine-tuning does.

Every tensor is taken over. Only those whose shape depends on the number of classes keep their first
values where the data has another number of classes; anything else that does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from codetr.checkpoint import CheckpointError, without_download
from codetr.config import DetectorConfig
from codetr.detector import CoDETR
from codetr.weights import Weights

SHOWN = 4
"""So many names are written out in a message."""


@dataclass(frozen=True)
class Start:
    """What a training has begun with.

    Attributes:
        source: the file of the weights.
        taken: how many tensors are its.
        new: names of those that are not, because they depend on the number of classes.
        classes: how many the weights have, and how many the detector.
    """

    source: str
    taken: int
    new: tuple[str, ...]
    classes: tuple[int, int]

    def __str__(self) -> str:
        text = f"started from {self.source}: {self.taken} tensors of it"
        if not self.new:
            return f"{text}, none is new"
        return (
            f"{text}; {len(self.new)} are new, for they depend on the number of classes "
            f"({self.classes[0]} there, {self.classes[1]} here): {_named(self.new)}"
        )


def load_start(model: CoDETR, weights: Weights) -> Start:
    """Give the detector the weights.

    Raises:
        CheckpointError: they do not fit, see :func:`new_tensors`; the detector is as it was.
    """
    new = new_tensors(model.config, weights)
    own = model.state_dict()
    model.load_state_dict({**weights.model, **{name: own[name] for name in new}})
    counts = (weights.detector.num_classes, model.config.num_classes)
    return Start(weights.source, len(own) - len(new), tuple(new), counts)


def new_tensors(detector: DetectorConfig, weights: Weights) -> list[str]:
    """The detector's tensors that the weights have for another number of classes.

    Args:
        detector: is not built, except without memory.
        weights: of which shapes alone matter: tensors may be on the device "meta".

    Raises:
        CheckpointError: there are weights for fewer or more auxiliary heads; or a tensor is missing
            or unknown, or of another shape for another reason.
    """
    _require_heads(detector, weights)
    own, given = shapes(detector), {name: value.shape for name, value in weights.model.items()}
    more = shapes(detector.model_copy(update={"num_classes": detector.num_classes + 1}))
    other = [name for name, shape in own.items() if name in given and given[name] != shape]
    new = [name for name in other if own[name] != more[name]]
    if detector.num_classes == weights.detector.num_classes:
        new = []
    problems = {
        "missing": [name for name in own if name not in given],
        "unknown": [name for name in given if name not in own],
        "of another shape": [
            f"{name} ({tuple(given[name])} there, {tuple(own[name])} here)"
            for name in other
            if name not in new
        ],
    }
    if any(problems.values()):
        listed = [
            f"{len(names)} {what}: {_named(names)}" for what, names in problems.items() if names
        ]
        raise CheckpointError(
            f"training.start_from: {weights.source} is of another detector ({'; '.join(listed)}): "
            f"its settings must be those of this detector, but for the number of classes"
        )
    return new


def shapes(detector: DetectorConfig) -> dict[str, torch.Size]:
    """Of every tensor of the detector, by name; needs no memory for them."""
    with torch.device("meta"):
        model = CoDETR(without_download(detector))
    return {name: value.shape for name, value in model.state_dict().items()}


def _require_heads(detector: DetectorConfig, weights: Weights) -> None:
    transforms = detector.k if detector.positive_queries.enabled else 0
    for wanted, part, what in (
        (detector.k, "heads", "auxiliary head(s)"),
        (transforms, "positive_queries", "transform(s) of positive queries, one for each head"),
    ):
        numbers = (re.match(rf"{part}\.(\d+)\.", name) for name in weights.model)
        there = len({number[1] for number in numbers if number})
        if wanted != there:
            heads = ", ".join(weights.detector.head_names)
            raise CheckpointError(
                f"training.start_from: the detector has {detector.k} auxiliary head(s) "
                f"[{', '.join(detector.head_names)}], but {weights.source} has {there} {what}: "
                f"take the same heads, detector.heads=[{heads}], and the same positive_queries"
            )


def _named(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f", … and {more} more" if more > 0 else "")
