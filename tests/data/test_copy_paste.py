"""Copy-paste against a slow rendition, pixel by pixel and object by object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import content, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import masks_to_boxes

from codetr.config import ConfigError, CopyPasteConfig, DataConfig, parse
from codetr.data import DataError, build_loader, open_dataset
from codetr.data.canvas import Canvas
from codetr.data.copy_paste import CopyPaste, box_masks
from codetr.data.digits import make_digits

SIDE = 32
CANVAS = Canvas(SIDE, torch.tensor([0.1, 0.2, 0.3]), masked=False)
EDGES = torch.tensor([0, 0, 1, 1])


def copy_paste(**more: Any) -> CopyPaste:
    return CopyPaste(CopyPasteConfig(enabled=True, **more), CANVAS)


def sample(seed: int, count: int, height: int = SIDE, width: int = SIDE, first: int = 0) -> Any:
    """Noise with ellipses; labels count from ``first``, so that they tell the objects apart."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask in masks:
        y, x, a, b = torch.rand(4, generator=draw) * torch.tensor([height, width, 8, 8])
        mask[((rows - y) / (a + 1)) ** 2 + ((columns - x) / (b + 1)) ** 2 <= 1] = 1
        mask[int(min(y, height - 1)), int(min(x, width - 1))] = 1
    return torch.rand(3, height, width, generator=draw), {
        "boxes": (masks_to_boxes(masks) + EDGES).float(),
        "labels": torch.arange(first, first + count),
        "masks": masks,
    }


def on_canvas(pixels: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    whole = CANVAS.colour[:, None, None].repeat(1, SIDE, SIDE)
    whole[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    held = torch.zeros(len(masks), SIDE, SIDE, dtype=torch.bool)
    held[:, : masks.shape[1], : masks.shape[2]] = masks.bool()
    return whole, held


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    counts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    size=st.tuples(st.integers(8, SIDE), st.integers(8, SIDE)),
    tolerance=st.sampled_from([0, 64, 200]),
    visible=st.sampled_from([0, 20_000, 100_000]),
)
def test_what_is_pasted_hides_what_was_there(
    seed: int,
    counts: tuple[int, int],
    size: tuple[int, int],
    tolerance: float,
    visible: float,
) -> None:
    onto, source = sample(seed, counts[0], *size), sample(seed + 1, counts[1], first=100)
    paste = copy_paste(box_tolerance=tolerance, min_visible=visible)
    torch.manual_seed(seed)
    pixels, found = paste(onto, source)

    below, below_masks = on_canvas(onto[0], onto[1]["masks"])
    above, above_masks = on_canvas(source[0], source[1]["masks"])
    pasted = [label - 100 for label in found["labels"].tolist() if label >= 100]
    covered = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for number in pasted:
        covered |= above_masks[number]
    expected = below.clone()
    expected[:, covered] = above[:, covered]
    assert torch.equal(pixels, expected)

    # The settings are pixels of a canvas of 1024, which is 32 times as wide.
    kept, masks = [], []
    for number, mask in enumerate(below_masks):
        left = mask & ~covered
        if not left.any():
            continue
        box = masks_to_boxes(left[None])[0] + EDGES
        near = bool(((box - onto[1]["boxes"][number]).abs() <= tolerance / 32).all())
        if near or left.sum() > visible / 32**2:
            kept.append(number)
            masks.append(left)
    assert found["labels"].tolist() == kept + [100 + number for number in pasted]
    masks += [above_masks[number] for number in pasted]
    assert torch.equal(found["masks"], torch.stack(masks) if masks else torch.zeros(0, SIDE, SIDE))
    assert torch.equal(found["boxes"], masks_to_boxes(found["masks"]) + EDGES)


def test_how_many_is_uniform_up_to_the_most() -> None:
    onto, source = sample(0, 2), sample(1, 5, first=100)
    torch.manual_seed(0)
    for most, highest in ((100, 5), (3, 3)):
        paste = copy_paste(max_objects=most)
        numbers, chosen = torch.zeros(6), torch.zeros(5)
        for _ in range(600):
            labels = paste(onto, source)[1]["labels"]
            pasted = labels[labels >= 100] - 100
            assert len(pasted.unique()) == len(pasted)
            numbers[len(pasted)] += 1
            chosen[pasted] += 1
        share = 600 / (highest + 1)
        assert numbers[: highest + 1].tolist() == pytest.approx([share] * (highest + 1), rel=0.35)
        assert not numbers[highest + 1 :].any()
        assert chosen.tolist() == pytest.approx([chosen.mean().item()] * 5, rel=0.2)


def test_boxes_are_pasted_whole_where_there_are_no_masks() -> None:
    onto, source = sample(3, 3), sample(4, 4, first=100)
    plain = [(pixels, {k: objects[k] for k in ("boxes", "labels")}) for pixels, objects in (
        onto, source)]  # fmt: skip
    paste = copy_paste(shapes="boxes")
    for seed in range(10):
        torch.manual_seed(seed)
        pixels, found = paste(*plain)
        assert set(found) == {"boxes", "labels"}
        pasted = found["labels"] >= 100
        expected = onto[0].clone()
        for left, top, right, bottom in found["boxes"][pasted].int().tolist():
            expected[:, top:bottom, left:right] = source[0][:, top:bottom, left:right]
        assert torch.equal(pixels, expected)
        assert torch.equal(
            found["boxes"][pasted], source[1]["boxes"][found["labels"][pasted] - 100]
        )


def test_a_box_that_nothing_covers_keeps_its_fractions() -> None:
    boxes = torch.tensor([[1.5, 2.25, 9.75, 9.5]])
    onto = (torch.rand(3, SIDE, SIDE), {"boxes": boxes, "labels": torch.tensor([0])})
    far = torch.tensor([[20.0, 20, 30, 30]])
    source = (torch.rand(3, SIDE, SIDE), {"boxes": far, "labels": torch.tensor([1])})
    torch.manual_seed(1)
    _, found = copy_paste(shapes="boxes")(onto, source)
    assert torch.equal(found["boxes"], torch.cat((boxes, far))), "pasted, with this seed"
    assert box_masks(boxes, SIDE)[0].sum() == 9 * 8


# --------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    return make_digits(folder, train_images=12, val_images=2, size=64)


def config(path: Path, **more: Any) -> DataConfig:
    settings = {
        "path": path,
        "jitter": {"enabled": True, "canvas": 64, "scale": [0.5, 1.5]},
        "copy_paste": {"enabled": True, "box_tolerance": 0, "min_visible": 0},
        "flip": 0,
    }
    return parse(DataConfig, settings | more, "test.yaml")


def test_an_image_depends_on_seed_epoch_and_itself_alone(digits: Path) -> None:
    def everything(seed: int, epoch: int) -> list[tuple[Any, ...]]:
        dataset = open_dataset(config(digits), "train", seed=seed)
        dataset.set_epoch(epoch)
        return [
            (p.double().sum().item(), t.boxes.tolist(), t.labels.tolist())
            for p, t in (dataset[i] for i in range(len(dataset)))
        ]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = everything(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert everything(0, 1) == first
    assert everything(0, 2) != first
    assert everything(1, 1) != first


def test_masks_are_given_to_those_who_ask(digits: Path) -> None:
    dataset = open_dataset(config(digits), "train", masks=True)
    more = 0
    for index in range(len(dataset)):
        pixels, targets = dataset[index]
        assert pixels.shape == (3, 64, 64)
        assert targets.masks is not None
        assert torch.equal(targets.boxes, masks_to_boxes(targets.masks) + EDGES)
        more += len(targets) - (dataset.table.starts[index + 1] - dataset.table.starts[index])
    assert more > 0, "objects came from elsewhere"
    without = open_dataset(config(digits), "train")
    assert without[0][1].masks is None
    assert torch.equal(without[0][0], dataset[0][0])
    val = open_dataset(config(digits), "val")
    assert val.copy_paste is None
    assert val.table.masks is None
    assert len(list(build_loader(without, 4, training=True))) == 3


def test_data_without_masks_is_refused(tmp_path: Path) -> None:
    write(tmp_path, content())
    with pytest.raises(DataError, match=r"no object has a 'segmentation', .*copy_paste.enabled"):
        open_dataset(config(tmp_path), "train")
    by_box = config(tmp_path, copy_paste={"enabled": True, "shapes": "boxes"})
    assert len(open_dataset(by_box, "train")) == 4
    with pytest.raises(ConfigError, match=r"set data\.copy_paste\.shapes=masks"):
        open_dataset(by_box, "train", masks=True)


def test_there_must_be_a_canvas_that_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set jitter\.enabled=true"):
        config(tmp_path, jitter={})
    with pytest.raises(ConfigError, match=r"set jitter\.padding_mask=false"):
        config(tmp_path, jitter={"enabled": True, "padding_mask": True})
