"""The embedded data set: real handwritten digits on real photographs, all from scikit-learn.

Each image is a crop of one of scikit-learn's two sample photographs with one to six of its
handwritten digits in colour. Digits and photographs are divided between train and val, so nothing
of val has been seen in training. The long-tailed variant has 30 classes (each digit plain, on a
plate and on a disc) with LVIS's federated annotations.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from codetr.data.errors import DataError
from codetr.data.files import Progress

VERSION = 2
"""Goes up when the same parameters give other images."""

MAX_DIGITS = 6
DIGIT_PIXELS = (12, 48)
"""Longer side of an object, log-uniform."""
MAX_ANGLE = 15
MIN_CONTRAST = 0.35
"""Least difference of luminance between an object and what it lies on; black to white is 1."""
MAX_IOU = 0.3
MIN_VISIBLE = 0.5
KINDS = ("", " on a plate", " on a disc")
PLACEMENTS = 30
"""Positions that are tried for an object before it is left out."""

_SPLITS = {"train": 0, "val": 1}
_LUMA = np.array([0.299, 0.587, 0.114])
_DRAWN = 3 * DIGIT_PIXELS[1]
"""Pixels at which shapes are drawn before they are averaged down: smooth edges."""

Rgb = NDArray[np.float64]
Grey = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Recipe:
    """What determines every byte of a generated data set."""

    lvis: bool
    seed: int
    train_images: int
    val_images: int
    size: int

    @property
    def class_names(self) -> list[str]:
        kinds = KINDS if self.lvis else KINDS[:1]
        return [f"{digit}{kind}" for kind in kinds for digit in range(10)]

    @property
    def folder_name(self) -> str:
        variant = "digits-lvis" if self.lvis else "digits"
        images = f"{self.train_images}+{self.val_images}"
        return f"{variant}-v{VERSION}-{images}-{self.size}px-seed{self.seed}"


@dataclass
class Scene:
    """One generated image.

    Attributes:
        pixels: (size, size, 3) uint8.
        labels: class number of each object.
        masks: its visible pixels, (size, size).
    """

    pixels: NDArray[np.uint8]
    labels: list[int]
    masks: list[Mask]


def make_digits(
    directory: Path,
    *,
    lvis: bool = False,
    seed: int = 0,
    train_images: int = 2000,
    val_images: int = 200,
    size: int = 96,
    progress: Progress | None = None,
) -> Path:
    """Write a data set in COCO layout; the same arguments give the same bytes.

    Args:
        directory: new or empty; appears complete or not at all.
        lvis: the long-tailed variant with LVIS's annotations.
        seed: another seed gives other images.
        train_images: number of training images.
        val_images: number of validation images.
        size: side of the images in pixels.
        progress: called after each image.

    Raises:
        DataError: the folder is not empty, or a number is out of range.
    """
    recipe = Recipe(lvis, seed, train_images, val_images, size)
    if min(train_images, val_images) < 1 or size < 2 * DIGIT_PIXELS[0] or seed < 0:
        raise DataError(
            f"digits need at least one image in each split, {2 * DIGIT_PIXELS[0]} pixels "
            f"and a seed from 0: got {recipe}"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory}: is not empty; choose a new folder")
    with _writing_to(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            draft.chmod(0o755)
            _write(draft, recipe, progress)
            draft.replace(directory)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return directory


def embedded_recipe(*, lvis: bool) -> Recipe:
    """What ``data.dataset: digits`` or ``digits-lvis`` is made of."""
    return Recipe(lvis, seed=0, train_images=1000 if lvis else 2000, val_images=200, size=96)


def cached_digits(*, lvis: bool = False, progress: Progress | None = None) -> Path:
    """The embedded set under the user's cache folder, made on first use by one process only.

    Raises:
        DataError: the cache folder cannot be written.
    """
    recipe = embedded_recipe(lvis=lvis)
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codetr"
    directory = cache_home / recipe.folder_name
    if directory.is_dir():
        return directory
    with _writing_to(directory):
        cache_home.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_home / f".{recipe.folder_name}.lock"):
            if not directory.is_dir():
                for leftover in cache_home.glob(f".{recipe.folder_name}-*"):  # of a killed process
                    shutil.rmtree(leftover)
                make_digits(directory, **asdict(recipe), progress=progress)
    return directory


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written ({error.strerror or error}); choose another folder, "
            "or set XDG_CACHE_HOME where it is the embedded set"
        ) from None


def _write(directory: Path, recipe: Recipe, progress: Progress | None) -> None:
    (directory / "annotations").mkdir()
    counts = {"train": recipe.train_images, "val": recipe.val_images}
    done = 0
    frequencies: list[dict[str, Any]] = []
    for split, count in counts.items():
        (directory / split).mkdir()
        content = _header(recipe)
        for index in range(count):
            image_id = index + 1 + (recipe.train_images if split == "val" else 0)
            name = f"{image_id:06d}.jpg"
            rng = np.random.default_rng([recipe.seed, int(recipe.lvis), _SPLITS[split], index])
            scene = make_scene(recipe, split, index, rng)
            Image.fromarray(scene.pixels).save(directory / split / name, quality=92, subsampling=0)
            image = {"id": image_id, "file_name": name, "width": recipe.size, "height": recipe.size}
            _annotate(content, image, scene, recipe, rng)
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))
        if recipe.lvis and split == "train":
            frequencies = _frequencies(content)
        if recipe.lvis:  # as in LVIS, val carries the counts of train too
            content["categories"] = [
                c | f for c, f in zip(content["categories"], frequencies, strict=True)
            ]
        text = json.dumps(content, separators=(",", ":"))
        (directory / "annotations" / f"instances_{split}.json").write_text(text)


# ------------------------------------------------------------------------------------------ images


def make_scene(recipe: Recipe, split: str, index: int, rng: np.random.Generator) -> Scene:
    """The image number ``index`` of a split."""
    canvas = _background(split, recipe.size, rng)
    probabilities = _class_probabilities(recipe, split, index)
    labels: list[int] = []
    full: list[int] = []
    masks: list[Mask] = []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        label = int(rng.choice(len(probabilities), p=probabilities))
        shape = _shape(label, split, recipe.size, rng)
        placed = _place(shape[0] >= 0.5, masks, full, recipe.size, rng)
        if placed is None:
            continue
        top, left, masks = placed
        labels.append(label)
        full.append(int(masks[-1].sum()))
        patch = canvas[top : top + shape[0].shape[0], left : left + shape[0].shape[1]]
        _paint(patch, *shape, rng)
    pixels = (canvas * 255).round().astype(np.uint8)
    return Scene(pixels, labels, masks)


@cache
def _photographs() -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


@cache
def _samples(split: str) -> tuple[NDArray[np.uint8], ...]:
    """For each digit its (n, 8, 8) samples in 0..255; every fourth sample belongs to val."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    own = (np.arange(len(digits.target)) % 4 == 3) == (split == "val")
    images = (digits.images * (255 / 16)).astype(np.uint8)
    return tuple(images[own & (digits.target == digit)] for digit in range(10))


def _background(split: str, size: int, rng: np.random.Generator) -> Rgb:
    """(size, size, 3) in 0..1: the left two thirds of a photograph for train, the rest for val."""
    photograph = _photographs()[rng.integers(2)]
    border = photograph.shape[1] * 2 // 3
    region = photograph[:, :border] if split == "train" else photograph[:, border:]
    side = int(rng.integers(96, min(region.shape[:2]) + 1))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in region.shape[:2])
    crop = Image.fromarray(region[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def _class_probabilities(recipe: Recipe, split: str, index: int) -> NDArray[np.float64]:
    """Uniform; in the long-tailed variant log-spaced from 0.6 per image to 4 in all of train.

    Half of its val is uniform nevertheless, so that rare classes occur there.
    """
    count = len(recipe.class_names)
    if not recipe.lvis or (split == "val" and index % 2):
        return np.full(count, 1 / count)
    expected = np.geomspace(0.6 * recipe.train_images, 4, count)
    ranks = np.random.default_rng(recipe.seed).permutation(count)
    return (expected / expected.sum())[ranks]


def _shape(label: int, split: str, size: int, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """(h, w) opacity of the whole object, and of the digit on it, both in 0..1."""
    low, high = (math.log(bound) for bound in (DIGIT_PIXELS[0], min(DIGIT_PIXELS[1], size // 2)))
    pixels = round(math.exp(rng.uniform(low, high)))
    kind, digit = divmod(label, 10)
    samples = _samples(split)[digit]
    glyph = _glyph(samples[rng.integers(len(samples))], rng)
    if kind == 0:
        opacity = _fit(glyph, pixels)
        return opacity, opacity
    # A margin around the digit, so that it stands on its plate or disc.
    height, width = glyph.shape
    margin = round(0.2 * max(height, width))
    glyph = np.pad(glyph, margin)
    return _fit(_support(kind, glyph.shape), pixels), _fit(glyph, pixels)


def _support(kind: int, shape: tuple[int, ...]) -> Grey:
    """(h, w) the plate, which fills its box, or the disc, an ellipse in it."""
    if kind == 1:
        return np.ones(shape)
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    return (rows[:, None] ** 2 + columns[None] ** 2 <= 1).astype(np.float64)


def _glyph(sample: NDArray[np.uint8], rng: np.random.Generator) -> Grey:
    """(h, w) a sample enlarged, turned and cut to its ink, which is 1."""
    size = (_DRAWN, _DRAWN)
    image = Image.fromarray(np.pad(sample, 1)).resize(size, Image.Resampling.BICUBIC)
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
    ink = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR, expand=True)) >= 112
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float64)


def _fit(opacity: Grey, pixels: int) -> Grey:
    """Scaled so that the longer side has this many pixels."""
    height, width = opacity.shape
    factor = pixels / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = Image.fromarray((opacity * 255).astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.BOX)) / 255


def _place(
    shape: Mask, masks: list[Mask], full: list[int], size: int, rng: np.random.Generator
) -> tuple[int, int, list[Mask]] | None:
    """A position where every object stays visible enough; (top, left, all visible masks)."""
    height, width = shape.shape
    for _ in range(PLACEMENTS):
        top = int(rng.integers(0, size - height + 1))
        left = int(rng.integers(0, size - width + 1))
        new = np.zeros((size, size), np.bool_)
        new[top : top + height, left : left + width] = shape
        visible = [mask & ~new for mask in masks]
        if any(m.sum() < MIN_VISIBLE * area for m, area in zip(visible, full, strict=True)):
            continue
        boxes = [mask_box(mask) for mask in (*visible, new)]
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes)) - np.eye(len(boxes))
        if ious.max() < MAX_IOU:
            return top, left, [*visible, new]
    return None


def _paint(patch: Rgb, support: Grey, glyph: Grey, rng: np.random.Generator) -> None:
    """Draw an object over (h, w, 3) of the canvas, its colours in contrast to what it covers."""
    beneath = np.average(patch, axis=(0, 1), weights=np.repeat(support[..., None], 3, 2))
    if support is not glyph:
        beneath = _contrasting(beneath, rng)
        patch += support[..., None] * (beneath - patch)
    patch += glyph[..., None] * (_contrasting(beneath, rng) - patch)


def _contrasting(beneath: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A random colour whose luminance differs enough from the colour beneath."""
    while True:  # a third of all colours at least will do
        colour = rng.random(3)
        if abs((colour - beneath) @ _LUMA) >= MIN_CONTRAST:
            return colour


def mask_box(mask: Mask) -> list[int]:
    """x, y, width, height of the pixels that are True; there must be one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


# ------------------------------------------------------------------------------------- annotations


def _header(recipe: Recipe) -> dict[str, Any]:
    categories: list[dict[str, Any]] = [
        {"id": number + 1, "name": name, "supercategory": "digit"}
        for number, name in enumerate(recipe.class_names)
    ]
    return {
        "info": {
            "description": "Handwritten digits on photographs, made by codetr from scikit-learn's "
            "load_digits and load_sample_images; photographs by danielbuechele and vultilion",
            "version": recipe.folder_name,
        },
        "licenses": [
            {"id": 1, "name": "CC BY 2.0", "url": "https://creativecommons.org/licenses/by/2.0/"}
        ],
        "categories": categories,
        "images": [],
        "annotations": [],
    }


def _annotate(
    content: dict[str, Any],
    image: dict[str, Any],
    scene: Scene,
    recipe: Recipe,
    rng: np.random.Generator,
) -> None:
    """Add an image and its objects."""
    hidden = None
    if recipe.lvis:
        hidden = _federate(image, scene, len(recipe.class_names), rng)
    content["images"].append(image | {"license": 1})
    for number, (label, mask) in enumerate(zip(scene.labels, scene.masks, strict=True)):
        if number == hidden:
            continue
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        box = mask_box(mask)
        annotation = {
            "id": len(content["annotations"]) + 1,
            "image_id": image["id"],
            "category_id": label + 1,
            "bbox": box,
            # The box's, not the ink's: COCO's bound of small and medium, 32², falls among them.
            "area": box[2] * box[3],
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }
        # LVIS has no crowds, and no such key.
        content["annotations"].append(annotation if recipe.lvis else annotation | {"iscrowd": 0})


def _federate(
    image: dict[str, Any], scene: Scene, classes: int, rng: np.random.Generator
) -> int | None:
    """Name classes known to be absent; hide one instance of a class that has several.

    Returns:
        The number of the hidden object; its class is then not exhaustively annotated.
    """
    absent = [label for label in range(classes) if label not in scene.labels]
    chosen = rng.choice(absent, 4, replace=False)
    image["neg_category_ids"] = sorted(int(label) + 1 for label in chosen)
    several = [i for i, label in enumerate(scene.labels) if scene.labels.count(label) > 1]
    hidden = int(rng.choice(several)) if several and rng.random() < 0.5 else None
    image["not_exhaustive_category_ids"] = [] if hidden is None else [scene.labels[hidden] + 1]
    return hidden


def _frequencies(content: dict[str, Any]) -> list[dict[str, Any]]:
    """LVIS's counts by category, and its group: rare up to 10 images, common up to 100."""
    images: dict[int, list[int]] = {category["id"]: [] for category in content["categories"]}
    for annotation in content["annotations"]:
        images[annotation["category_id"]].append(annotation["image_id"])
    counts = [(len(set(owners)), len(owners)) for owners in images.values()]
    return [
        {
            "image_count": n,
            "instance_count": m,
            "frequency": "r" if n <= 10 else "c" if n <= 100 else "f",
        }
        for n, m in counts
    ]
