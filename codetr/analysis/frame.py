"""What the analyses share: a detector to look at, a pass over a data set, and what comes of it."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codetr.analysis import CATALOGUE, About
from codetr.checkpoint import Checkpoint, without_download
from codetr.config import ConfigError, DataConfig
from codetr.data import CocoDataset
from codetr.data.canvas import Canvas
from codetr.data.loader import collate
from codetr.detector import CoDETR
from codetr.inference import AHEAD
from codetr.structures import ImageBatch, Memory, Size, Targets
from codetr.transformer.encoder import padded_cells
from codetr.weights import Weights

Arrays = dict[str, NDArray[Any]]
Numbers = dict[str, float]
Tables = Mapping[str, Any]
"""The paper's numbers by table and figure; a report puts those that it finds beside its own."""

AnyCheckpoint = Checkpoint | Weights
"""Of a training, or weights without one, as ``codetr convert`` writes them."""

EXAMPLES = 4
"""So many images are shown at most."""
EXAMPLE_SIDE = 320
"""Longest side in pixels of an image that is kept to be shown."""


class AnalysisError(ConfigError):
    """What was asked for cannot be analysed; the text names the checkpoint or the data."""


@dataclass
class Subject:
    """A detector that is looked at, in evaluation mode, without gradients of its parameters.

    Attributes:
        label: names it in tables and pictures.
        group: what it is one of several of, as an arm of which there are several seeds; pictures
            give a group one colour.
    """

    label: str
    checkpoint: AnyCheckpoint
    model: CoDETR
    group: str = ""

    @classmethod
    def of(
        cls, checkpoint: AnyCheckpoint, device: torch.device, label: str = "", group: str = ""
    ) -> Subject:
        """The checkpoint's detector on ``device``.

        Raises:
            CheckpointError: its weights or classes do not fit its configuration.
        """
        weights = checkpoint if isinstance(checkpoint, Weights) else Weights.of(checkpoint)
        model = weights.build().to(device).requires_grad_(False)
        label = label or default_label(checkpoint)
        return cls(label, checkpoint, model, group or label)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def default_label(checkpoint: AnyCheckpoint) -> str:
    """``K=2 atss + faster_rcnn, seed 0, epoch 8``; weights without a training by their file."""
    name = label_of_heads(checkpoint.detector.head_names)
    if isinstance(checkpoint, Weights):
        return f"{name}, {Path(checkpoint.source).name}"
    return f"{name}, seed {checkpoint.seed}, epoch {checkpoint.epoch}"


def label_of_heads(heads: Sequence[str]) -> str:
    """``K=2 atss + faster_rcnn``."""
    return f"K={len(heads)} {' + '.join(heads)}".rstrip()


def default_labels(checkpoints: Sequence[AnyCheckpoint]) -> list[tuple[str, str]]:
    """A label for each, no two the same, and what it is one of several of: trainings that differ
    in the seed alone, at one epoch."""
    labels = numbered([default_label(checkpoint) for checkpoint in checkpoints])
    kinds = [
        (settings_of(one), one.epoch) if isinstance(one, Checkpoint) else None
        for one in checkpoints
    ]
    several = [kind for kind in dict.fromkeys(kinds) if kind and kinds.count(kind) > 1]
    heads = [checkpoints[kinds.index(kind)].detector.head_names for kind in several]
    names = [
        f"{label_of_heads(of_one)}, epoch {epoch}"
        for of_one, (_, epoch) in zip(heads, several, strict=True)
    ]
    groups = dict(zip(several, numbered(names), strict=True))
    return [
        (label, groups.get(kind, label) if kind else label)
        for label, kind in zip(labels, kinds, strict=True)
    ]


def settings_of(checkpoint: Checkpoint) -> str:
    """What tells a training from others but for the seed: its detector, settings and data."""
    parts = (without_download(checkpoint.detector), checkpoint.training, checkpoint.data)
    return str([part.model_dump_json() for part in parts])


def numbered(labels: Sequence[str]) -> list[str]:
    """The labels, with numbers where several are the same."""
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: i + 1].count(label)})"
        for i, label in enumerate(labels)
    ]


@dataclass
class Seen:
    """Some images of one size, as the detector is given them: none is padded to another's size. A
    canvas on which it was trained lies around each of them (:class:`codetr.data.canvas.Canvas`).

    Attributes:
        indices: the places of these images in the data set.
    """

    batch: ImageBatch
    targets: list[Targets]
    indices: list[int]

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of each image, without its canvas."""
        return self.batch.contents or self.batch.sizes

    def pixels(self, number: int) -> Tensor:
        """(3, h, w) of an image, without its canvas."""
        height, width = self.sizes[number]
        return self.batch.pixels[number, :, :height, :width]


# ---------------------------------------------------------------------------------- what is found


@dataclass(frozen=True)
class Measurement:
    """What an analysis has found in one detector: enough to draw every picture of it.

    Attributes:
        analysis: its name.
        facts: of detector and data, as plain values: ``k``, ``heads``, …; ``seed`` and ``epoch``
            of a training.
        numbers: finite, by name; ``a/b`` where there is one for each of several things.
        arrays: of numbers, by name.
    """

    analysis: str
    label: str
    group: str
    facts: dict[str, Any]
    numbers: Numbers
    arrays: Arrays = field(repr=False)

    def save(self, folder: Path) -> list[Path]:
        """Write ``ANALYSIS.npz`` and then ``ANALYSIS.json``: where this is, all of it is."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("label", "group", "facts", "numbers")
        values = {name: getattr(self, name) for name in names}
        arrays, text = (folder / f"{self.analysis}.{kind}" for kind in ("npz", "json"))
        drafts = [path.with_name(f".{path.name}.draft") for path in (arrays, text)]
        with drafts[0].open("wb") as file:
            np.savez_compressed(file, **self.arrays)  # type: ignore[arg-type]
        drafts[1].write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
        text.unlink(missing_ok=True)  # it would belong to other arrays for a moment
        return [draft.replace(path) for draft, path in zip(drafts, (arrays, text), strict=True)]

    @classmethod
    def load(cls, folder: Path, analysis: str) -> Measurement | None:
        """What :meth:`save` wrote; None where there is nothing whole."""
        try:
            values = json.loads((folder / f"{analysis}.json").read_text())
            with np.load(folder / f"{analysis}.npz", allow_pickle=False) as stored:
                return cls(analysis, **values, arrays=dict(stored))
        except (OSError, ValueError, TypeError, KeyError, BadZipFile):
            return None


# ----------------------------------------------------------------------------------- an analysis


class Analysis(ABC):
    """Looks at one detector, batch by batch; what it finds does not depend on the batches.

    What is found in an image is kept by the image's place in the data set, and put together in that
    order, so that neither the batches nor their order can change a sum.
    """

    name: ClassVar[str]
    trains_heads: ClassVar[bool] = False
    """Whether heads are given all that they are trained on: masks, too, where one needs them."""

    def __init__(self, subject: Subject, examples: frozenset[int]) -> None:
        """Begin.

        Args:
            subject: the detector.
            examples: the places of the images that are to be shown.
        """
        self.subject, self.model, self.examples = subject, subject.model, examples

    @classmethod
    def about(cls) -> About:
        return CATALOGUE[cls.name]

    @classmethod
    def check(cls, checkpoints: Sequence[AnyCheckpoint]) -> None:
        """Refuse what cannot be analysed, before anything is computed.

        Raises:
            AnalysisError: a detector lacks heads, or there are too few checkpoints.
        """
        about = cls.about()
        for checkpoint in checkpoints:
            if checkpoint.detector.k < about.heads:
                raise AnalysisError(
                    f"{checkpoint.source}: has no auxiliary head (K = {checkpoint.detector.k}), "
                    f"and '{cls.name}' looks at heads: give a checkpoint with K ≥ {about.heads}"
                )
        if len(checkpoints) < about.checkpoints:
            raise AnalysisError(
                f"'{cls.name}' compares checkpoints: give at least {about.checkpoints} of them"
            )

    def images_alone(self, memory: Memory, batch: ImageBatch) -> Memory:
        """The memory for maps of the images: what a canvas leaves free is padding in it, also where
        the detector takes it for image (``jitter.padding_mask: false``)."""
        if batch.contents is None:
            return memory
        alone = replace(batch, sizes=batch.contents).padded(self.model.backbone.divisor)
        cells = padded_cells(alone, memory.shapes)
        return replace(memory, padding=torch.cat([level.flatten(1) for level in cells], dim=1))

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Look at these images."""

    @abstractmethod
    def finish(self) -> tuple[Numbers, Arrays]:
        """What was found in all images."""

    @classmethod
    @abstractmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        paper: Tables,
        arms: Sequence[str] = (),
    ) -> list[Path]:
        """Compare detectors: pictures, and ``NAME.md``, the page that shows them, in ``folder``.

        Args:
            measurements: one for each detector, in the order in which to show them.
            folder: made if need be.
            paper: see :data:`Tables`.
            arms: all groups that are compared in this and other analyses, in order: a group's place
                among them decides its colour, also where others lack what this analysis needs.

        Returns:
            The page, then the pictures, and then what else there is.
        """


def measure(
    kind: type[Analysis],
    subject: Subject,
    dataset: CocoDataset,
    *,
    batch_size: int = 8,
    images: int | None = None,
    on_images: Callable[[int, int], None] | None = None,
) -> Measurement:
    """One pass of an analysis over a data set.

    Args:
        kind: of analysis.
        subject: the detector.
        dataset: opened with the transforms of evaluation.
        batch_size: images that are looked at together, at most.
        images: only so many, evenly spread over the data set; None: all.
        on_images: called after each batch with the number of images done and in all.

    Raises:
        AnalysisError: the detector lacks what is needed, or the images have no objects.
        DataError: the classes are not those that the detector was trained on.
    """
    checkpoint = subject.checkpoint
    dataset.classes.require_same(checkpoint.classes, str(dataset.annotations), checkpoint.source)
    places = spread(len(dataset), images)
    counts = object_counts(dataset)
    if not any(counts[place] for place in places):
        raise AnalysisError(
            f"{dataset.annotations}: no object in {len(places)} images: nothing to analyse; "
            "'codetr data check' shows what is there"
        )
    analysis = kind(subject, frozenset(example_places(places, counts)))
    done = 0
    for seen in look_at(dataset, places, batch_size):
        on_device = [targets.to(subject.device) for targets in seen.targets]
        analysis.update(Seen(seen.batch.to(subject.device), on_device, seen.indices))
        done += len(seen.indices)
        if on_images:
            on_images(done, len(places))
    numbers, arrays = analysis.finish()
    facts = {
        "checkpoint": checkpoint.source,
        "k": checkpoint.detector.k,
        "heads": list(checkpoint.detector.head_names),
        "images": len(places),
        "objects": int(sum(counts[place] for place in places)),
    }
    if isinstance(checkpoint, Checkpoint):
        facts |= {"seed": checkpoint.seed, "epoch": checkpoint.epoch}
    finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    return Measurement(kind.name, subject.label, subject.group, facts, finite, arrays)


def spread(count: int, most: int | None) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spread."""
    if most is None or most >= count:
        return [*range(count)]
    return [number * count // most for number in range(most)]


def object_counts(dataset: CocoDataset) -> NDArray[np.int64]:
    """(images,) how many objects there are in each, without crowd regions."""
    table = dataset.table
    before = np.concatenate(([0], np.cumsum(~table.crowd)))
    return before[table.starts[1:]] - before[table.starts[:-1]]


def example_places(places: Sequence[int], counts: NDArray[np.int64]) -> list[int]:
    """Images to show: evenly spread over those with several objects, or with any."""
    several = [p for p in places if counts[p] >= 2] or [p for p in places if counts[p]]
    return [several[i] for i in spread(len(several), EXAMPLES)]


def look_at(dataset: CocoDataset, places: Sequence[int], batch_size: int) -> Iterator[Seen]:
    """The images at these places, with their objects, in batches of one size each.

    Images of different size are never put together: in padding a convolution's border differs, and
    an image's features would depend on its neighbours. ``AHEAD`` batches of them at most are held;
    where all sizes differ, the commonest goes before its batch is full.
    """
    waiting: dict[Size, list[tuple[int, Tensor, Targets]]] = {}
    held = 0
    for place in places:
        pixels, targets = dataset[place]
        size = (pixels.shape[1], pixels.shape[2])
        some = waiting.setdefault(size, [])
        some.append((place, pixels, targets))
        held += 1
        if len(some) == batch_size or held == AHEAD * batch_size:
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            held -= len(waiting[fullest])
            yield _together(waiting.pop(fullest), dataset.canvas)
    for some in waiting.values():
        yield _together(some, dataset.canvas)


def _together(some: list[tuple[int, Tensor, Targets]], canvas: Canvas | None) -> Seen:
    batch, targets = collate([(pixels, objects) for _, pixels, objects in some], canvas)
    return Seen(batch, targets, [place for place, _, _ in some])


def shown(pixels: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """(h, w, 3) RGB of an image (3, H, W) that the data's transform has normalised, made smaller if
    it is large."""
    pixels = pixels.detach().cpu()
    image = pixels * pixels.new_tensor(data.std)[:, None, None]
    image = image + pixels.new_tensor(data.mean)[:, None, None]
    return (255 * shrunk(image).clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def shrunk(maps: Tensor) -> Tensor:
    """(C, H, W) maps in which no side is longer than ``EXAMPLE_SIDE``."""
    factor = EXAMPLE_SIDE / max(maps.shape[-2:])
    if factor >= 1:
        return maps
    size = [max(1, round(side * factor)) for side in maps.shape[-2:]]
    return torch.nn.functional.interpolate(maps[None], size, mode="area")[0]
