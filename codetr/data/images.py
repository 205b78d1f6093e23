"""Image files of every kind as 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from codetr.data.errors import DataError

Size = tuple[int, int]
"""(height, width) in pixels."""


def read_image(path: Path, size: Size | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image file: grey, palette, CMYK, 16-bit, with or without alpha.

    Args:
        path: the file.
        size: what the annotations say; None accepts any. A photograph whose EXIF data ask for a
            rotation is turned, unless the annotations were made on the pixels as they are stored.

    Raises:
        DataError: the file is missing, cannot be decoded, or has another size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as stored:
                stored.load()
                pixels = np.array(_rgb(_upright(stored, size)))  # its own, writable
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace the file") from None
    if size is not None and pixels.shape[:2] != tuple(size):
        raise DataError(
            f"{path}: is {pixels.shape[1]}×{pixels.shape[0]} pixels, but its annotations are for "
            f"{size[1]}×{size[0]}; correct its 'width' and 'height', and its boxes with them"
        )
    return pixels


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image in memory, of any mode; turned as its EXIF data ask.

    Raises:
        DataError: its pixels are floating-point numbers.
    """
    try:
        return np.array(_rgb(_upright(image, None)))
    except ValueError as error:
        raise DataError(f"an image of mode {image.mode}: {error}") from None


def _upright(image: Image.Image, size: Size | None) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    as_stored = size is not None and upright.size != size[::-1] and image.size == size[::-1]
    return image if as_stored else upright


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.asarray(image)
        return Image.fromarray(
            (values >> 8 if values.max() > 255 else values).astype(np.uint8)
        ).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
