"""Federated loss against exact probabilities and a slow formula."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import CLASSES, tiny_batch, tiny_detector, tiny_training

from codetr.config import DataConfig, FederatedLossConfig
from codetr.criterion import box_losses, encoder_losses
from codetr.detector import CoDETR
from codetr.federated import FederatedClasses
from codetr.structures import GroupPrediction, KnownTargets, Targets
from codetr.training import TrainingState, compute_gradients


def drawing(counts: list[int], classes: int, power: float = 0.5) -> FederatedClasses:
    config = FederatedLossConfig(enabled=True, classes=classes, power=power)
    federated = FederatedClasses(config, len(counts))
    federated.learn(counts)
    return federated


def having(labels: list[int], seed: int = 0) -> Targets:
    return Targets(torch.zeros(len(labels), 4), torch.tensor(labels).long(), seed=seed)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 1000), min_size=3, max_size=20),
    classes=st.integers(1, 25),
    seed=st.integers(0, 2**62),
    data=st.data(),
)
def test_positives_and_so_many_others(
    counts: list[int], classes: int, seed: int, data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=6))
    (kept,) = drawing(counts, classes)([having(labels, seed)])
    present = set(labels)
    chosen = set(kept.nonzero()[:, 0].tolist())
    assert present <= chosen
    possible = present | {c for c, count in enumerate(counts) if count}
    assert chosen <= possible, "a class without images is nobody's negative"
    assert len(chosen) == max(len(present), min(classes, len(possible)))


def test_others_are_drawn_by_the_power_of_their_frequency() -> None:
    """Two of four classes beside the present one, as drawing one after the other gives them."""
    counts, present = [400, 100, 25, 1, 9], 4
    weights = [count**0.5 for count in counts[:4]]
    expected: Counter[frozenset[int]] = Counter()
    for first, second in permutations(range(4), 2):
        one = weights[first] / sum(weights)
        two = weights[second] / (sum(weights) - weights[first])
        expected[frozenset((first, second))] += one * two  # type: ignore[assignment]
    federated, draws = drawing(counts, classes=3), 6000
    kept = federated([having([present], seed) for seed in range(draws)])
    found = Counter(frozenset(row.nonzero()[:, 0].tolist()) - {present} for row in kept)
    for pair, probability in expected.items():
        error = (probability * (1 - probability) / draws) ** 0.5
        assert found[pair] / draws == pytest.approx(probability, abs=4 * error)


def test_an_image_draws_for_itself() -> None:
    federated = drawing([5] * 40, classes=10)
    images = [having([i], seed=100 + i) for i in range(6)]
    together = federated(images)
    assert len({tuple(row.tolist()) for row in together}) == 6
    assert torch.equal(torch.cat([federated([t]) for t in images]), together)
    assert torch.equal(federated(images[::-1]), together.flip(0))


def test_frequencies_must_be_known() -> None:
    with pytest.raises(RuntimeError, match="class_images"):
        FederatedClasses(FederatedLossConfig(enabled=True), 3)([having([1])])


# ------------------------------------------------------------------------------------------ losses


def prediction_and_targets() -> tuple[GroupPrediction, list[KnownTargets], torch.Tensor]:
    """Two layers, two images, five queries, four classes."""
    draw = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 2, 5, 4, generator=draw) * 0.4 + 0.2
    prediction = GroupPrediction(torch.randn(2, 2, 5, 4, generator=draw), boxes)
    labels = torch.tensor([[0, 4, 2, 4, 4], [4, 4, 4, 1, 4]])
    wanted = torch.rand(2, 5, 4, generator=draw) * 0.4 + 0.2
    weights = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    kept = torch.tensor([[True, False, True, True], [False, True, False, False]])
    return prediction, [KnownTargets(labels, wanted, weights)] * 2, kept


@pytest.mark.parametrize("kind", ["focal", "quality_focal"])
def test_the_loss_is_that_of_the_kept_classes(kind: str) -> None:
    config = tiny_detector(num_classes=4, query_loss={"classification": kind})
    prediction, targets, kept = prediction_and_targets()
    sizes = [(10, 10), (10, 10)]
    prediction.logits.requires_grad_()
    losses = box_losses(prediction, targets, sizes, config, classes=kept)
    positives = 3
    for layer in range(2):
        total = torch.zeros(())
        for image in range(2):
            for query in range(5):
                weight = targets[0].label_weights[image, query]
                label = int(targets[0].labels[image, query])
                for c in kept[image].nonzero()[:, 0].tolist():
                    p = prediction.logits[layer, image, query, c].sigmoid()
                    if kind == "focal":
                        right = -0.25 * (1 - p) ** 2 * p.log()
                        wrong = -0.75 * p**2 * (1 - p).log()
                        total = total + weight * (right if c == label else wrong)
                        continue
                    q = torch.zeros(())
                    if c == label:
                        q = overlap(
                            prediction.boxes[layer, image, query], targets[0].boxes[image, query]
                        )
                    entropy = -q * p.log() - (1 - q) * (1 - p).log()
                    total = total + weight * entropy * (q - p).abs() ** 2
        assert losses["cls"][layer].item() == pytest.approx(total.item() / positives, rel=1e-5)
    losses["cls"].sum().backward()
    assert prediction.logits.grad is not None
    trained = (prediction.logits.grad != 0).any(2)
    assert torch.equal(trained, kept.expand(2, 2, 4)), "the others have no gradient"

    plain = box_losses(prediction, targets, sizes, config)
    assert torch.equal(losses["l1"], plain["l1"])
    assert torch.equal(losses["giou"], plain["giou"])
    everything = box_losses(prediction, targets, sizes, config, classes=torch.ones_like(kept))
    assert torch.equal(everything["cls"], plain["cls"])


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU of two cxcywh boxes."""
    low = torch.maximum(first[:2] - first[2:] / 2, second[:2] - second[2:] / 2)
    high = torch.minimum(first[:2] + first[2:] / 2, second[:2] + second[2:] / 2)
    shared = (high - low).clamp(min=0).prod()
    return shared / (first[2:].prod() + second[2:].prod() - shared)


@pytest.mark.parametrize("rank_by", ["objectness", "best_class"])
def test_objectness_is_no_class(rank_by: str) -> None:
    """Ranked by objectness, the encoder is trained on class 0 whatever the objects are."""
    config = tiny_detector(two_stage=True, queries={"rank_by": rank_by})
    _, targets = tiny_batch([1, 2], [2, 1])
    draw = torch.Generator().manual_seed(0)
    proposals = GroupPrediction(
        torch.randn(1, 2, 6, 3, generator=draw), torch.rand(1, 2, 6, 4, generator=draw) * 0.5 + 0.1
    )
    sizes = [(64, 64)] * 2
    none = torch.zeros(2, 3, dtype=torch.bool)
    plain = encoder_losses(proposals, targets, sizes, config)["encoder/cls"]
    masked = encoder_losses(proposals, targets, sizes, config, classes=none)["encoder/cls"]
    assert plain > 0
    assert masked == (plain if rank_by == "objectness" else 0)


# ---------------------------------------------------------------------------------------- training


def state(classes: int, **training: int) -> TrainingState:
    detector = tiny_detector(
        "atss", kind="dino", query_loss={"federated": {"enabled": True, "classes": classes}}
    )
    return TrainingState.start(
        detector,
        tiny_training(**training),
        DataConfig(),
        CLASSES,
        seed=7,
        steps_per_epoch=1,
        device=torch.device("cpu"),
        class_images=[5, 50, 500],
    )


def gradients(of: TrainingState) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch, targets = tiny_batch([3, 4, 5, 6], [2, 0, 1, 3])
    of.model.train()
    output = compute_gradients(of, batch, targets)
    parts = [p.grad.flatten() for p in of.model.parameters() if p.grad is not None]
    return torch.cat(parts), output.losses


def test_a_batch_in_parts_has_the_same_gradients() -> None:
    whole, _ = gradients(state(2))
    in_parts, _ = gradients(state(2, accumulate=3))
    assert torch.allclose(in_parts, whole, rtol=1e-4, atol=1e-6)


def test_all_groups_of_queries_are_federated_and_heads_are_not() -> None:
    """One class for each image or, where an image has more, those of its objects."""
    _, one = gradients(state(1))
    plain, every = gradients(state(3))
    cls = [name for name in one if name.endswith("/cls")]
    less = {name for name in cls if one[name] < every[name]}
    assert less == {name for name in cls if name != "atss/cls"}
    assert {name.partition("/")[0] for name in less} == {
        "query", "denoising", "positive", "encoder",
    }  # fmt: skip
    assert one["atss/cls"] == every["atss/cls"]

    unfederated = state(3)
    config = unfederated.model.config
    off = config.query_loss.model_copy(update={"federated": FederatedLossConfig()})
    unfederated.model.config = config.model_copy(update={"query_loss": off})
    assert torch.equal(gradients(unfederated)[0], plain), "all classes: nothing is left out"


def test_the_frequencies_are_no_weights_of_the_detector() -> None:
    detector = tiny_detector(query_loss={"federated": {"enabled": True}})
    names = CoDETR(tiny_detector()).state_dict().keys()
    assert CoDETR(detector).state_dict().keys() == names
