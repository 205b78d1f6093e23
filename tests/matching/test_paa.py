from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from codetr.matching.max_iou import BACKGROUND, IGNORED
from codetr.matching.paa import lower_component, match_paa


def sklearns(values: np.ndarray) -> tuple[int, float]:
    """How many of the ascending values are positive by scikit-learn's mixture (figure 3 (c) of the
    paper), and how close the second most likely value comes to the most likely one."""
    if len(values) < 2:
        return len(values), np.inf
    column = values[:, None]
    mixture = GaussianMixture(
        2,
        weights_init=[0.5, 0.5],
        means_init=column[[0, -1]],
        precisions_init=np.ones((2, 1)),
        covariance_type="diag",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(column)
    lower = mixture.predict(column) == 0
    if not lower.any():
        return len(values), np.inf
    scores = np.where(lower, mixture.score_samples(column), -np.inf)
    ranked = np.sort(scores[scores > -np.inf])
    return int(scores.argmax()) + 1, ranked[-1] - ranked[-2] if len(ranked) > 1 else np.inf


def two_humps(seed: int, counts: list[int], apart: float) -> Tensor:
    """(M, K) ascending rows of so many losses each, infinite behind them."""
    draw = np.random.default_rng(seed)
    rows = torch.full((len(counts), max([*counts, 1])), torch.inf, dtype=torch.float64)
    for row, count in zip(rows, counts, strict=True):
        values = draw.gamma(2, 0.3, count) + apart * (draw.random(count) < 0.6)
        row[:count] = torch.from_numpy(np.sort(values))
    return rows


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 45), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 2.0, 10.0]),
)
def test_split_is_scikit_learns(seed: int, counts: list[int], apart: float) -> None:
    rows = two_humps(seed, counts, apart)
    ours = lower_component(rows)
    for row, count, kept in zip(rows, counts, ours.tolist(), strict=True):
        expected, margin = sklearns(row[:count].numpy())
        assert kept == expected or margin < 1e-6


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_row_does_not_depend_on_the_others(seed: int) -> None:
    rows = two_humps(seed, [30, 7, 45, 2], 1.0)
    together = lower_component(rows)
    assert torch.equal(together, torch.cat([lower_component(row[None]) for row in rows]))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([], 0),
        ([0.7], 1),
        ([0.1, 0.1, 0.1, 5.0, 5.1, 5.2], 1),  # three equal ones: the first is the most likely
        ([0.1, 0.2, 0.3, 5.0, 5.1, 5.2], 2),  # the most likely is the middle one
        ([2.0, 2.0], 1),
    ],
)
def test_splits_that_need_no_fit(values: list[float], kept: int) -> None:
    assert lower_component(torch.tensor([[*values, torch.inf]], dtype=torch.float64)) == kept


def random_case(seed: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    counts = (60, 20, 6)
    candidates = torch.randint(-2, 4, (2, sum(counts)), generator=generator)
    losses = torch.rand(2, sum(counts), generator=generator) + (candidates % 2)
    return losses, candidates, counts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 4, 9]))
def test_is_the_papers_algorithm(seed: int, topk: int) -> None:
    """Algorithm 1 of the paper, object by object and level by level."""
    losses, candidates, counts = random_case(seed)
    ours = match_paa(losses, candidates, counts, topk)
    for image in range(2):
        expected = candidates[image].clone()
        expected[expected >= 0] = BACKGROUND
        for number in range(4):
            chosen: list[int] = []
            start = 0
            for count in counts:
                own = [i for i in range(start, start + count) if candidates[image, i] == number]
                chosen += sorted(own, key=lambda i: losses[image, i].item())[:topk]
                start += count
            chosen.sort(key=lambda i: losses[image, i].item())
            values = losses[image, chosen].double().numpy()
            expected[chosen[: sklearns(values)[0]]] = number
        assert torch.equal(ours[image], expected)


@given(st.integers(0, 2**32))
def test_order_of_objects_does_not_matter(seed: int) -> None:
    losses, candidates, counts = random_case(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    renumbered = torch.where(candidates >= 0, order[candidates.clamp(min=0)], candidates)
    ours, other = (match_paa(losses, c, counts) for c in (candidates, renumbered))
    assert torch.equal(torch.where(ours >= 0, order[ours.clamp(min=0)], ours), other)


def test_without_candidates_nothing_changes() -> None:
    candidates = torch.tensor([[BACKGROUND, IGNORED, BACKGROUND]])
    losses = torch.full((1, 3), torch.inf)
    assert torch.equal(match_paa(losses, candidates, (2, 1)), candidates)


def test_losses_that_are_not_finite_are_no_positives() -> None:
    """So that the step gets as far as the error that names the loss."""
    candidates = torch.zeros(1, 4, dtype=torch.int64)
    losses = torch.tensor([[torch.nan, 0.1, torch.inf, 0.2]])
    assert match_paa(losses, candidates, (4,))[0, [0, 2]].tolist() == [BACKGROUND] * 2
