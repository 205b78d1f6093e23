"""Optimiser, schedule, epochs, errors and evaluation in one process."""

from __future__ import annotations

import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import CLASSES, FASTER_RCNN, start, tiny_batch, tiny_detector, tiny_training
from torch import nn

from codetr.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from codetr.config import DataConfig
from codetr.data import Classes, DataError, build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.detector import CoDETR
from codetr.randomness import generator_states, restore_generators, seed_everything
from codetr.structures import Detections, LossOutput
from codetr.training import (
    NonFiniteLoss,
    TrainingState,
    autocast,
    build_optimizer,
    build_schedule,
    compute_gradients,
    evaluate,
    limit_threads,
    parallelise,
    train_epoch,
)

HEADS = pytest.mark.parametrize(
    "heads", [(), ("atss",), ("atss", FASTER_RCNN)], ids=["K0", "K1", "K2"]
)


def batches(epoch=1):
    """Four batches of four images, one without any object."""
    ids = [[100 * epoch + 4 * step + i for i in range(4)] for step in range(4)]
    objects = [[3, 1, 0, 2], [0, 0, 0, 0], [1, 4, 2, 2], [2, 0, 1, 5]]
    return [tiny_batch(i, n) for i, n in zip(ids, objects, strict=True)]


class TwoTerms(nn.Module):
    """Stands in for a detector where only the loop matters: loss terms that the test chooses."""

    def __init__(self, *terms):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        self.terms, self.calls = list(terms), 0

    def forward(self, _batch, _targets):
        value = self.terms[self.calls]
        self.calls += 1
        losses = {"query/0/cls": self.weight.sum() * value, "query/0/l1": (self.bias**2).sum()}
        return LossOutput(losses["query/0/cls"] + 5 * losses["query/0/l1"], losses)


def state_of(model, training=None):
    training = training or tiny_training()
    optimizer = build_optimizer(model, training)
    schedule = build_schedule(optimizer, training, steps_per_epoch=4)
    return TrainingState(
        model, parallelise(model), optimizer, schedule, training, DataConfig(), CLASSES, seed=7
    )


# --------------------------------------------------------------------------- optimiser and schedule


def test_learning_rates_follow_the_reference():
    model = CoDETR(tiny_detector("atss", frozen_norm=False))
    config = tiny_training(learning_rate=1e-3, weight_decay=1e-2, backbone_multiplier=0.5)
    optimizer = build_optimizer(model, config)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slow = [
        n for n, _ in model.named_parameters() if "sampling_offsets" in n or "reference_points" in n
    ]
    assert any("sampling_offsets" in name for name in slow)
    assert any("reference_points" in name for name in slow)
    for name, parameter in model.named_parameters():
        factor = 0.5 if name.startswith("backbone.") else 0.1 if name in slow else 1.0
        assert rate[id(parameter)] == pytest.approx(1e-3 * factor), name
    assert all(group["weight_decay"] == 1e-2 for group in optimizer.param_groups)


def test_frozen_parameters_are_not_optimised():
    model = CoDETR(tiny_detector(frozen_norm=True))
    optimised = {
        id(p)
        for group in build_optimizer(model, tiny_training()).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert (id(parameter) in optimised) == parameter.requires_grad, name


@given(
    warmup=st.integers(0, 30),
    steps_per_epoch=st.integers(1, 10),
    drops=st.lists(st.integers(1, 5), max_size=3, unique=True),
    factor=st.floats(0.05, 0.9),
)
def test_schedule_warms_up_and_drops(warmup, steps_per_epoch, drops, factor):
    weight = nn.Parameter(torch.zeros(1))
    config = tiny_training(warmup_steps=warmup, drop_epochs=drops, drop_factor=factor)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = build_schedule(optimizer, config, steps_per_epoch)
    for step in range(6 * steps_per_epoch):
        expected = 0.5
        if step < warmup:
            expected *= 1 - (1 - step / warmup) * (1 - 0.001)
        for epoch in drops:
            if step // steps_per_epoch + 1 > epoch:
                expected *= factor
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_precision_auto_is_fp32_on_a_cpu():
    cpu = torch.device("cpu")
    assert not autocast(tiny_training(precision="auto"), cpu)._enabled
    with autocast(tiny_training(precision="bf16"), cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_threads_are_shared_and_never_none():
    before = torch.get_num_threads()
    try:
        assert limit_threads(processes=2, cores=4) == torch.get_num_threads() == 2
        assert limit_threads(processes=8, cores=4) == 1
        assert limit_threads() >= 1
    finally:
        torch.set_num_threads(before)


def test_seeds_reach_every_generator_and_streams_differ():
    import random

    import numpy as np

    def draws(*seed):
        seed_everything(*seed)
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draws(1, 0) == draws(1, 0)
    assert len({*draws(1, 0), *draws(1, 1), *draws(2, 0), *draws(1, 0, 1)}) == 12


# ------------------------------------------------------------------------------------------- epochs


@HEADS
@pytest.mark.parametrize("two_stage", [False, True], ids=["one-stage", "two-stage"])
def test_every_parameter_gets_a_gradient_on_every_step(heads, two_stage):
    model = CoDETR(tiny_detector(*heads, two_stage=two_stage)).train()
    for batch, targets in batches()[:2]:  # the second has no object
        model.zero_grad()
        model(batch, targets).total.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_report_means_and_progress():
    state = state_of(TwoTerms(1.0, 2.0, 3.0, 4.0), tiny_training(learning_rate=1e-8, clip_norm=1e9))
    steps = []
    report = train_epoch(state, batches(), steps.append)
    assert report.epoch == state.epoch == 1
    assert report.steps == state.step == 4
    assert report.images == 16
    assert report.losses == pytest.approx({"query/0/cls": 2 * 2.5, "query/0/l1": 1.0}, rel=1e-4)
    assert report.total == pytest.approx(2 * 2.5 + 5, rel=1e-4)
    assert report.gradient_norm == pytest.approx(
        sum(math.sqrt(2 * k * k + 100) for k in (1, 2, 3, 4)) / 4, rel=1e-4
    )
    assert report.cost.seconds > 0
    assert report.cost.core_seconds > 0
    assert report.cost.gpu_seconds == 0
    assert report.cost.peak_memory > 2**20
    assert state.cost == report.cost
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert [s.loss for s in steps] == pytest.approx([7, 9, 11, 13], rel=1e-4)
    assert all((s.steps, s.epoch, s.epochs) == (4, 1, 2) for s in steps)
    assert all(s.images_per_second > 0 for s in steps)
    left = [s.seconds_left * s.images_per_second / 4 for s in steps]  # in steps
    assert left == pytest.approx([7, 6, 5, 4])


def test_what_is_computed_in_parts_draws_the_same_twice():
    """Once to count over the whole batch, once for its gradients."""

    class Remembers(TwoTerms):
        def forward(self, batch, targets):
            seen.append([target.seed for target in targets])
            return super().forward(batch, targets)

    seen = []
    images, targets = tiny_batch([1, 2, 3, 4], [1, 1, 1, 1])
    state = state_of(Remembers(*[1.0] * 4), tiny_training(accumulate=2))
    state.parts = 2
    compute_gradients(state, images, [replace(target, seed=None) for target in targets])
    assert seen[:2] == seen[2:]
    assert None not in seen[0]


def test_gradients_are_clipped():
    model = TwoTerms(1e6, 1e6, 1e6, 1e6)
    state = state_of(model, tiny_training(clip_norm=0.1))
    seen = []
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad for p in model.parameters()]).norm().item())
    )
    train_epoch(state, batches())
    assert seen == pytest.approx([0.1] * 4, rel=1e-3)


def test_loss_falls():
    state = start(tiny_detector("atss"), tiny_training(learning_rate=1e-3, drop_epochs=[]), 4)
    totals = [train_epoch(state, batches()).total for _ in range(8)]
    assert totals[-1] < 0.85 * totals[0]


def test_bf16_stays_close_to_fp32():
    """The losses and gradients of a step; what needs precision is computed in fp32 all the same."""
    reports = [
        train_epoch(
            start(tiny_detector("atss", FASTER_RCNN), tiny_training(precision=precision), 1),
            batches()[:1],
        )
        for precision in ("fp32", "bf16")
    ]
    assert reports[0].losses == pytest.approx(reports[1].losses, rel=0.1, abs=0.02)
    assert reports[0].total != reports[1].total


# ------------------------------------------------------------------------- reproduction and resume


DETECTOR = tiny_detector("atss", FASTER_RCNN, frozen_norm=False)


def trained(epochs, state=None):
    state = state or start(
        tiny_detector("atss", FASTER_RCNN, frozen_norm=False), tiny_training(), 4
    )
    while state.epoch < epochs:
        train_epoch(state, batches(state.epoch + 1))
    return state


def assert_same_weights(one, other):
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    one = trained(2)
    torch.rand(3)  # whatever was drawn before does not matter
    assert_same_weights(one, trained(2))


def test_initial_weights_depend_on_the_seed_alone():
    assert_same_weights(*(start(DETECTOR, tiny_training(batch_size=b), 4) for b in (1, 4)))


def test_resumed_training_gives_the_same_weights_to_the_bit(tmp_path):
    whole = trained(2)
    interrupted = trained(1)
    save_checkpoint(interrupted.checkpoint(), tmp_path / "checkpoint.pt")
    resumed = start(DETECTOR, tiny_training(), 4)
    resumed.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert (resumed.epoch, resumed.step, resumed.cost) == (1, 4, interrupted.cost)
    assert_same_weights(whole, trained(2, resumed))


def after(step):
    """Leaves an epoch there."""
    return lambda taken: taken == step


@pytest.mark.parametrize("steps", [(1,), (3,), (1, 2)])
def test_an_epoch_left_and_resumed_gives_the_same_weights_and_report(steps, tmp_path):
    """Left in its second epoch, by processes that each go on from the file of the one before."""
    whole = trained(1)
    expected = train_epoch(whole, batches(2))
    state = trained(1)
    for step in steps:
        assert train_epoch(state, batches(2)[state.taken :], leave=after(step)) is None
        assert (state.epoch, state.taken, state.step) == (1, step, 4 + step)
        save_checkpoint(state.checkpoint(), tmp_path / "checkpoint.pt")
        state = start(DETECTOR, tiny_training(), 4)
        torch.rand(3)  # whatever was drawn meanwhile does not matter
        state.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
        assert (state.epoch, state.taken, state.step) == (1, step, 4 + step)
    shown, before, partial = [], state.cost, state.partial
    report = train_epoch(state, batches(2)[state.taken :], shown.append)
    assert_same_weights(whole, state)
    assert replace(report, cost=expected.cost) == expected
    assert report.cost.seconds > partial.cost.seconds > 0
    assert state.cost == before + report.cost
    assert (state.epoch, state.partial, state.step) == (2, None, 8)
    assert [(s.step, s.steps) for s in shown] == [(n, 4) for n in range(steps[-1] + 1, 5)]


def test_an_epoch_is_not_left_after_its_last_step():
    asked = []
    state = start(tiny_detector(), tiny_training(), 4)
    train_epoch(state, batches(), leave=asked.append)
    assert asked == [1, 2, 3]
    assert state.epoch == 1


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), float(np.random.normal()), torch.rand(2)

    seed_everything(3)
    draw()
    torch.save(generator_states(torch.device("cpu")), tmp_path / "states.pt")
    *expected, expected_torch = draw()
    seed_everything(4)
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    restore_generators(states, torch.device("cpu"))
    *numbers, found_torch = draw()
    assert numbers == expected
    assert torch.equal(found_torch, expected_torch)


def test_resume_refuses_another_training():
    checkpoint = start(tiny_detector("atss"), tiny_training(), 4).checkpoint()
    other = start(tiny_detector(two_stage=True), tiny_training(), 4)
    with pytest.raises(
        CheckpointError, match="different queries, heads: give this run another name"
    ):
        other.restore(checkpoint)
    with pytest.raises(CheckpointError, match="different seed"):
        start(tiny_detector("atss"), tiny_training(), 4).restore(replace(checkpoint, seed=8))
    fewer = replace(checkpoint, classes=Classes(("cat", "dog"), (1, 2)))
    with pytest.raises(DataError, match="fish"):
        start(tiny_detector("atss"), tiny_training(), 4).restore(fewer)


# ---------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_names_term_step_and_images_and_changes_nothing(value):
    model = TwoTerms(1.0, 1.0, value)
    state = state_of(model)
    before = []
    state.optimizer.register_step_post_hook(
        lambda *_: before.append([p.detach().clone() for p in model.parameters()])
    )
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(state, batches())
    error = caught.value
    assert (error.epoch, error.step, error.terms) == (1, 3, ["query/0/cls"])
    assert error.image_ids == [108, 109, 110, 111]
    assert "epoch 1, step 3: query/0/cls not finite; images 108, 109, 110, 111" in str(error)
    assert "\n" not in str(error)
    assert all(map(torch.equal, before[-1], model.parameters()))
    assert state.epoch == 0


def test_non_finite_gradient_of_a_finite_loss_names_the_parameter():
    class Root(TwoTerms):
        def forward(self, _batch, _targets):
            loss = (self.weight - 1).sum().sqrt() + self.bias.sum()  # sqrt(0): infinite slope
            return LossOutput(loss, {"query/0/cls": loss})

    model = Root()
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(state_of(model), batches())
    assert caught.value.terms == ["gradient of weight"]
    assert all((p == 1).all() for p in model.parameters())


def test_non_finite_pixels_stop_the_real_detector():
    poisoned = batches()
    poisoned[2][0].pixels[2] = math.nan
    state = start(tiny_detector("atss", FASTER_RCNN), tiny_training(), 4)
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(state, poisoned)
    assert caught.value.step == 3


def test_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(NonFiniteLoss(3, 4, ["a/b"], [5, 6])))
    assert (error.epoch, error.step, error.terms, error.image_ids) == (3, 4, ["a/b"], [5, 6])


# --------------------------------------------------------------------------------------- evaluation


class Oracle(nn.Module):
    """Stands in for a detector: finds exactly the objects of the batch that was handed out last."""

    def __init__(self, loader):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch, targets in self.loader:
            self.targets = targets
            yield batch, targets

    def detect(self, _batch, branch):
        assert not self.training
        assert branch == "query"
        return [Detections(t.boxes, torch.ones(len(t)), t.labels) for t in self.targets]


def test_evaluation_scales_boxes_back_to_the_image_files(tmp_path):
    make_digits(tmp_path, train_images=1, val_images=7, size=128)
    data = DataConfig(path=tmp_path, short_sides=(72,))
    dataset = open_dataset(data, "val")
    oracle = Oracle(build_loader(dataset, 3, training=False))
    progress = []
    result = evaluate(oracle, oracle, dataset, on_batch=lambda *done: progress.append(done))
    assert next(iter(oracle))[0].sizes == [(72, 72)] * 3
    assert result.metrics.summary["AP"] == pytest.approx(1.0)
    assert sorted(result.detections) == sorted(dataset.table.image_ids.tolist())
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert result.matches == {}  # nobody asked
    assert result.cost.seconds > 0
