"""Which query each object is matched with, and how often that changes (DN-DETR, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from codetr.detector import CoDETR
from codetr.hooks import Listener
from codetr.matching.hungarian import hungarian
from codetr.queries.selection import QUERY, Selection
from codetr.structures import GroupPrediction, Size, Targets

Matches = dict[int, list[int]]
"""By image id: the query of each object of the image, in the annotations' order; -1 for none."""


@dataclass(frozen=True)
class Instability:
    """How a matching differs from the one before.

    Attributes:
        changed: share of the objects that are matched with another query.
        per_image: DN-DETR's: mean over the images of the number of queries whose object, or lack of
            one, is another.
    """

    changed: float
    per_image: float


def instability(
    before: Mapping[int, Sequence[int]], after: Mapping[int, Sequence[int]]
) -> Instability | None:
    """Of the images that both have; None where these have no object."""
    pairs = [(before[image], after[image]) for image in sorted(before.keys() & after.keys())]
    objects = sum(len(new) for _, new in pairs)
    if not objects:
        return None
    changed = sum(a != b for old, new in pairs for a, b in zip(old, new, strict=True))
    queries = sum(_changed_queries(old, new) for old, new in pairs)
    return Instability(changed / objects, queries / len(pairs))


def _changed_queries(before: Sequence[int], after: Sequence[int]) -> int:
    """How many queries are given another object, or one for none, or none for one."""
    old, new = (
        {query: number for number, query in enumerate(matched) if query >= 0}
        for matched in (before, after)
    )
    return sum(old.get(query) != new.get(query) for query in old.keys() | new.keys())


class MatchRecorder(Listener):
    """Notes the queries that a detector's objects are matched with, while it detects.

    It listens to the detector's own forward passes by hooks, and adds a Hungarian matching of the
    last layer to each: no second pass, and nothing in the detector.
    """

    def __init__(self, model: CoDETR) -> None:
        self.model = model
        self.matches: Matches = {}
        self._selection: Selection | None = None
        self._prediction: GroupPrediction | None = None

    def attach(self) -> list[RemovableHandle]:
        return [
            self.model.queries.register_forward_hook(self._hear_selection),
            self.model.decoder.register_forward_hook(self._hear_prediction),
        ]

    def _hear_selection(self, module: nn.Module, args: Any, output: Selection) -> None:  # noqa: ARG002
        self._selection = output

    def _hear_prediction(
        self,
        module: nn.Module,  # noqa: ARG002
        args: Any,  # noqa: ARG002
        output: dict[str, GroupPrediction],
    ) -> None:
        self._prediction = output[QUERY]

    def note(self, targets: Sequence[Targets], sizes: Sequence[Size]) -> None:
        """Match the objects of the images that were detected in last.

        A query that two stages have selected is known by its token: its place in the ranking says
        nothing of where it is.

        Args:
            targets: the objects of these images, in pixels of the network's input.
            sizes: valid (height, width) of each in pixels.
        """
        assert self._selection is not None
        assert self._prediction is not None
        logits, boxes = self._prediction.logits[-1], self._prediction.boxes[-1]
        on_device = [objects.to(logits.device) for objects in targets]
        matched = hungarian(logits, boxes, on_device, sizes, self.model.config.matching_cost)
        tokens = self._selection.tokens
        for number, (objects, (query, chosen)) in enumerate(zip(targets, matched, strict=True)):
            known = query if tokens is None else tokens[number, query]
            row = [-1] * len(objects)
            for place, identity in zip(chosen.tolist(), known.tolist(), strict=True):
                row[place] = identity
            self.matches[objects.image_id] = row
