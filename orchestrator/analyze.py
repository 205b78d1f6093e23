"""Analyses of checkpoints, one by one or in comparison; :mod:`codetr.analysis` does the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from codetr.analysis import require_known
from codetr.config import ConfigError
from orchestrator.experiment import paper_tables
from orchestrator.use import data_config, device

if TYPE_CHECKING:
    from codetr.analysis.frame import Analysis, AnyCheckpoint
    from codetr.data import CocoDataset

ShowImages = Callable[[str, int, int], None]
"""Called with a detector's label, and how many of how many images it has seen."""


def analyze_checkpoints(
    name: str,
    places: Sequence[str],
    data: str,
    output: Path,
    *,
    batch_size: int = 8,
    images: int | None = None,
    progress: ShowImages | None = None,
) -> list[Path]:
    """Look at detectors on the validation images of ``data``, and write what is found.

    Args:
        name: of the analysis.
        places: of the checkpoints, of trainings or of ``codetr convert``: files, or their folders;
            or any URLs of fsspec.
        data: a folder in COCO layout, ``digits`` or ``digits-lvis``.
        output: the folder to write to; each detector's numbers and arrays in a folder below it.
        batch_size: images that go through a detector together.
        images: only so many, evenly spread; None: all.
        progress: is shown how far it is.

    Returns:
        The page, the pictures, then the arrays and numbers of each detector.

    Raises:
        CheckpointError, DataError, ConfigError: something cannot be used; nothing is written.
    """
    require_known(name, "analyze")
    from codetr.analysis import analysis
    from codetr.analysis.frame import Subject, default_labels, measure

    kind = analysis(name)
    checkpoints = [_load(place) for place in places]
    kind.check(checkpoints)
    labels = default_labels(checkpoints)
    datasets = [_open(kind, checkpoint, data) for checkpoint in checkpoints]
    # The last may not fit: better known before the first is seen.
    for checkpoint, dataset in zip(checkpoints, datasets, strict=True):
        dataset.classes.require_same(
            checkpoint.classes, str(dataset.annotations), checkpoint.source
        )
    measurements = []
    for checkpoint, dataset, (label, group) in zip(checkpoints, datasets, labels, strict=True):

        def on_images(done: int, total: int, label: str = label) -> None:
            if progress:
                progress(label, done, total)

        subject = Subject.of(checkpoint, device(), label, group)
        measurements.append(
            measure(
                kind,
                subject,
                dataset,
                batch_size=batch_size,
                images=images,
                on_images=on_images,
            )
        )
    try:
        saved: list[Path] = []
        for number, measurement in enumerate(measurements, start=1):
            saved += measurement.save(output / f"{number}")
        # What took long to find is safe before it is drawn.
        return kind.report(measurements, output, paper_tables()) + saved
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error.strerror}") from None


def _open(kind: type[Analysis], checkpoint: AnyCheckpoint, data: str) -> CocoDataset:
    """With the training's draws, as at the end of a run: what a head samples is the same."""
    from codetr.data import open_dataset
    from codetr.weights import Weights

    masks = kind.trains_heads and checkpoint.detector.needs_masks
    seed = 0 if isinstance(checkpoint, Weights) else checkpoint.seed
    return open_dataset(data_config(checkpoint.data, data), "val", seed=seed, masks=masks)


def _load(place: str) -> AnyCheckpoint:
    from codetr.weights import load_trained
    from orchestrator.storage import local_checkpoint

    with local_checkpoint(place) as path:
        return replace(load_trained(path), source=place)
