"""The exponential moving average of the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny_training import CLASSES, start, tiny_batch, tiny_detector, tiny_training
from torch import Tensor

from codetr.analysis.frame import Subject
from codetr.averaging import decay_after
from codetr.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from codetr.config import TrainingConfig
from codetr.detector import CoDETR
from codetr.training import TrainingState, train_epoch
from codetr.weights import load_weights

DETECTOR = tiny_detector("atss", frozen_norm=False)
PLAIN = {"learning_rate": 1e-3}
AVERAGED = {**PLAIN, "ema": 0.8, "ema_warmup": 5}
STEPS = 3


def begin(settings=AVERAGED) -> TrainingState:
    return start(DETECTOR, tiny_training(**settings), STEPS)


def batches(epoch):
    ids = [[100 * epoch + 4 * step + i for i in range(4)] for step in range(STEPS)]
    return [tiny_batch(i, [3, 1, 0, 2]) for i in ids]


def train(state, until=2, **options):
    while state.epoch < until:
        if train_epoch(state, batches(state.epoch + 1)[state.taken :], **options) is None:
            break
    return state


def copy_of(model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def whole() -> TrainingState:
    return train(begin())


@pytest.mark.parametrize("warmup", [0, 5])
def test_is_the_weighted_sum_of_the_weights_after_each_step(warmup):
    """By hand: step t has share 1 - d(t) times all later decays; the first step has all of it."""
    state = begin({**AVERAGED, "ema_warmup": warmup})
    history: list[dict[str, Tensor]] = []
    train(state, on_step=lambda _: history.append(copy_of(state.model)))
    steps = len(history)
    assert steps == 2 * STEPS
    decays = [0.8 * (1 - (math.exp(-t / warmup) if warmup else 0)) for t in range(1, steps + 1)]
    shares = [(1 - decays[t] if t else 1.0) * math.prod(decays[t + 1 :]) for t in range(steps)]
    assert sum(shares) == pytest.approx(1)
    learned = {name for name, _ in state.model.named_parameters()}
    for name, value in state.evaluated.state_dict().items():
        if name in learned:
            expected = sum(
                s * weights[name].double() for s, weights in zip(shares, history, strict=True)
            )
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
        else:  # buffers are the model's own: statistics, counters, indices
            assert torch.equal(value, history[-1][name]), name
    moved = [n for n in learned if not torch.equal(history[0][n], history[-1][n])]
    assert moved
    assert any(not torch.equal(state.evaluated.state_dict()[n], history[-1][n]) for n in moved)


def test_decay_is_the_originals():
    """The share that mmdetection's hook takes of the weights at its iteration t - 1."""
    config = TrainingConfig(ema=True)
    for step in (1, 10, 2000, 22000):
        share = (1 - 1e-4) * math.exp(-(1 + (step - 1)) / 2000) + 1e-4
        assert 1 - decay_after(step, config) == pytest.approx(share)


def test_training_itself_is_not_changed(whole):
    without = train(begin(PLAIN))
    assert without.average is None
    assert without.evaluated is without.model
    assert without.checkpoint().trained is None
    assert_equal(copy_of(without.model), copy_of(whole.model))


@pytest.mark.parametrize("step", range(1, 2 * STEPS))
def test_resumed_anywhere_it_ends_with_the_same_bits(step, whole, tmp_path):
    epoch, within = divmod(step, STEPS)
    state = train(begin(), epoch)
    if within:
        train(state, leave=lambda taken: taken == within)
    assert state.step == step
    save_checkpoint(state.checkpoint(), tmp_path / "checkpoint.pt")
    resumed = begin()
    resumed.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    train(resumed)
    assert_equal(copy_of(resumed.model), copy_of(whole.model))
    assert_equal(copy_of(resumed.evaluated), copy_of(whole.evaluated))
    assert resumed.average is not None
    assert int(resumed.average.n_averaged) == 2 * STEPS


def test_all_that_uses_a_checkpoint_uses_the_average(whole, tmp_path):
    average, weights = copy_of(whole.evaluated), copy_of(whole.model)
    assert any(not torch.equal(value, weights[name]) for name, value in average.items())
    save_checkpoint(whole.checkpoint(), tmp_path / "checkpoint.pt")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.trained is not None
    assert_equal(checkpoint.trained, weights)
    assert_equal(copy_of(CoDETR.from_checkpoint(tmp_path)), average)  # eval and predict
    assert_equal(load_weights(tmp_path).model, average)  # convert
    assert_equal(copy_of(Subject.of(checkpoint, torch.device("cpu")).model), average)  # analyze


def test_a_checkpoint_of_before_there_was_an_average(tmp_path):
    state = train(begin(PLAIN), 1)
    save_checkpoint(state.checkpoint(), tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["trained"], content["training"]["ema"], content["training"]["ema_warmup"]
    torch.save(content, tmp_path / "old.pt")
    resumed = begin(PLAIN)
    resumed.restore(load_checkpoint(tmp_path / "old.pt"))
    assert_equal(copy_of(train(resumed).model), copy_of(train(begin(PLAIN)).model))


def test_another_average_is_another_training(whole):
    checkpoint = whole.checkpoint()
    for settings in (PLAIN, {**AVERAGED, "ema": 0.9}, {**AVERAGED, "ema_warmup": 6}):
        with pytest.raises(CheckpointError, match=r"different training\.ema"):
            begin(settings).restore(checkpoint)
    without = replace(train(begin(PLAIN), 1).checkpoint(), classes=CLASSES)
    with pytest.raises(CheckpointError, match=r"different training\.ema"):
        begin().restore(without)


def test_on_and_off():
    assert TrainingConfig(ema=True).ema == 0.9999
    assert TrainingConfig(ema=False).ema is None
    assert TrainingConfig(ema="0.5").ema == 0.5  # type: ignore[arg-type]
    for wrong in (0, 1, 1.5, -0.1):
        with pytest.raises(ValidationError, match=r"ema"):
            TrainingConfig(ema=wrong)
