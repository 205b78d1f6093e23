"""Distances of heads against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis_samples import BOTH, checkpoint_of, dataset, subject
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy
from tiny_training import tiny_detector

from codetr.analysis.conflicts import (
    Conflicts,
    as_distribution,
    distances,
    divergence,
    head_distances,
    paper_conflict,
)
from codetr.analysis.frame import AnalysisError, Subject, measure
from orchestrator.experiment import paper_tables

MATRICES = st.integers(2, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 5)))


def test_maps_are_scaled_and_softmaxed() -> None:
    found = as_distribution(torch.tensor([[0.0, 2.0], [4.0, 1.0]]))
    odds = np.exp([[0.0, 0.5], [1.0, 0.25]])
    np.testing.assert_allclose(found, odds / odds.sum())


def test_divergence_is_scipys() -> None:
    first, second = (as_distribution(map_) for map_ in torch.rand(2, 7, 9).unbind())
    wanted = entropy(first.flatten().numpy(), second.flatten().numpy())
    assert divergence(first, second) == pytest.approx(wanted, abs=1e-12)
    assert divergence(first, first) == 0


@given(MATRICES)
def test_distances_are_equation_12_and_know_no_direction(matrix) -> None:
    found = distances(matrix)
    count = len(matrix)
    for i in range(count):
        others = [matrix[i, j] + matrix[j, i] for j in range(count) if j != i]
        assert found[i] == pytest.approx(sum(others) / (2 * (count - 1)))
    np.testing.assert_allclose(distances(matrix.T), found)


def test_a_single_head_is_measured_from_the_query_head() -> None:
    assert head_distances(np.array([[0, 2.0], [4.0, 0]])).tolist() == [3.0]
    three = np.array([[0, 9.0, 9], [9, 0, 2], [9, 4, 0]])
    assert head_distances(three).tolist() == [3.0, 3.0]


def test_the_papers_averages() -> None:
    """Figures 8 and 9, by hand: K = 2 has one pair of auxiliary heads."""
    averages = paper_conflict(paper_tables())
    assert averages[2] == pytest.approx((0.0062 + 0.0059) / 2)
    matrix = paper_tables()["figure9_conflict_k6"]["matrix"]
    off = [matrix[i][j] for i in range(1, 7) for j in range(1, 7) if i != j]
    assert averages[6] == pytest.approx(sum(off) / len(off))


def test_identical_heads_have_no_conflict(tmp_path) -> None:
    one = subject("atss", "atss", "atss")
    one.model.heads[1].load_state_dict(one.model.heads[0].state_dict())
    found = measure(Conflicts, one, dataset(tmp_path, [(48, 64)] * 3)).numbers
    assert found["kl/atss/atss_2"] == found["kl/atss_2/atss"] == 0
    assert found["kl/atss/atss_3"] > 0
    assert found["kl/atss/atss_3"] == found["kl/atss_2/atss_3"]
    assert found["distance/atss"] == found["distance/atss_2"]
    pair = found["kl/atss/atss_3"] + found["kl/atss_3/atss"]
    assert found["distance/atss"] == pytest.approx(pair / 4)
    assert found["distance/atss_3"] == pytest.approx(pair / 2)
    assert found["conflict"] == pytest.approx((2 * pair / 4 + pair / 2) / 3)


def test_images_without_objects_and_zero_maps_are_left_out_and_counted(tmp_path) -> None:
    one, data = subject("atss"), dataset(tmp_path, [(48, 64)] * 4, empty=(0, 2))
    found = measure(Conflicts, one, data)
    assert found.numbers["images_without_objects"] == 2
    assert found.numbers["zero_maps/atss"] == found.numbers["zero_maps/query"] == 0
    assert found.arrays["images"].tolist() == [[2, 2], [2, 2]]
    with pytest.raises(AnalysisError, match="no object in 2 images"):
        measure(Conflicts, one, data, images=2)  # the first and the third


def test_a_head_that_sees_nothing_has_no_distance(tmp_path) -> None:
    one = subject("atss")
    for parameter in one.model.heads[0].parameters():
        parameter.zero_()
    found = measure(Conflicts, one, dataset(tmp_path, [(48, 64)] * 2))
    assert found.numbers == {
        "images_without_objects": 0,
        "zero_maps/query": 0,
        "zero_maps/atss": 2,
    }
    assert found.arrays["images"].tolist() == [[2, 0], [0, 0]]
    page, *_ = Conflicts.report([found], tmp_path, paper_tables())
    assert "atss 2 (K=1" in page.read_text()


def test_single_zero_maps(tmp_path) -> None:
    """Where one of a pair is zero the pair is left out, and only it."""
    one = Subject.of(checkpoint_of(tiny_detector(*BOTH)), torch.device("cpu"))
    conflicts = Conflicts(one, frozenset())
    a, b, zero = torch.rand(4, 4), torch.rand(4, 4), torch.zeros(4, 4)
    conflicts._compare(1, {"query": a, "atss": b, "faster_rcnn": a})
    conflicts._compare(0, {"query": b, "atss": a, "faster_rcnn": zero})
    numbers, found = conflicts.finish()
    assert found["images"].tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]
    assert numbers["zero_maps/faster_rcnn"] == 1
    assert numbers["zero_maps/query"] == 0
    a, b = as_distribution(a), as_distribution(b)
    assert numbers["kl/query/atss"] == pytest.approx((divergence(a, b) + divergence(b, a)) / 2)
    assert numbers["kl/query/faster_rcnn"] == 0
    assert numbers["kl/faster_rcnn/atss"] == pytest.approx(divergence(a, b))
