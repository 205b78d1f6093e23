from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codetr.config import BoxLossConfig
from codetr.matching.hungarian import hungarian, hungarian_layers, matching_cost
from codetr.structures import Targets

SIZES = [(60, 80), (100, 40)]
COST = BoxLossConfig()
CLASSES = 4


def scene(seed: int, queries: int, counts: list[int]) -> tuple[Tensor, Tensor, list[Targets]]:
    """Two layers' logits (2, B, Q, 4) and boxes (2, B, Q, 4), and the objects of the images."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(counts), queries)
    logits = torch.randn(*shape, CLASSES, generator=generator) * 2
    boxes = torch.rand(*shape, 4, generator=generator) * 0.5 + 0.2
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 30
        sides = torch.rand(count, 2, generator=generator) * 20 + 5
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        targets.append(Targets(torch.cat((corner, corner + sides), -1), labels, image_id=count))
    return logits, boxes, targets


def total(cost: Tensor, match: tuple[Tensor, Tensor]) -> float:
    return cost[match[0], match[1]].sum().item()


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4))
def test_optimal_among_all_permutations(seed: int, queries: int, n: int, m: int) -> None:
    logits, boxes, targets = scene(seed, queries, [n, m])
    costs = matching_cost(logits, boxes, targets, SIZES, COST)
    matches = hungarian_layers(logits, boxes, targets, SIZES, COST)
    for layer in range(2):
        for image, count in enumerate((n, m)):
            query, gt = matches[layer][image]
            assert len(query) == min(queries, count)
            assert torch.equal(query, query.unique())
            assert len(gt.unique()) == len(gt)
            cost = costs[layer, image, :, :count]
            short, long = sorted((queries, count))
            candidates = [
                (torch.arange(short), torch.tensor(p, dtype=torch.int64))
                for p in permutations(range(long), short)
            ]
            if queries > count:
                candidates = [(b, a) for a, b in candidates]
            best = min(total(cost, c) for c in candidates)
            assert total(cost, (query, gt)) == pytest.approx(best, abs=1e-4)


@given(st.integers(0, 2**32))
def test_order_of_objects_does_not_matter(seed: int) -> None:
    logits, boxes, (one,) = scene(seed, 9, [5])
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    shuffled = Targets(one.boxes[order], one.labels[order])
    (query, gt) = hungarian(logits[0], boxes[0], [one], SIZES[:1], COST)[0]
    (other_query, other_gt) = hungarian(logits[0], boxes[0], [shuffled], SIZES[:1], COST)[0]
    assert torch.equal(query, other_query)
    assert torch.equal(gt, order[other_gt])


@given(st.integers(0, 2**32))
def test_layers_and_images_do_not_meet(seed: int) -> None:
    """Together or one by one: batching and its padding change nothing."""
    logits, boxes, targets = scene(seed, 7, [3, 6])
    together = hungarian_layers(logits, boxes, targets, SIZES, COST)
    for layer in range(2):
        for image in range(2):
            one = slice(image, image + 1)
            alone = hungarian(
                logits[layer, one], boxes[layer, one], targets[one], SIZES[one], COST
            )[0]
            assert all(map(torch.equal, together[layer][image], alone))


def test_a_query_on_the_object_is_chosen() -> None:
    targets = [Targets(torch.tensor([[10.0, 10.0, 30.0, 50.0]]), torch.tensor([2]))]
    boxes = torch.full((1, 3, 4), 0.9)
    boxes[0, 1] = torch.tensor([20 / 80, 30 / 60, 20 / 80, 40 / 60])
    ((query, gt),) = hungarian(torch.zeros(1, 3, CLASSES), boxes, targets, SIZES[:1], COST)
    assert (query.tolist(), gt.tolist()) == ([1], [0])


def test_low_precision_is_computed_in_float32() -> None:
    logits, boxes, targets = scene(0, 5, [2, 1])
    assert matching_cost(logits.bfloat16(), boxes, targets, SIZES, COST).dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_is_the_last_choice(value: float) -> None:
    """The loss will say so, on all ranks together; the matching of the others goes on."""
    logits, boxes, targets = scene(0, 5, [2, 1])
    boxes[1, 0, 3] = value
    matches = hungarian_layers(logits, boxes, targets, SIZES, COST)
    assert 3 not in matches[1][0][0]
    assert len(matches[1][0][0]) == 2
    boxes[:] = value
    matches = hungarian_layers(logits, boxes, targets, SIZES, COST)
    assert [len(query) for query, _ in matches[0]] == [2, 1]
