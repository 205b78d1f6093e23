"""Images per second of our data loading, beside torchvision's reference for detection.

    python benchmarks/loading.py [--rounds 3] [--images 32] [--height 480] [--width 640]

The peer is put together from what torchvision's references/detection uses: CocoDetection, wrapped
for the v2 transforms, and their collate function, which leaves images a tuple; ours also pads them
to one tensor. Both read the same JPEG files, made on the spot, and run the same transforms: random
flip, random short side of 480 to 800, normalisation. With equal seeds all pixels, boxes and labels
must be equal first.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from frame import ROOT, Report, alternate, arguments, settings_of, timed

sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from codetr.config import DataConfig
from codetr.data import CocoDataset, build_loader
from codetr.data.coco import stable_seed
from codetr.data.transforms import build_transform

PEER = "torchvision"
BATCH = 4
CLASSES = 80
CONFIG = DataConfig(crop=False)
"""Flip and random short side: what the reference calls multiscale."""


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)  # as in a training with loader processes
    report = Report(
        "How many images a second are loaded?",
        PEER,
        settings_of(options),
        ("torch", "torchvision", "pillow"),
    )
    with tempfile.TemporaryDirectory(prefix="loading-") as name:
        folder = make_images(Path(name), options.images, options.height, options.width)
        ours, theirs = open_ours(folder), open_theirs(folder)
        for workers in options.workers:
            case = f"{workers} loader processes" if workers else "in the training process"
            require_equal_items(report, case, ours, theirs)
            require_equal_count(report, case, ours, theirs, workers)
            turns = {
                PEER: loading(lambda n=workers: reference_loader(theirs, n), options.images),
                "codetr": loading(lambda n=workers: our_loader(ours, n), options.images),
            }
            report.add(case, alternate(turns, options.rounds))
    report.finish("loading", options.out)
    return 0


def parse_arguments() -> Any:
    parser = arguments(__doc__, rounds=3, images=32, height=480, width=640)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    return parser.parse_args()


# -------------------------------------------------------------------------------------- both sides


def open_ours(folder: Path) -> CocoDataset:
    transform = build_transform(CONFIG, training=True)
    return CocoDataset(folder / "instances.json", folder, transform, training=True)


EPOCHS = itertools.count()
"""Each epoch draws other sizes, as the peer's generator does."""


def our_loader(dataset: CocoDataset, workers: int) -> Iterable[Any]:
    return build_loader(dataset, BATCH, training=True, workers=workers, epoch=next(EPOCHS))


def open_theirs(folder: Path) -> Any:
    transform = v2.Compose([v2.ToImage(), build_transform(CONFIG, training=True)])
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDetection(str(folder), str(folder / "instances.json"), transforms=transform)
    return wrap_dataset_for_transforms_v2(dataset, target_keys=["boxes", "labels", "image_id"])


def collate(batch: list[Any]) -> tuple[Any, ...]:
    """The reference's."""
    return tuple(zip(*batch, strict=True))


def reference_loader(dataset: Any, workers: int) -> Iterable[Any]:
    return DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate
    )


# ---------------------------------------------------------------------------- agreement and measure


def require_equal_items(report: Report, case: str, ours: CocoDataset, theirs: Any) -> None:
    """Every image and its objects, to the bit, with the peer's generator seeded as ours is."""
    report.require_same(case, "number of images", len(ours), len(theirs))
    for index in range(len(ours)):
        image, targets = ours[index]
        torch.manual_seed(stable_seed("transform", ours.seed, ours.epoch, targets.image_id))
        expected, objects = theirs[index]
        report.require_same(case, "pixels", image, expected)
        # Their labels are category ids; our classes are numbered from 0.
        labels = torch.tensor(ours.classes.category_ids)[targets.labels]
        report.require_same(case, "labels", labels, objects["labels"])
        report.require_same(case, "boxes", targets.boxes, objects["boxes"])


def require_equal_count(
    report: Report, case: str, ours: CocoDataset, theirs: Any, workers: int
) -> None:
    counts = [
        sum(len(targets) for _, targets in loader)
        for loader in (our_loader(ours, workers), reference_loader(theirs, workers))
    ]
    report.require_same(case, "images of an epoch", *counts)


def loading(loader: Callable[[], Iterable[Any]], images: int) -> Callable[[], dict[str, float]]:
    """An epoch, from making the loader on."""

    def epoch() -> None:
        for _ in loader():
            pass

    measure = timed(epoch)
    return lambda: {"images_per_second": images / measure()["seconds"]}


def make_images(folder: Path, count: int, height: int, width: int) -> Path:
    """Soft noise as JPEG files, about as large as photographs, with seven objects each."""
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 6, (height, width, 3))
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    sides = draw.integers(16, min(200, height, width), (count, 7, 2))
    corners = (draw.random((count, 7, 2)) * ((width, height) - sides)).astype(int)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width}
            for i in range(count)
        ],
        "categories": [{"id": 2 * c + 1, "name": f"class {c}"} for c in range(CLASSES)],
        "annotations": [
            {
                "id": 7 * i + k + 1,
                "image_id": i,
                "category_id": int(2 * draw.integers(CLASSES) + 1),
                # Not whole numbers: torchvision would keep those whole when it resizes.
                "bbox": [*(corners[i, k] + 0.25).tolist(), *(sides[i, k] - 0.5).tolist()],
                "area": int(sides[i, k].prod()),
                "iscrowd": 0,
            }
            for i in range(count)
            for k in range(7)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


if __name__ == "__main__":
    sys.exit(main())
