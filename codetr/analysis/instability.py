"""How unstable one-to-one matching is (figure 5; DN-DETR, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codetr.analysis.frame import (
    Analysis,
    AnalysisError,
    AnyCheckpoint,
    Arrays,
    Measurement,
    Numbers,
    Seen,
    Tables,
)
from codetr.analysis.page import image, images_of, table, write_page
from codetr.checkpoint import Checkpoint, without_download
from codetr.matching.stability import Instability as Change
from codetr.matching.stability import Matches, MatchRecorder, instability
from codetr.plotting import COLOURS, picture
from codetr.weights import Weights

PAPER = (
    "The paper (section 3.4, figure 5) saw Co-Deformable-DETR match more stably than "
    "Deformable-DETR while both were trained for 12 epochs on COCO."
)


@dataclass(frozen=True)
class Course:
    """How one training's matching changed.

    Attributes:
        label: of the training.
        group: of which there may be several.
        changes: by the epoch after which it was found; each is against the one before it.
    """

    label: str
    group: str
    changes: Mapping[int, Change]


class Instability(Analysis):
    """Notes which query each object is matched with; the numbers come from comparing checkpoints
    of one training, one after the other. ``matched``: share of the objects that have a query."""

    name = "instability"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.training = _training(_of_training(self.subject.checkpoint))
        self.by_place: dict[int, tuple[int, list[int]]] = {}

    @classmethod
    def check(cls, checkpoints: Sequence[AnyCheckpoint]) -> None:
        epochs: dict[str, set[int]] = {}
        for checkpoint in map(_of_training, checkpoints):
            epochs.setdefault(_training(checkpoint), set()).add(checkpoint.epoch)
        super().check(checkpoints)
        if all(len(of_one) < 2 for of_one in epochs.values()):
            raise AnalysisError(
                f"'{cls.name}' compares epochs of one training, and no two of "
                f"{', '.join(c.source for c in checkpoints)} are that"
            )

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        with MatchRecorder(self.model) as recorder:
            self.model.detect(seen.batch)
            recorder.note(seen.targets, seen.batch.sizes)
        for index, targets in zip(seen.indices, seen.targets, strict=True):
            self.by_place[index] = (targets.image_id, recorder.matches[targets.image_id])

    def finish(self) -> tuple[Numbers, Arrays]:
        rows = [
            (image_id, query)
            for image_id, queries in (self.by_place[place] for place in sorted(self.by_place))
            for query in queries
        ]
        matches = np.array(rows, dtype=np.int64).reshape(-1, 2)
        image_ids = [self.by_place[place][0] for place in sorted(self.by_place)]
        return {"matched": float((matches[:, 1] >= 0).mean())}, {
            "images": np.array(image_ids, dtype=np.int64),
            "matches": matches,
            "training": np.array(self.training),
        }

    @classmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        paper: Tables,  # noqa: ARG003
    ) -> list[Path]:
        return report_courses(courses(measurements), images_of(measurements), folder)


def _of_training(checkpoint: AnyCheckpoint) -> Checkpoint:
    if isinstance(checkpoint, Weights):
        raise AnalysisError(
            f"{checkpoint.source}: weights without a training, and '{Instability.name}' compares "
            "epochs of one: give checkpoints of a training"
        )
    return checkpoint


def _training(checkpoint: Checkpoint) -> str:
    """What tells one training from others: its detector, settings, data and seed."""
    parts = (without_download(checkpoint.detector), checkpoint.training, checkpoint.data)
    return f"{[part.model_dump_json() for part in parts]} {checkpoint.seed}"


def courses(measurements: Sequence[Measurement]) -> list[Course]:
    """The course of every training of which there are two epochs at least."""
    trainings: dict[str, list[Measurement]] = {}
    for one in measurements:
        trainings.setdefault(str(one.arrays["training"]), []).append(one)
    found = []
    for some in trainings.values():
        ordered = sorted(some, key=lambda one: int(one.facts["epoch"]))
        changes = {}
        for before, after in pairwise(ordered):
            change = instability(_matches(before), _matches(after))
            if change is not None and before.facts["epoch"] != after.facts["epoch"]:
                changes[int(after.facts["epoch"])] = change
        if changes:
            facts = ordered[-1].facts
            label = f"K={facts['k']} {' + '.join(facts['heads'])}".rstrip()
            found.append(Course(f"{label}, seed {facts['seed']}", label, changes))
    return found


def _matches(measurement: Measurement) -> Matches:
    matches: Matches = {image_id: [] for image_id in measurement.arrays["images"].tolist()}
    for image_id, query in measurement.arrays["matches"].tolist():
        matches[image_id].append(query)
    return matches


def report_courses(found: Sequence[Course], about: str, folder: Path) -> list[Path]:
    """The page and the picture of these trainings.

    Args:
        about: on what they were looked at, in a sentence.
    """
    drawn = _draw(found, folder)
    last = ", ".join(f"{list(c.changes.values())[-1].changed:.1%} ({c.label})" for c in found)
    rows = [
        [course.label, epoch, change.changed, change.per_image]
        for course in found
        for epoch, change in course.changes.items()
    ]
    page = write_page(
        folder / "instability.md",
        "Instability of one-to-one matching",
        seen=f"At the end so many objects are matched with another query than before: {last}.",
        paper=PAPER,
        about=about,
        blocks=[
            image(drawn, "Instability by epoch"),
            table(["training", "epoch", "objects changed", "queries changed per image"], rows),
            "Each row compares an epoch with the one evaluated before, on the last decoder layer. "
            "Queries changed per image is DN-DETR's instability: every query counts that is given "
            "another object, or one instead of none. A query of a two-stage detector is known by "
            "the encoder's token that it was selected from.",
        ],
    )
    return [page, drawn]


def _draw(found: Sequence[Course], folder: Path) -> Path:
    path = folder / "instability.png"
    names = dict.fromkeys(course.group for course in found)
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    with picture(path, 1, 2, size=(9, 3.6)) as (_, panels):
        for axes, name, title in zip(
            panels[0],
            ("changed", "per_image"),
            ("share of objects with another query", "queries changed per image (DN-DETR)"),
            strict=True,
        ):
            labelled: set[str] = set()
            for course in found:
                values = [getattr(change, name) for change in course.changes.values()]
                axes.plot(
                    [*course.changes], values, marker="o", markersize=3, linewidth=1.4,
                    color=colours[course.group],
                    label=None if course.group in labelled else course.group,
                )  # fmt: skip
                labelled.add(course.group)
            axes.set(xlabel="epoch", title=title)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0, 0].legend(fontsize=8)
    return path
