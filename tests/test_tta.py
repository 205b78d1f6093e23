"""Test-time augmentation: views of an image, and what is found in them put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_soft_nms import overlap, random_detections
from tiny_training import tiny_detector
from torch import Tensor

from codetr.config import ConfigError, DataConfig, JitterConfig
from codetr.data import open_dataset
from codetr.data.digits import make_digits
from codetr.detector import CoDETR
from codetr.structures import Detections, ImageBatch
from codetr.tta import TTA, View, merged
from codetr.weights import Weights, save_weights
from orchestrator.use import augmentation, evaluate_checkpoint

RESIZED = DataConfig(short_sides=(48,), max_side=80)
AS_THEY_ARE = DataConfig(short_sides=())
ON_CANVAS = DataConfig(jitter=JitterConfig(enabled=True, canvas=80))
DATA = pytest.mark.parametrize("data", [RESIZED, AS_THEY_ARE], ids=["resized", "as they are"])


def detector(data: DataConfig = RESIZED, **options: Any) -> CoDETR:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", **options)).eval()
    model.data = data
    return model


class Lamps(CoDETR):
    """Finds the lit rectangle, wherever it is and however large: what a perfect detector does."""

    def detect(self, batch: ImageBatch, *_: Any) -> list[Detections]:
        found = []
        for pixels, (height, width) in zip(batch.pixels, batch.sizes, strict=True):
            lit = pixels[0, :height, :width] > 0
            rows, columns = lit.any(dim=1).nonzero(), lit.any(dim=0).nonzero()
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.append(
                Detections(torch.tensor([box]).float(), torch.tensor([0.9]), torch.tensor([2]))
            )
        return found


def lamp(box: Sequence[int], width: int = 120, height: int = 80) -> Tensor:
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    return image


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=draw, dtype=torch.uint8)


def mirrored(found: Detections, width: int) -> Detections:
    x1, y1, x2, y2 = found.boxes.unbind(-1)
    return replace(found, boxes=torch.stack((width - x2, y1, width - x1, y2), dim=-1))


@DATA
@pytest.mark.parametrize("dino", [False, True], ids=["one-stage", "dino"])
def test_a_single_view_is_what_the_detector_finds(data: DataConfig, dino: bool) -> None:
    model = detector(data, dino=dino)
    images = [noise(48, 64), noise(64, 48, 1), noise(48, 64, 2)]
    plain = model.predict(images)
    alone = model.predict(images, tta=TTA((1.0,), flip=False))
    for one, other in zip(plain, alone, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    "data", [RESIZED, AS_THEY_ARE, ON_CANVAS], ids=["resized", "as they are", "on a canvas"]
)
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0), (0.75, 1.0, 1.25), (2.0,)])
def test_views_of_a_perfect_detector_agree(data: DataConfig, scales: tuple[float, ...]) -> None:
    """In every view the lamp is found where the view has it: there is one lamp, in one place."""
    model = Lamps(tiny_detector()).eval()
    model.data = data
    boxes = [(10, 20, 50, 60), (70, 4, 118, 76), (0, 0, 30, 30)]
    images = [lamp(boxes[0]), lamp(boxes[1]), lamp(boxes[2], width=40, height=160)]
    for found, box in zip(model.predict(images, tta=TTA(scales, flip=True)), boxes, strict=True):
        assert len(found) == 1
        # Resizing blurs the edges by a pixel of the smaller image.
        exact = scales == (1.0,) and data is AS_THEY_ARE
        torch.testing.assert_close(
            found.boxes[0], torch.tensor(box).float(), rtol=0, atol=1e-4 if exact else 4
        )
        assert found.scores.tolist() == pytest.approx([0.9])
        assert found.labels.tolist() == [2]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(48, 64), (64, 48), (40, 60)]), st.integers(0, 99), st.booleans())
def test_a_mirrored_image_has_mirrored_detections(
    size: tuple[int, int], seed: int, resized: bool
) -> None:
    """Whatever the detector: it is shown the same views of both."""
    model, tta = detector(RESIZED if resized else AS_THEY_ARE), TTA((1.0, 1.25), flip=True)
    image = noise(*size, seed)
    (here,), (there,) = (model.predict([one], tta=tta) for one in (image, image.flip(-1)))
    back = mirrored(there, size[1])
    assert len(here) == len(back) > 0
    torch.testing.assert_close(here.scores, back.scores, rtol=1e-5, atol=1e-6)
    gaps = (here.scores[:-1] - here.scores[1:]) > 1e-5
    clear = torch.cat((torch.tensor([True]), gaps)) & torch.cat((gaps, torch.tensor([True])))
    torch.testing.assert_close(here.boxes[clear], back.boxes[clear], rtol=1e-4, atol=1e-2)
    assert torch.equal(here.labels[clear], back.labels[clear])
    (plain,), (other,) = (model.predict([one]) for one in (image, image.flip(-1)))
    assert not torch.allclose(plain.scores, other.scores, atol=1e-5), "of itself it does not"


@DATA
def test_the_sizes_that_the_detector_sees(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    detect = CoDETR.detect

    def spy(self: CoDETR, batch: ImageBatch, *rest: Any) -> list[Detections]:
        seen.append(tuple(batch.pixels.shape))
        return detect(self, batch, *rest)

    monkeypatch.setattr(CoDETR, "detect", spy)
    detector(data).predict([noise(96, 128), noise(96, 128, 1)], tta=TTA((0.5, 1.0, 1.5), flip=True))
    sides = (
        [(24, 32), (48, 64), (72, 96)] if data.short_sides else [(48, 64), (96, 128), (144, 192)]
    )
    assert seen == [(2, 3, *side) for side in sides for _ in range(2)]
    seen.clear()
    detector(data).predict([noise(40, 160)], tta=TTA((0.5,), flip=False))  # max_side is scaled, too
    assert seen == [(1, 3, 10, 40) if data.short_sides else (1, 3, 20, 80)]
    seen.clear()
    detector(ON_CANVAS).predict([noise(96, 128)], tta=TTA((0.5, 1.0), flip=False))
    assert seen == [(1, 3, 40, 40), (1, 3, 80, 80)]


def test_mirrored_if_training_has_mirrored() -> None:
    def views(flip: bool | None, trained: float) -> list[tuple[float, bool]]:
        tta = TTA((1.0, 2.0), flip)
        return [(v.scale, v.mirrored) for v in tta.views(DataConfig(flip=trained))]

    without, both = [(1, False), (2, False)], [(1, False), (1, True), (2, False), (2, True)]
    assert views(None, 0.0) == views(False, 0.5) == without
    assert views(None, 0.5) == views(True, 0.0) == both


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.5, 0.75, 1.0, 1.3, 2.0]))
def test_a_box_of_a_view_is_put_back(height: int, width: int, scale: float) -> None:
    """By hand: the box of the whole left half."""
    view = View(scale, True, AS_THEY_ARE)
    shown = view.show(noise(height, width))
    inside = (shown.shape[1], shown.shape[2])
    half = Detections(
        torch.tensor([[inside[1] / 2, 0, inside[1], inside[0]]]), torch.ones(1), torch.zeros(1)
    )
    back = view.in_image(half, inside, (height, width)).boxes[0]
    torch.testing.assert_close(back, torch.tensor([0, 0, width / 2, height]))


def plain_loop(found: list[Detections], iou: float) -> list[tuple[int, list[float]]]:
    """(index, voted box) pair by pair, of the detections laid end to end."""
    boxes = [box for each in found for box in each.boxes]
    scores = [float(score) for each in found for score in each.scores]
    labels = [int(label) for each in found for label in each.labels]
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    while left:
        best, *left = left
        near = [
            i
            for i in range(len(boxes))
            if labels[i] == labels[best] and overlap(boxes[i], boxes[best]) >= iou
        ]
        total = sum(scores[i] for i in near)
        kept.append((best, (sum(scores[i] * boxes[i] for i in near) / total).tolist()))
        left = [i for i in left if i not in near]
    return kept


@settings(deadline=None)
@given(
    views=st.lists(
        st.builds(random_detections, st.integers(0, 8), st.integers(1, 2), st.integers(0, 1000)),
        min_size=2,
        max_size=4,
    ),
    iou=st.sampled_from([0.2, 0.5, 0.65, 0.9]),
    keep=st.sampled_from([1, 3, 100]),
)
def test_merging_is_the_plain_loop(views: list[Detections], iou: float, keep: int) -> None:
    found = merged(views, iou=iou, keep=keep)
    expected = plain_loop(views, iou)[:keep]
    index = torch.tensor([i for i, _ in expected], dtype=torch.int64)
    assert torch.equal(found.scores, torch.cat([each.scores for each in views])[index])
    assert torch.equal(found.labels, torch.cat([each.labels for each in views])[index])
    boxes = torch.tensor([box for _, box in expected]).reshape(-1, 4)
    torch.testing.assert_close(found.boxes, boxes, rtol=1e-5, atol=1e-4)


def test_what_is_empty_stays_finite() -> None:
    point = Detections(torch.tensor([[5.0, 5, 5, 5]]), torch.zeros(1), torch.zeros(1).long())
    found = merged([point, point], iou=0.5, keep=10)
    assert found.boxes.unique().tolist() == [5]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    assert len(merged([nothing, nothing], iou=0.5, keep=10)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"scales": ()},
        {"scales": (0.0,)},
        {"scales": (-1.0, 1.0)},
        {"scales": (float("nan"),)},
        {"scales": (float("inf"),)},
        {"scales": (1.0, 1.0)},
        {"iou": 0.0},
        {"iou": 1.5},
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tta: "):
        TTA(**options)


# ------------------------------------------------------------------------------------ codetr eval


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tta") / "digits"
    return make_digits(folder, train_images=1, val_images=12, size=64)


@pytest.fixture(scope="module")
def model(digits: Path) -> Path:
    data = DataConfig(path=digits, short_sides=(), flip=0)
    classes = open_dataset(data, "val").classes
    torch.manual_seed(0)
    config = tiny_detector("atss").model_copy(update={"num_classes": len(classes)})
    file = digits.parent / "model.safetensors"
    save_weights(Weights(CoDETR(config).state_dict(), config, data, classes), file)
    return file


def test_eval_of_a_single_view_is_eval_without(digits: Path, model: Path) -> None:
    for branch in ("query", "atss"):
        plain = evaluate_checkpoint(str(model), str(digits), branch=branch)
        alone = evaluate_checkpoint(str(model), str(digits), branch=branch, tta=TTA((1.0,)))
        assert alone.summary == pytest.approx(plain.summary, nan_ok=True)
        assert alone.per_class == pytest.approx(plain.per_class, nan_ok=True)


def test_eval_of_several_views_is_another_one(digits: Path, model: Path) -> None:
    """And batches change nothing."""
    plain = evaluate_checkpoint(str(model), str(digits))
    tta = TTA((1.0, 1.5), flip=True)
    many = [evaluate_checkpoint(str(model), str(digits), tta=tta, batch_size=n) for n in (1, 5)]
    assert many[0].summary == pytest.approx(many[1].summary, nan_ok=True, abs=1e-4)
    assert many[0].summary != pytest.approx(plain.summary, nan_ok=True, abs=1e-6)


def test_options_of_the_command() -> None:
    assert augmentation(False, None, None) is None
    assert augmentation(True, None, None) == TTA()
    assert augmentation(True, "0.5, 1", False) == TTA((0.5, 1.0), False)
    for options, message in (
        ((False, "1", None), "--scales is of --tta"),
        ((False, None, False), "--flip is of --tta"),
        ((True, "1;2", None), "--scales 1;2: give factors"),
        ((True, "0", None), "positive factors"),
    ):
        with pytest.raises(ConfigError, match=message):
            augmentation(*options)
