"""Training whose settings change between two epochs."""

from __future__ import annotations

import pytest
import torch
from tiny_training import FASTER_RCNN, start, tiny_batch, tiny_detector, tiny_training

from codetr.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from codetr.training import TrainingState, compute_gradients, train_epoch
from orchestrator.experiment import Change
from orchestrator.schedule import in_epoch, resolved

DETECTOR = tiny_detector("atss")
TRAINING = tiny_training(epochs=4, drop_epochs=[3], warmup_steps=3, learning_rate=1e-3)
STEPS = 3
SCHEDULE = resolved(
    (
        Change(after_epoch=1, settings={"learning_rate": 5e-4, "weight_decay": 0.05}),
        Change(after_epoch=2, settings={"lambda_1": 3, "lambda_2": 0.5, "clip_norm": 1.0}),
        Change(after_epoch=3, settings={"learning_rate": 2e-3, "atss.giou_weight": 5}),
    ),
    DETECTOR,
    TRAINING,
    "test",
)


def batches(epoch):
    ids = [[100 * epoch + 4 * step + i for i in range(4)] for step in range(STEPS)]
    return [tiny_batch(i, [3, 1, 0, 2]) for i in ids]


def begin(schedule=SCHEDULE, epoch=1) -> TrainingState:
    return start(*in_epoch(epoch, schedule, DETECTOR, TRAINING), STEPS)


def train(state, until, schedule=SCHEDULE, leave=None):
    """As the laboratory's workers do; returns whether it was left within an epoch."""
    while state.epoch < until:
        state.hold(*in_epoch(state.epoch + 1, schedule, DETECTOR, TRAINING))
        if train_epoch(state, batches(state.epoch + 1)[state.taken :], leave=leave) is None:
            return True
    return False


def go_on(state, file, schedule=SCHEDULE) -> TrainingState:
    """Another process, from a checkpoint of that state."""
    save_checkpoint(state.checkpoint(), file)
    checkpoint = load_checkpoint(file)
    resumed = begin(schedule, checkpoint.last_begun)
    resumed.restore(checkpoint)
    return resumed


@pytest.fixture(scope="module")
def whole() -> TrainingState:
    state = begin()
    train(state, 4)
    return state


def assert_same(one: TrainingState, other: TrainingState) -> None:
    assert (one.epoch, one.step) == (other.epoch, other.step)
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    moments = other.optimizer.state_dict()["state"]
    for number, values in one.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, moments[number][name]), (number, name)


def test_the_learning_rate_is_what_it_would_be_had_training_begun_with_it():
    state = begin()
    rates = []
    while state.epoch < 4:
        state.hold(*in_epoch(state.epoch + 1, SCHEDULE, DETECTOR, TRAINING))
        train_epoch(
            state, batches(state.epoch + 1), on_step=lambda s: rates.append(s.learning_rate)
        )
    base = [1e-3] * STEPS + [5e-4] * 2 * STEPS + [2e-3] * STEPS
    warm = [1e-3 + (1 - 1e-3) * min(1, step / 3) for step in range(4 * STEPS)]
    drop = [0.1 if step >= 3 * STEPS else 1 for step in range(4 * STEPS)]
    expected = [b * w * d for b, w, d in zip(base, warm, drop, strict=True)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_every_group_keeps_its_multiple_and_the_optimiser_its_moments():
    state = begin()
    train(state, 1)
    before = {
        name: value.clone() for name, value in state.optimizer.state_dict()["state"][0].items()
    }
    state.hold(*in_epoch(2, SCHEDULE, DETECTOR, TRAINING))
    rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    assert rates == pytest.approx({"detector": 5e-4, "backbone": 5e-5, "offsets": 5e-5})
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.05}
    for name, value in before.items():
        assert torch.equal(value, state.optimizer.state_dict()["state"][0][name])
    assert state.step == STEPS


@pytest.mark.parametrize("head", ["atss", FASTER_RCNN], ids=["atss", "faster_rcnn"])
def test_the_total_is_the_same_losses_weighed_anew(head):
    detector = tiny_detector(head)
    kind = "atss" if head == "atss" else "faster_rcnn.rcnn"
    settings = {"lambda_1": 3, "lambda_2": 0.5, "query_loss.l1": 7, f"{kind}.giou_weight": 4}
    schedule = resolved((Change(after_epoch=1, settings=settings),), detector, TRAINING, "test")
    changed, training = in_epoch(2, schedule, detector, TRAINING)
    outputs = []
    for config in (detector, changed):
        state = start(detector, TRAINING, STEPS)
        state.hold(config, training)
        torch.manual_seed(0)
        outputs.append((compute_gradients(state, *batches(1)[0]), config.loss_weights()))
    (before, old), (after, new) = outputs
    assert before.losses.keys() == after.losses.keys() == new.keys() == old.keys()
    for name, value in before.losses.items():
        assert torch.equal(value, after.losses[name]), name
    for output, weights in outputs:
        total = sum(weights[name] * float(value) for name, value in output.losses.items())
        assert float(output.total) == pytest.approx(total, rel=1e-5)
    assert float(before.total) != pytest.approx(float(after.total), rel=1e-2)


def test_each_change_leaves_its_mark(whole):
    for left_out in range(len(SCHEDULE)):
        state = begin()
        train(state, 4, SCHEDULE[:left_out] + SCHEDULE[left_out + 1 :])
        pairs = zip(state.model.parameters(), whole.model.parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("step", range(1, 4 * STEPS))
def test_interrupted_anywhere_it_ends_with_the_same_bits(step, whole, tmp_path):
    state = begin()
    epoch, within = divmod(step, STEPS)
    train(state, epoch)
    if within:
        assert train(state, 4, leave=lambda taken: taken == within)
    assert state.step == step
    resumed = go_on(state, tmp_path / "checkpoint.pt")
    train(resumed, 4)
    assert_same(resumed, whole)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_from_the_checkpoint_of_a_donor_that_went_on_otherwise(epoch, whole, tmp_path):
    """The donor's schedule is the heir's up to that epoch: its checkpoint is the heir's own."""
    of_donor = tuple(change for change in SCHEDULE if change.after_epoch < epoch)
    donor = begin(of_donor)
    train(donor, epoch, of_donor)
    heir = go_on(donor, tmp_path / "checkpoint.pt")
    train(heir, 4)
    assert_same(heir, whole)


def test_a_checkpoint_of_other_weights_is_still_refused(tmp_path):
    state = begin()
    train(state, 3)
    save_checkpoint(state.checkpoint(), tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="different lambda_1, lambda_2"):
        begin(epoch=1).restore(load_checkpoint(tmp_path / "checkpoint.pt"))
