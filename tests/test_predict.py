"""``CoDETR.predict``: images of any kind and size, each as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_training import tiny_detector

from codetr import CoDETR, Detections
from codetr.config import DataConfig
from codetr.data import DataError
from codetr.inference import AHEAD, pixels_of

SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))


def detector(**options: Any) -> CoDETR:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", **options)).eval()
    model.data = DataConfig(short_sides=(48,), max_side=80)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["one-stage", "dino"])
def model(request: pytest.FixtureRequest) -> CoDETR:
    return detector(two_stage=request.param, dino=request.param)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one: Detections, other: Detections) -> None:
    """Sorted by score, which batches compute to the last bit or two."""
    assert len(one) == len(other)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
    clear = torch.ones(len(one), dtype=torch.bool)
    gaps = one.scores[:-1] - one.scores[1:]
    clear[:-1] &= gaps > 1e-4
    clear[1:] &= gaps > 1e-4  # near ties may change places
    assert clear.float().mean() > 0.3
    torch.testing.assert_close(one.boxes[clear], other.boxes[clear], rtol=1e-3, atol=5e-2)
    assert torch.equal(one.labels[clear], other.labels[clear])


@settings(max_examples=25)
@given(st.lists(SHAPES, min_size=1, max_size=7), st.integers(1, 4))
def test_many_images_are_each_as_if_alone(shapes: list[tuple[int, int]], batch_size: int) -> None:
    model = detector()
    images = [image(*shape, seed) for seed, shape in enumerate(shapes)]
    together = model.predict(images, batch_size=batch_size)
    assert len(together) == len(images)
    for one, found in zip(images, together, strict=True):
        assert_same(found, model.predict([one])[0])
        height, width = one.shape[:2]
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all()


def test_images_of_one_size_share_batches(model: CoDETR, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, tuple[int, int]]] = []
    detect = CoDETR.detect

    def spy(self: CoDETR, batch: Any, *rest: Any) -> list[Detections]:
        batches.append((len(batch), tuple(batch.pixels.shape[-2:])))  # type: ignore[arg-type]
        assert batch.sizes == [tuple(batch.pixels.shape[-2:])] * len(batch)  # nothing is padded
        return detect(self, batch, *rest)

    monkeypatch.setattr(CoDETR, "detect", spy)
    frames = [image(48, 64, n) for n in range(5)]
    others = [image(64, 48, n) for n in range(3)]
    mixed = [frames[0], others[0], frames[1], others[1], frames[2], others[2], *frames[3:]]
    model.predict(mixed, batch_size=2)
    assert AHEAD * 2 >= 8
    assert sorted(batches) == sorted(
        [(2, (48, 64)), (2, (48, 64)), (1, (48, 64)), (2, (64, 48)), (1, (64, 48))]
    )


def test_every_kind_of_image_is_the_same_image(model: CoDETR, tmp_path: Path) -> None:
    array = image(40, 60)
    Image.fromarray(array).save(tmp_path / "image.png")
    kinds = [
        array,
        Image.fromarray(array),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    pixels = [pixels_of(kind) for kind in kinds]
    assert all(torch.equal(one, pixels[0]) for one in pixels)
    assert pixels[0][:, 3, 5].tolist() == array[3, 5].tolist()  # red, green, blue
    for found in model.predict(kinds):
        assert_same(found, model.predict([array])[0])


def test_grey_and_upside_down_images(tmp_path: Path) -> None:
    grey = image(10, 20)[..., 0]
    assert torch.equal(pixels_of(grey), pixels_of(np.stack([grey] * 3, -1)))
    assert torch.equal(pixels_of(Image.fromarray(grey)), pixels_of(grey))
    turned = Image.fromarray(image(10, 20))
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert pixels_of(tmp_path / "turned.jpg").shape == (3, 20, 10)
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert pixels_of(opened).shape == (3, 20, 10)


def test_an_array_is_not_changed_nor_kept(model: CoDETR) -> None:
    array = image(40, 60)[:, ::-1]  # strides that torch does not have
    before = array.copy()
    model.predict([array])
    assert np.array_equal(array, before)
    frozen = image(40, 60)
    frozen.flags.writeable = False
    model.predict([frozen])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), r"\(4, 5, 3\) of float32: it must be \(H, W, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\) of uint8: it must be \(H, W, 3\)"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\) of uint8"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"\(4, 5, 3\) of torch.uint8: .*\(3, H, W\)"),
        (torch.zeros(3, 4, 5), r"of torch.float32"),
        (np.zeros((0, 5, 3), np.uint8), r"0×5 pixels: it is empty"),
        ("/nowhere/a.jpg", r"/nowhere/a.jpg: no such image file"),
        (Image.new("F", (3, 3)), r"mode F"),
        (7, r"an image is a int"),
    ],
)
def test_what_is_no_image(bad: Any, message: str, model: CoDETR) -> None:
    with pytest.raises(DataError, match=message):
        model.predict([image(4, 4), bad])


@pytest.mark.parametrize("kind", ["array", "path", "pil", "tensor"])
def test_a_single_image_is_no_list(kind: str, model: CoDETR) -> None:
    array = image(4, 4)
    single = {
        "array": array,
        "path": "a.jpg",
        "pil": Image.fromarray(array),
        "tensor": torch.from_numpy(array),
    }
    with pytest.raises(TypeError, match=r"write model\.predict\(\[image\]\)"):
        model.predict(single[kind])  # type: ignore[arg-type]


def test_nothing_in_nothing_out(model: CoDETR) -> None:
    assert model.predict([]) == []


def test_images_may_come_one_by_one(model: CoDETR) -> None:
    images = [image(40, 60, n) for n in range(9)]
    found = model.predict((one for one in images), batch_size=2)
    for one, other in zip(found, model.predict(images, batch_size=9), strict=True):
        assert_same(one, other)


def test_bf16_finds_nearly_the_same(model: CoDETR) -> None:
    images = [image(48, 64, n) for n in range(2)]
    exact = model.predict(images)
    rough = model.predict(images, precision="bf16")
    for one, other in zip(exact, rough, strict=True):
        assert other.boxes.dtype == torch.float32
        assert other.scores.isfinite().all()
        assert float(other.scores[0]) == pytest.approx(float(one.scores[0]), abs=0.05)
    assert not torch.equal(exact[0].scores, rough[0].scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    images = [image(48, 64), image(30, 30)]
    on_cpu = detector().predict(images)
    model = detector().to("cuda")
    for one, other in zip(model.predict(images), on_cpu, strict=True):
        assert other.boxes.device.type == "cpu"
        assert_same(one, other)


def test_a_model_in_training_stays_in_training() -> None:
    model = detector().train()
    found = model.predict([image(40, 60)])
    assert model.training
    assert_same(found[0], model.eval().predict([image(40, 60)])[0])


def test_an_auxiliary_branch(model: CoDETR) -> None:
    assert len(model.predict([image(40, 60)], branch="atss")[0]) > 0
    with pytest.raises(ValueError, match="no branch 'atts'"):
        model.predict([image(40, 60)], branch="atts")
