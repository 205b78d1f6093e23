"""Training on a canvas, with pasted objects, repeats and federated loss; left, and evaluated."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import MASK_RCNN, tiny_detector, tiny_training

from codetr.config import DataConfig, parse
from codetr.data import CocoDataset, build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.structures import ImageBatch
from codetr.training import TrainingState, evaluate, train_epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = make_digits(
        tmp_path_factory.mktemp("data") / "digits",
        lvis=True,
        train_images=12,
        val_images=4,
        size=64,
    )
    settings = {
        "path": folder,
        "jitter": {"enabled": True, "canvas": 64, "scale": [0.5, 1.5]},
        "copy_paste": {"enabled": True},
        "repeat_threshold": 0.5,
    }
    return parse(DataConfig, settings, "test")


def start(data: DataConfig, dataset: CocoDataset) -> TrainingState:
    detector = tiny_detector(
        MASK_RCNN,
        kind="dino",
        num_classes=len(dataset.classes),
        query_loss={"federated": {"enabled": True, "classes": 8}},
    )
    return TrainingState.start(
        detector,
        tiny_training(batch_size=3),
        data,
        dataset.classes,
        seed=7,
        steps_per_epoch=4,
        device=torch.device("cpu"),
        class_images=dataset.table.class_images().tolist(),
    )


def weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in state.model.state_dict().values()])


def test_an_epoch_that_was_left_ends_with_the_same_bits(data: DataConfig) -> None:
    dataset = open_dataset(data, "train", masks=True)
    whole, parted = start(data, dataset), start(data, dataset)

    def loader(state: TrainingState, **more: int) -> torch.utils.data.DataLoader:
        return build_loader(
            dataset, 3, training=True, seed=7, epoch=state.epoch + 1, taken=state.taken, **more
        )

    report = train_epoch(whole, loader(whole))
    assert report is not None
    assert report.steps == 4
    assert math.isfinite(report.total)
    assert report.losses["mask_rcnn/mask"] > 0
    assert train_epoch(parted, loader(parted), leave=lambda step: step == 2) is None
    assert parted.taken == 2
    assert train_epoch(parted, loader(parted, workers=1)) is not None
    assert torch.equal(weights(whole), weights(parted))


def test_evaluation_and_prediction_see_the_whole_canvas(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(data, "val")
    model = start(data, dataset).model.eval()
    model.data = data
    seen: list[ImageBatch] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda batch: seen.append(batch) or encode(batch))
    result = evaluate(model, build_loader(dataset, 2, training=False), dataset)
    wide = torch.randint(256, (3, 20, 90), dtype=torch.uint8)
    (found,) = model.predict([wide])
    for batch in seen:
        assert batch.pixels.shape[1:] == (3, 64, 64)
        assert batch.sizes == [(64, 64)] * len(batch)
        assert not encode(batch).padding.any()
    assert seen[-1].contents == [(14, 64)]
    for detections, (width, height) in (
        *((d, (64, 64)) for d in result.detections.values()),
        (found, (90, 20)),
    ):
        assert len(detections)
        assert (detections.boxes >= 0).all()
        assert (detections.boxes[:, 2] <= width).all()
        assert (detections.boxes[:, 3] <= height).all()
