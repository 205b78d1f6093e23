"""Two processes over gloo against one process on the same global batch."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny_training import FASTER_RCNN, MASK_RCNN, start, tiny_batch, tiny_detector, tiny_training
from torch import distributed, multiprocessing

from codetr.checkpoint import load_checkpoint, save_checkpoint
from codetr.config import DataConfig
from codetr.data import build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.detector import CoDETR
from codetr.distributed import from_rank_zero, rank, world_size
from codetr.structures import ImageBatch
from codetr.training import NonFiniteLoss, compute_gradients, evaluate, train_epoch

WORLD = 2
K2 = ("atss", FASTER_RCNN)
OTHERS = ("retinanet", "fcos", "paa", "gfl", MASK_RCNN)
OBJECTS = {"both ranks": [3, 1, 2, 4], "rank 0 alone": [3, 0, 2, 0], "no rank": [0, 0, 0, 0]}
"""Objects of the four images of a step; rank 1 has the second and the last."""
CASES = {
    f"K = {len(heads)}, {'two' if two_stage else 'one'}-stage, objects on {where}": (
        tiny_detector(*heads, two_stage=two_stage),
        objects,
    )
    for heads in ((), ("atss",), K2)
    for two_stage in (False, True)
    for where, objects in OBJECTS.items()
} | {
    f"the other heads, objects on {where}": (tiny_detector(*OTHERS), objects)
    for where, objects in OBJECTS.items()
}
CASES |= {
    f"K = 2, DINO, objects on {where}": (tiny_detector(*K2, dino=True), objects)
    for where, objects in OBJECTS.items()
}
CASES |= {
    f"K = 2, {kind}, objects on {where}": (tiny_detector(*K2, kind=kind), OBJECTS[where])
    for kind in ("hybrid", "grouped conditional", "dab", "dn")
    for where in ("rank 0 alone", "no rank")
}
CASES["K = 2, a pass for each group"] = (
    tiny_detector(*K2, kind="dn", positive_queries={"decoder_passes": "per_head"}),
    OBJECTS["rank 0 alone"],
)
CASES["K = 2, DINO, federated loss"] = (
    tiny_detector(*K2, dino=True, query_loss={"federated": {"enabled": True, "classes": 2}}),
    OBJECTS["rank 0 alone"],
)


def share(batch):
    """What the loader gives this rank of a global batch: all of it, or every second image."""
    images, targets = batch
    own = slice(rank(), None, world_size())
    return ImageBatch(images.pixels[own], images.sizes[own]), targets[own]


def started(detector, **settings):
    state = start(detector, tiny_training(**settings), steps=3)
    # Away from the initial star of integer offsets: there, samples lie exactly between two cells,
    # and the last bit decides which of two slopes is the gradient.
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if "sampling_offsets" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return state


def gradients(accumulate=1):
    """Loss terms, and gradients by parameter, of one step of every case."""
    results = {}
    for number, (name, (detector, objects)) in enumerate(CASES.items()):
        state = started(detector, accumulate=accumulate)
        state.parallel.train()
        batch = tiny_batch([10 * number + i for i in range(4)], objects)
        output = compute_gradients(state, *share(batch))
        losses = output.losses | {"total": output.total}
        results[name] = (
            {term: float(value.detach()) for term, value in losses.items()},
            {n: p.grad for n, p in state.model.named_parameters() if p.requires_grad},
        )
    return results


def three_steps():
    objects = [[1, 2, 0, 3], [2, 0, 1, 0], [1, 1, 1, 1]]
    return [share(tiny_batch([4 * s + i for i in range(4)], n)) for s, n in enumerate(objects)]


def epoch():
    """Report and weights after an epoch of three steps."""
    state = started(tiny_detector(*K2), learning_rate=1e-4)
    report = train_epoch(state, three_steps())
    return report, state.model.state_dict()


def left_epoch(checkpoint):
    """The same, left after its first step, and gone on with from the file by another state."""
    state = started(tiny_detector(*K2), learning_rate=1e-4)
    assert train_epoch(state, three_steps(), leave=lambda step: step == 1) is None
    if rank() == 0:
        save_checkpoint(state.checkpoint(), checkpoint)
    if world_size() > 1:
        distributed.barrier()
    return gone_on(checkpoint)


def gone_on(checkpoint):
    state = started(tiny_detector(*K2), learning_rate=1e-4)
    state.restore(load_checkpoint(checkpoint))
    report = train_epoch(state, three_steps()[state.taken :])
    return report, state.model.state_dict()


def trained_norm():
    """Buffers of a detector whose batch norm is trained, after a step on this rank's images."""
    state = started(tiny_detector(frozen_norm=False))
    train_epoch(state, [share(tiny_batch([1, 2, 3, 4], [1, 1, 1, 1]))])
    return dict(state.model.named_buffers())


def averaged():
    """The average of such a detector's weights after three steps, as it is evaluated; and how far
    it is from the weights."""
    state = started(tiny_detector(frozen_norm=False), ema=0.9, ema_warmup=0)
    train_epoch(state, three_steps())
    average, weights = state.evaluated.state_dict(), state.model.state_dict()
    apart = max(float((average[n].float() - w.float()).abs().max()) for n, w in weights.items())
    return average, apart


def poisoned():
    """The error where image 6, which is rank 0's and empty, has a NaN; and whether the weights
    stood."""
    batches = [tiny_batch([4 * s + i for i in range(4)], [2, 1, 0, 1]) for s in range(2)]
    batches[1][0].pixels[2, 0, 5, 5] = math.nan
    state = started(tiny_detector(*K2))
    train_epoch(state, [share(batches[0])])
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(state, [share(batches[1])])
    error = caught.value
    after = state.model.state_dict()
    unchanged = all(torch.equal(value, after[name]) for name, value in before.items())
    return error, unchanged


def evaluation(folder: Path, branch: str):
    """Metrics and detections of a detector on seven images, which two ranks cannot share evenly."""
    dataset = open_dataset(DataConfig(path=folder / "digits", short_sides=(64,)), "val")
    detector = tiny_detector("atss").model_copy(update={"num_classes": len(dataset.classes)})
    loader = build_loader(dataset, 2, rank=rank(), world_size=world_size(), training=False)
    torch.manual_seed(0)
    result = evaluate(
        CoDETR(detector), loader, dataset, branch=branch, record_matches=branch == "query"
    )
    return result.metrics.summary, result.detections, result.matches


def failure_on_rank_zero():
    def fail():
        raise ValueError(f"broken on rank {rank()}")

    with pytest.raises(ValueError, match="broken on rank 0") as caught:
        from_rank_zero(fail)
    return str(caught.value)


def everything(folder):
    return {
        "gradients": gradients(),
        "gradients in parts": gradients(accumulate=2),
        "epoch": epoch(),
        "left epoch": left_epoch(folder / "left.pt"),
        "trained norm": trained_norm(),
        "averaged": averaged(),
        "poisoned": poisoned(),
        "evaluation": {branch: evaluation(folder, branch) for branch in ("query", "atss")},
        "failure": failure_on_rank_zero(),
    }


def worker(number, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=WORLD,
        timeout=timedelta(minutes=2),  # a hang becomes an error
    )
    torch.save(everything(folder), folder / f"{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_digits(folder / "digits", train_images=1, val_images=7)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """Everything, computed by each of two processes."""
    multiprocessing.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    """Losses and gradients, computed by this process on the whole batch."""
    return gradients()


@pytest.fixture(scope="module")
def in_parts():
    """The same, of parts: by number of parts. More than there are images are as many as these."""
    return {count: gradients(accumulate=count) for count in (2, 3, 8)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_parts_of_a_batch_equal_the_whole(case, count, in_parts, alone):
    losses, found = in_parts[count][case]
    expected_losses, expected = alone[case]
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-8)
    require_close(found, expected)


@pytest.mark.parametrize("how", ["gradients", "gradients in parts"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_those_of_one_process(case, how, ranks, alone):
    (losses_0, gradients_0), (losses_1, gradients_1) = (r[how][case] for r in ranks)
    losses, expected = alone[case]
    for term, value in losses.items():
        # Boxes that fit leave a GIoU loss of 1e-4, the difference of two numbers near 1.
        expected_loss = pytest.approx(value, rel=1e-5, abs=1e-8)
        assert (losses_0[term] + losses_1[term]) / 2 == expected_loss, term
    for name, gradient in gradients_0.items():
        assert torch.equal(gradient, gradients_1[name]), name
    require_close(gradients_0, expected)


def require_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A bias of keys moves all scores of a softmax alike: its gradient is zero but for rounding.
        smallest = 1e-2 if "key_" in name and name.endswith("bias") else 1e-3
        scale = max(float(gradient.abs().max()), smallest)
        assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name


def test_an_epoch_equals_that_of_one_process(ranks):
    (report_0, weights_0), (report_1, weights_1) = (r["epoch"] for r in ranks)
    report, weights = epoch()
    assert report_0 == report_1
    assert report_0.images == report.images == 12
    assert report_0.losses == pytest.approx(report.losses, rel=1e-4)
    assert report_0.total == pytest.approx(report.total, rel=1e-4)
    assert report_0.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-4)
    for name, value in weights.items():
        assert torch.equal(weights_0[name], weights_1[name]), name
        torch.testing.assert_close(weights_0[name], value, rtol=1e-4, atol=1e-5)


def test_a_left_epoch_equals_one_that_was_not(ranks):
    for one in ranks:
        (expected, weights), (report, found) = one["epoch"], one["left epoch"]
        assert replace(report, cost=expected.cost) == expected
        assert all(torch.equal(value, found[name]) for name, value in weights.items())


def test_a_left_epoch_goes_on_with_fewer_workers(ranks, folder):
    """Which compute as many images at a time as before."""
    report, weights = gone_on(folder / "left.pt")
    expected, expected_weights = epoch()
    assert report.losses == pytest.approx(expected.losses, rel=1e-4)
    assert report.images == expected.images
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_trained_statistics_are_equal_on_all_ranks(ranks):
    buffers_0, buffers_1 = (r["trained norm"] for r in ranks)
    assert any("running_mean" in name and value.any() for name, value in buffers_0.items())
    assert all(torch.equal(value, buffers_1[name]) for name, value in buffers_0.items())


def test_averaged_weights_are_equal_on_all_ranks(ranks):
    """So all ranks evaluate the same detector, statistics of batch norm included."""
    (average_0, apart), (average_1, _) = (r["averaged"] for r in ranks)
    assert apart > 0
    assert any("running_mean" in name and value.any() for name, value in average_0.items())
    assert all(torch.equal(value, average_1[name]) for name, value in average_0.items())


def test_a_nan_on_one_rank_stops_all_alike(ranks):
    (error_0, unchanged_0), (error_1, unchanged_1) = (r["poisoned"] for r in ranks)
    assert str(error_0) == str(error_1)
    assert "query/0/cls" in error_0.terms
    assert error_0.image_ids == [4, 6]  # rank 0's images
    assert unchanged_0
    assert unchanged_1


@pytest.mark.parametrize("branch", ["query", "atss"])
def test_evaluation_equals_that_of_one_process(branch, ranks, folder):
    metrics, detections, matches = evaluation(folder, branch)
    (metrics_0, detections_0, matches_0), (metrics_1, detections_1, matches_1) = (
        r["evaluation"][branch] for r in ranks
    )
    assert matches_0 == matches
    assert matches.keys() == (detections.keys() if branch == "query" else set())
    assert matches_1 == {}
    assert metrics_0 == pytest.approx(metrics, nan_ok=True, abs=1e-6)
    assert metrics_1 == pytest.approx(metrics_0, nan_ok=True)
    assert detections_1 == {}
    assert detections_0.keys() == detections.keys()
    for image, found in detections.items():
        torch.testing.assert_close(detections_0[image].scores, found.scores)


def test_an_error_of_rank_zero_reaches_all(ranks):
    assert [r["failure"] for r in ranks] == ["broken on rank 0"] * WORLD
