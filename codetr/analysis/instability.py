"""How unstable one-to-one matching is (figure 5; DN-DETR, section 3.1)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    label_of_heads,
    numbered,
    settings_of,
)
from codetr.analysis.page import (
    groups,
    image,
    images_of,
    largest_and_smallest,
    mean_and_range,
    seeds_of,
    table,
    write_page,
)
from codetr.analysis.stability import Instability as Change
from codetr.analysis.stability import Matches, MatchRecorder, instability
from codetr.checkpoint import Checkpoint
from codetr.plotting import draw_mean, legend_below, line_styles, picture
from codetr.weights import Weights

QUANTITIES = {
    "changed": "Share of objects with another query",
    "per_image": "Queries changed per image (DN-DETR)",
}
"""What is shown of a :class:`~codetr.analysis.stability.Instability`."""

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
    """Notes which query each object is matched with; ``matched``: share of the objects that have a
    query. The numbers of interest come from comparing checkpoints of one training, one after the
    other: the report writes them into ``instability.csv``."""

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
        _: Tables,
        arms: Sequence[str] = (),
    ) -> list[Path]:
        return report_courses(courses(measurements), images_of(measurements), folder, arms)


def _of_training(checkpoint: AnyCheckpoint) -> Checkpoint:
    if isinstance(checkpoint, Weights):
        raise AnalysisError(
            f"{checkpoint.source}: weights without a training, and '{Instability.name}' compares "
            "epochs of one: give checkpoints of a training"
        )
    return checkpoint


def _training(checkpoint: Checkpoint) -> str:
    """What tells one training from others."""
    return f"{settings_of(checkpoint)} {checkpoint.seed}"


def courses(measurements: Sequence[Measurement]) -> list[Course]:
    """The course of every training of which there are two epochs at least."""
    trainings: dict[str, list[Measurement]] = {}
    for one in measurements:
        trainings.setdefault(str(one.arrays["training"]), []).append(one)
    settings = [*dict.fromkeys(_without_seed(training) for training in trainings)]
    heads = {_without_seed(name): some[0].facts["heads"] for name, some in trainings.items()}
    labels = numbered([label_of_heads(heads[one]) for one in settings])
    group_of = dict(zip(settings, labels, strict=True))
    found = []
    for training, some in trainings.items():
        ordered = sorted(some, key=lambda one: int(one.facts["epoch"]))
        changes = {}
        for before, after in pairwise(ordered):
            change = instability(_matches(before), _matches(after))
            if change is not None and before.facts["epoch"] != after.facts["epoch"]:
                changes[int(after.facts["epoch"])] = change
        if changes:
            group = group_of[_without_seed(training)]
            found.append(Course(f"{group}, seed {ordered[-1].facts['seed']}", group, changes))
    return found


def _without_seed(training: str) -> str:
    return training.rpartition(" ")[0]


def _matches(measurement: Measurement) -> Matches:
    matches: Matches = {image_id: [] for image_id in measurement.arrays["images"].tolist()}
    for image_id, query in measurement.arrays["matches"].tolist():
        matches[image_id].append(query)
    return matches


def report_courses(
    found: Sequence[Course], about: str, folder: Path, arms: Sequence[str] = ()
) -> list[Path]:
    """The page, the picture and the numbers of these trainings.

    Args:
        about: on what they were looked at, in a sentence.
        arms: as of :meth:`~codetr.analysis.frame.Analysis.report`.
    """
    by_group = groups(found)
    drawn = _draw(by_group, line_styles([*arms, *by_group]), folder)
    last = {
        group: [[*course.changes.values()][-1].changed for course in some]
        for group, some in by_group.items()
    }
    page = write_page(
        folder / "instability.md",
        "Instability of one-to-one matching",
        seen="The share of objects that are matched with another query than before is, at the end, "
        f"{largest_and_smallest(last, '.1%')}.",
        paper=PAPER,
        about=f"{about} {seeds_of(map(len, by_group.values()))}".rstrip(),
        blocks=[
            image(drawn, "Instability by epoch"),
            *(f"{title}:\n\n{_table(by_group, name)}" for name, title in QUANTITIES.items()),
            "Each row compares an epoch with the one evaluated before, on the last decoder layer. "
            "Queries changed per image is DN-DETR's instability: every query counts that is given "
            "another object, or one instead of none. A query of a two-stage detector is known by "
            "the encoder's token that it was selected from.",
        ],
    )
    return [page, drawn, _write_numbers(found, folder)]


def _write_numbers(found: Sequence[Course], folder: Path) -> Path:
    """``instability.csv``: a row for each training and epoch, unrounded."""
    path = folder / f"{Instability.name}.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["group", "training", "epoch", *QUANTITIES])
        for course in found:
            for epoch, change in sorted(course.changes.items()):
                numbers = [getattr(change, name) for name in QUANTITIES]
                rows.writerow([course.group, course.label, epoch, *numbers])
    return path


def _table(by_group: Mapping[str, Sequence[Course]], name: str) -> str:
    """A row for each epoch, a column for each group."""
    epochs = sorted({epoch for some in by_group.values() for c in some for epoch in c.changes})
    rows = [
        [
            epoch,
            *(
                mean_and_range(
                    [getattr(c.changes[epoch], name) for c in some if epoch in c.changes]
                )
                for some in by_group.values()
            ),
        ]
        for epoch in epochs
    ]
    return table(["epoch", *by_group], rows)


def _draw(
    by_group: Mapping[str, Sequence[Course]], styles: Mapping[str, dict[str, Any]], folder: Path
) -> Path:
    path = folder / "instability.png"
    with picture(path, 1, len(QUANTITIES), size=(8.4, 4)) as (figure, panels):
        for axes, (name, title) in zip(panels[0], QUANTITIES.items(), strict=True):
            for group, some in by_group.items():
                # The mean only where every seed was evaluated, or it would jump.
                common = sorted(set.intersection(*(set(course.changes) for course in some)))
                curves = [[getattr(c.changes[e], name) for e in common] for c in some]
                draw_mean(axes, common, curves, group, markersize=4, **styles[group])
            axes.set(xlabel="epoch", title=title)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend_below(figure, panels[0])
    return path
