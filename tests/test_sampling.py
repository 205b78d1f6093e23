from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codetr.sampling import (
    draw_generator,
    forked_rng,
    random_subset,
    sample_balanced,
    with_seeds,
)
from codetr.structures import Targets


def targets(seed: int | None) -> Targets:
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), seed=seed)


@given(st.integers(0, 20), st.integers(0, 20))
def test_random_subset_draws_only_when_there_is_a_choice(size: int, count: int) -> None:
    indices = torch.arange(size) * 3
    with mock.patch("torch.randperm", wraps=torch.randperm) as randperm:
        chosen = random_subset(indices, count)
    assert randperm.call_count == (size > count)
    assert len(chosen) == min(size, count)
    assert set(chosen.tolist()) <= set(indices.tolist())
    assert len(set(chosen.tolist())) == len(chosen)


def test_a_seeded_image_draws_the_same_whatever_was_drawn_before() -> None:
    indices = torch.arange(100)
    first = random_subset(indices, 10, draw_generator(targets(7), "rpn"))
    torch.rand(3)
    again = random_subset(indices, 10, draw_generator(targets(7), "rpn"))
    other_purpose = random_subset(indices, 10, draw_generator(targets(7), "rcnn"))
    other_image = random_subset(indices, 10, draw_generator(targets(8), "rpn"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other_purpose)
    assert not torch.equal(first, other_image)
    assert draw_generator(targets(None)) is None


def test_images_without_a_seed_are_given_one_each() -> None:
    torch.manual_seed(0)
    seeds = [t.seed for t in with_seeds([targets(None), targets(7), targets(None)])]
    assert seeds[1] == 7
    assert None not in seeds
    assert len(set(seeds)) == 3
    torch.manual_seed(0)
    torch.randint(2**63 - 1, (2,))
    following = torch.rand(3)
    torch.manual_seed(0)
    with_seeds([targets(None), targets(None)])
    assert torch.equal(torch.rand(3), following)


@given(
    st.lists(st.integers(-2, 4), max_size=60),
    st.integers(1, 40),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(0, 2**63 - 1),
)
def test_sample_balanced(assigned: list[int], count: int, fraction: float, seed: int) -> None:
    labels = torch.tensor(assigned, dtype=torch.int64)
    generator = draw_generator(targets(seed))
    positive, negative = sample_balanced(labels, count, fraction, generator)
    assert (labels[positive] >= 0).all()
    assert (labels[negative] == -1).all()
    available = (labels >= 0).sum().item(), (labels == -1).sum().item()
    assert len(positive) == min(available[0], int(count * fraction))
    assert len(negative) == min(available[1], count - len(positive))
    for indices in (positive, negative):
        assert torch.equal(indices, indices.unique())


@pytest.mark.parametrize("other_parts", [0, 2])
def test_forked_rng_is_independent_of_other_parts(other_parts: int) -> None:
    def build(names: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        weights = {}
        for name in names:
            with forked_rng(name):
                weights[name] = torch.rand(4)
        return weights, torch.rand(4)

    alone, after_alone = build(["a"])
    among, after_among = build([f"b{i}" for i in range(other_parts)] + ["a"])
    assert torch.equal(alone["a"], among["a"])
    assert torch.equal(after_alone, after_among)
    assert len({tuple(w.tolist()) for w in among.values()}) == other_parts + 1
