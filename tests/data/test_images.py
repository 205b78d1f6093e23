"""Every kind of image file arrives as the same 8-bit RGB; a broken one is named."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codetr.data import DataError
from codetr.data.images import read_image

RED = (200, 40, 10)
ORIENTATION = 0x0112


@pytest.fixture
def photo() -> Image.Image:
    """20×10, the left half red, the right half white."""
    pixels = np.full((10, 20, 3), 255, np.uint8)
    pixels[:, :10] = RED
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("YCbCr", "jpg"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
    ],
)
def test_colour_modes(tmp_path: Path, photo: Image.Image, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    photo.convert(mode).save(path, **({"quality": 100} if suffix in {"jpg", "webp"} else {}))
    pixels = read_image(path, (10, 20))
    assert pixels.shape == (10, 20, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[5, 4].astype(int) - RED).max() <= 12
    assert pixels[5, 15].min() >= 240


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("LA", "png")])
def test_grey(tmp_path: Path, photo: Image.Image, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    photo.convert(mode).save(path)
    expected = np.asarray(photo.convert("L").convert("RGB")).astype(int)
    assert np.abs(read_image(path) - expected).max() <= 4


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_contrast(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 256 * 7, 256 * 100 + 3, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}")[0, :, 0].tolist() == [0, 7, 100, 255]


def test_palette_with_transparency(tmp_path: Path, photo: Image.Image) -> None:
    palette = photo.convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "a.png")
    assert np.abs(pixels[5, 4].astype(int) - RED).max() <= 30


def test_rotated_photograph_is_turned(tmp_path: Path, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    photo.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png", (20, 10))
    assert pixels.shape == (20, 10, 3)
    assert pixels[4, 5].tolist() == list(RED)
    assert pixels[15, 5].tolist() == [255, 255, 255]


def test_rotated_photograph_with_annotations_on_stored_pixels(
    tmp_path: Path, photo: Image.Image
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png", (10, 20)) == np.asarray(photo)).all()


def test_other_size_than_annotated(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is 20×10 pixels.*for 21×10"):
        read_image(tmp_path / "a.png", (10, 21))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: no such image file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be decoded \(.*replace"):
        read_image(path)


@pytest.mark.parametrize("text", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_no_image_at_all(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.png").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        read_image(tmp_path / "a.png")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "a.tif")
