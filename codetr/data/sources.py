"""From a configuration to a data set: where the splits of a folder are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from codetr.config import ConfigError, DataConfig
from codetr.data.digits import cached_digits
from codetr.data.errors import DataError

if TYPE_CHECKING:
    from codetr.data.coco import CocoDataset

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class SplitFiles:
    """Where one split lies on disk: its annotation file, and the folder of its images."""

    annotations: Path
    images: Path


def find_split(directory: Path, split: Split) -> SplitFiles:
    """Find ``annotations/instances_SPLIT*.json`` or ``lvis_*SPLIT*.json`` and the images.

    The images of ``instances_train2017.json`` lie in ``train2017``, ``images/train2017`` or
    ``train``. LVIS names the folder for each image: there it is the data set's own.

    Raises:
        DataError: says what was looked for, and what is there instead.
    """
    annotations = _find_annotations(directory, split)
    if annotations.name.startswith("lvis_"):
        return SplitFiles(annotations, directory)
    suffix = annotations.stem.removeprefix("instances_")
    names = dict.fromkeys((suffix, f"images/{suffix}", split, f"images/{split}", "images"))
    for name in names:
        if (directory / name).is_dir():
            return SplitFiles(annotations, directory / name)
    there = ", ".join(sorted(p.name for p in directory.iterdir() if p.is_dir()))
    raise DataError(
        f"{directory}: no image folder for {annotations.name}: looked for {', '.join(names)}; "
        f"folders there: {there}"
    )


def _find_annotations(directory: Path, split: Split) -> Path:
    folder = directory / "annotations"
    patterns = (f"instances_{split}*.json", f"lvis_*{split}*.json")
    wanted = " or ".join(patterns)
    if not folder.is_dir():
        raise DataError(f"{directory}: has no folder 'annotations' with {wanted} in it")
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: found {several}; keep one file {wanted}, move the others away")
    present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(f"{folder}: no file {wanted}; found: {present}")


def data_directory(config: DataConfig) -> Path:
    """The folder of the configured data set; the embedded digits are made on first use.

    Raises:
        DataError: ``data.path`` is missing, or is no folder.
    """
    if config.dataset != "coco":
        return cached_digits(lvis=config.dataset == "digits-lvis")
    if config.path is None:
        raise DataError("data.path is needed for data.dataset=coco: the folder with 'annotations'")
    if not config.path.is_dir():
        raise DataError(f"{config.path}: no such folder (data.path)")
    return config.path


def open_dataset(
    config: DataConfig, split: Split, *, seed: int = 0, masks: bool = False
) -> CocoDataset:
    """The configured split with its transforms.

    Args:
        config: which data, and how it is transformed.
        split: train or val.
        seed: of the random transforms.
        masks: with the objects' masks (``DetectorConfig.needs_masks``).

    Raises:
        ConfigError: the objects' masks are wanted, and boxes are to be pasted.
        DataError: something is missing or broken; the text names it.
    """
    from codetr.data.coco import CocoDataset
    from codetr.data.copy_paste import CopyPaste
    from codetr.data.transforms import build_canvas, build_transform

    training = split == "train"
    canvas = build_canvas(config)
    pastes = training and config.copy_paste.enabled
    if pastes and masks and config.copy_paste.shapes == "boxes":
        raise ConfigError(
            "data.copy_paste.shapes=boxes pastes objects without masks, on which a mask head is "
            "trained: set data.copy_paste.shapes=masks"
        )
    files = find_split(data_directory(config), split)
    return CocoDataset(
        files.annotations,
        files.images,
        build_transform(config, training=training),
        training=training,
        skip_bad=config.skip_bad,
        limit=config.train_images if training else config.val_images,
        seed=seed,
        masks=masks,
        canvas=canvas,
        copy_paste=CopyPaste(config.copy_paste, canvas) if pastes and canvas else None,
        repeat_threshold=config.repeat_threshold if training else 0.0,
    )
