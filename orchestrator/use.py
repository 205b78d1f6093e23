"""Using a trained detector: measure it on a data set, look at what it finds in images."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from codetr.config import ConfigError, DataConfig, nearest
from orchestrator.files import write_whole

if TYPE_CHECKING:
    import torch

    from codetr.data import Classes
    from codetr.detector import CoDETR
    from codetr.inference import Precision, Prediction
    from codetr.metrics import Metrics
    from codetr.tta import TTA
    from codetr.weights import Weights

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What is an image in a folder; a file that is named itself may have any."""

Progress = Callable[[str, int, int], None]
"""Is told what is done, how many images it is done with, and of how many."""


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    *,
    branch: str = "query",
    batch_size: int = 8,
    precision: Precision = "fp32",
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco",
    tta: TTA | None = None,
    json_file: Path | None = None,
) -> Metrics:
    """Metrics of a checkpoint on the validation images of ``data``.

    Args:
        checkpoint: of a training or of ``codetr convert``; its file, or its folder; on this
            machine, or as any URL of fsspec.
        data: a folder in COCO layout, ``digits`` or ``digits-lvis``.
        branch: ``query``, or an auxiliary head's name.
        batch_size: images that go through the model together, if it sees them at the same size.
        precision: see :meth:`CoDETR.predict`.
        engine: what computes the metrics.
        tta: augmentation at test time.
        json_file: where to write them too.

    Raises:
        CheckpointError, DataError, ConfigError: either cannot be used, or their classes differ.
    """
    from codetr.data import open_dataset
    from codetr.inference import detect_in
    from codetr.metrics import evaluate

    trained, model = _load(checkpoint, branch)
    config = data_config(trained.data, data)
    dataset = open_dataset(config, "val")
    dataset.classes.require_same(trained.classes, str(dataset.annotations), trained.source)
    options: dict[str, Any] = {"batch_size": batch_size, "branch": branch, "precision": precision}
    # Not a training's batches, in which images are padded to the largest: what is found in one
    # would depend on the others, and differ from what predict finds.
    found = detect_in(model.to(device()), dataset, config, tta=tta, **options)
    metrics = evaluate(dataset, found, engine)
    if json_file is not None:
        # JSON has no NaN: what is undefined, as the AP of large objects without any, is null.
        summary = {k: v if math.isfinite(v) else None for k, v in metrics.summary.items()}
        content = {"summary": summary, "per_class": metrics.per_class}
        json_file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return metrics


def augmentation(wanted: bool, scales: str | None, flip: bool | None) -> TTA | None:
    """What ``--tta``, ``--scales 0.75,1`` and ``--flip`` ask for; None without ``--tta``.

    Raises:
        ConfigError: the scales are none, or an option makes no sense without ``--tta``.
    """
    if not wanted:
        for option, value in (("--scales", scales), ("--flip", flip)):
            if value is not None:
                raise ConfigError(f"{option} is of --tta: give that, too")
        return None
    from codetr.tta import TTA

    if scales is None:
        return TTA(flip=flip)
    try:
        factors = tuple(float(scale) for scale in scales.split(","))
    except ValueError:
        raise ConfigError(f"--scales {scales}: give factors, as 0.75,1,1.25") from None
    return TTA(factors, flip)


def predict_images(
    checkpoint: str,
    images: Sequence[Path],
    output: Path,
    *,
    min_score: float = 0.3,
    branch: str = "query",
    batch_size: int = 1,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> list[Path]:
    """Write a picture with boxes for each image, and ``predictions.json`` with all detections.

    Args:
        checkpoint: as of :func:`evaluate_checkpoint`.
        images: files, and folders of images, as of the frames of a video.
        output: the folder; made if need be.
        min_score: pictures show no detection below it; the JSON has all.
        branch: ``query``, or an auxiliary head's name.
        batch_size: images that go through the model together, if it sees them at the same size.
        precision: see :meth:`CoDETR.predict`.
        progress: called after each image.

    Returns:
        What was written.

    Raises:
        CheckpointError, DataError, ConfigError: something cannot be read; nothing is written.
    """
    from codetr.data.images import read_image
    from codetr.inference import draw, predict

    tell = progress or _quiet
    files = image_files(images)
    trained, model = _load(checkpoint, branch)
    for done, image in enumerate(files, start=1):
        read_image(image)  # the last one may be broken: better known before the first is written
        tell("reading", done, len(files))
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    taken: set[Path] = set()
    found: list[Prediction] = []
    options: dict[str, Any] = {"batch_size": batch_size, "branch": branch, "precision": precision}
    for prediction in predict(model.to(device()), files, trained.data, **options):
        picture = draw(
            prediction.image, prediction.detections, trained.classes, min_score=min_score
        )
        written.append(_free_name(output, prediction.path.stem, taken))
        taken.add(written[-1])
        picture.save(written[-1])
        # Its size is all that is needed further on, of what may be thousands of frames.
        size = prediction.image.shape[1:]
        found.append(replace(prediction, image=prediction.image.new_empty((0, *size))))
        tell("detecting", len(found), len(files))
    results = output / "predictions.json"
    write_whole(results, json.dumps(_as_coco(found, trained.classes)))
    return [*written, results]


def _quiet(_what: str, _done: int, _total: int) -> None:
    pass


def image_files(places: Sequence[Path]) -> list[Path]:
    """The files, and in the place of each folder the images in it, frame 9 before frame 10.

    Raises:
        ConfigError: a folder has no images.
    """
    files: list[Path] = []
    for place in places:
        if not place.is_dir():
            files.append(place)
            continue
        inside = [path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        if not inside:
            kinds = " ".join(IMAGE_SUFFIXES)
            raise ConfigError(f"{place}: no image in this folder (looked for {kinds})")
        files += sorted(inside, key=_natural)
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders names as people do: numbers in them by their value."""
    words = re.findall(r"\d+|\D+", path.name)
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def _load(place: str, branch: str) -> tuple[Weights, CoDETR]:
    from codetr.weights import load_weights
    from orchestrator.storage import local_checkpoint

    with local_checkpoint(place) as path:
        weights = load_weights(path)
    branches = ["query", *weights.detector.head_names]
    if branch not in branches:
        raise ConfigError(f"--branch {branch}: {place} has none such; {nearest(branch, branches)}")
    return weights, weights.build()


def device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def data_config(trained_on: DataConfig, data: str) -> DataConfig:
    """Images resized and normalised as in training, from another place."""
    embedded = data in ("digits", "digits-lvis")
    place = {
        "dataset": data if embedded else "coco",
        "path": None if embedded else Path(data).expanduser(),
        "val_images": None,
    }
    return trained_on.model_copy(update=place)


def _free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """``a.png``, or ``a-2.png`` where two images of different folders have the same name."""
    names = chain([stem], (f"{stem}-{n}" for n in count(2)))
    return next(path for name in names if (path := folder / f"{name}.png") not in taken)


def _as_coco(predictions: Sequence[Prediction], classes: Classes) -> dict[str, Any]:
    """A COCO file of its own: images by name, categories, and annotations with scores."""
    from codetr.metrics import to_coco_results

    numbered = dict(enumerate(predictions, start=1))
    results = to_coco_results({n: p.detections for n, p in numbered.items()}, classes)
    return {
        "images": [
            {
                "id": number,
                "file_name": str(prediction.path),
                "height": prediction.image.shape[1],
                "width": prediction.image.shape[2],
            }
            for number, prediction in numbered.items()
        ],
        "categories": [
            {"id": identity, "name": name}
            for identity, name in zip(classes.category_ids, classes.names, strict=True)
        ],
        "annotations": [
            {"id": n, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0, **r}
            for n, r in enumerate(results, start=1)
        ],
    }
