"""Distances of heads against plain formulas."""

from __future__ import annotations

from dataclasses import replace

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
    _draw_maps,
    _draw_matrices,
    as_distribution,
    distances,
    divergence,
    head_distances,
    mean_matrices,
    paper_conflict,
)
from codetr.analysis.frame import AnalysisError, Measurement, Subject, measure
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
    assert averages[frozenset(["atss", "faster_rcnn"])] == pytest.approx((0.0062 + 0.0059) / 2)
    matrix = paper_tables()["figure9_conflict_k6"]["matrix"]
    off = [matrix[i][j] for i in range(1, 7) for j in range(1, 7) if i != j]
    assert averages[frozenset(OURS)] == pytest.approx(sum(off) / len(off))


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


# ----------------------------------------------------------------------------- beside the paper


def measured(heads: list[str], matrix, seed: int = 0) -> Measurement:
    """A detector whose heads are so far apart, with a picture of two pixels."""
    cams = {f"cam/0/{name}": np.eye(2) for name in ["query", *heads]}
    arrays_ = {"matrix": np.array(matrix), "image/0": np.zeros((2, 2, 3), np.uint8), **cams}
    own = head_distances(arrays_["matrix"])
    numbers = {f"distance/{name}": float(v) for name, v in zip(heads, own, strict=True)}
    numbers |= {"conflict": float(own.mean()), "from_all/query": float(distances(matrix)[0])}
    numbers["images_without_objects"] = 0
    facts = {"k": len(heads), "heads": heads, "seed": seed, "images": 1, "objects": 1}
    group = f"K={len(heads)}"
    return Measurement("conflicts", f"{group}, seed {seed}", group, facts, numbers, arrays_)


OURS = ["atss", "faster_rcnn", "paa", "retinanet", "fcos", "gfl"]
"""The six heads, in another order than the paper's."""


def papers_in_our_order():
    paper = paper_tables()["figure9_conflict_k6"]
    places = [0, *(paper["order"].index(name) for name in OURS)]
    return np.array(paper["matrix"])[np.ix_(places, places)]


def test_matrices_are_means_over_seeds_in_the_papers_order() -> None:
    matrix = papers_in_our_order()
    seeds = [measured(OURS, factor * matrix, seed) for seed, factor in enumerate((1, 2, 6))]
    other = measured(["atss", "paa"], np.ones((3, 3)))  # the paper's figure 8 is of other heads
    mine, two, theirs = mean_matrices([*seeds, other], paper_tables())
    assert (mine.papers, two.papers, theirs.papers) == (False, False, True)
    assert mine.names == theirs.names
    assert [*theirs.names[1:]] == paper_tables()["figure9_conflict_k6"]["order"][1:]
    np.testing.assert_allclose(mine.values, 3 * theirs.values)
    assert two.names == ["query", "atss", "paa"]


@pytest.mark.parametrize(("sign", "rank"), [(1, "+1.00"), (-1, "-1.00")])
def test_the_page_ranks_pairs_beside_the_papers(tmp_path, sign: int, rank: str) -> None:
    """Its own order of the pairs, and the reverse of it."""
    matrix = sign * papers_in_our_order() + 1.0 * ~np.eye(7, dtype=bool)
    several = [measured(OURS, matrix, 0), measured(OURS, matrix, 1)]
    page, *pictures = Conflicts.report(several, tmp_path, paper_tables())
    text = page.read_text()
    assert f"{rank} over 42 ordered pairs (K=6)" in text
    assert [path.name for path in pictures] == ["conflicts_k6.png", "conflicts_maps.png"]
    assert "Numbers are means over 2 seeds" in text
    assert text.count("| the paper, ") == 1  # the other figure is of other heads
    row = next(line for line in text.splitlines() if line.startswith("| the paper, K=6"))
    cells = dict(zip(["", *OURS, "mean", "query"], row.strip("| ").split(" | "), strict=True))
    wanted = head_distances(papers_in_our_order())
    assert {n: float(cells[n]) for n in OURS} == pytest.approx(
        dict(zip(OURS, wanted, strict=True)), rel=1e-3
    )
    average = paper_conflict(paper_tables())[frozenset(OURS)]
    assert float(cells["mean"]) == pytest.approx(average, rel=1e-3)


def test_matrices_of_one_size_share_their_colours(tmp_path, monkeypatch) -> None:
    ends = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, _: ends.append({i.get_clim() for a in figure.axes for i in a.images}),
    )
    matrix = 1.0 - np.eye(3)
    other = replace(measured(["atss", "paa"], matrix), group="other")
    ours = [measured(["atss", "faster_rcnn"], 4 * matrix), other]
    _draw_matrices(mean_matrices(ours, paper_tables()), tmp_path)
    assert ends == [{(0, 4)}]


def test_the_distance_from_the_query_head_is_told_apart(tmp_path) -> None:
    single = measured(["paa"], 9.0 * (1 - np.eye(2)))
    two, other = (
        measured(["atss", kind], x - x * np.eye(3)) for kind, x in (("paa", 1.0), ("gfl", 2.0))
    )
    several = [single, two, replace(other, group="other")]
    text = Conflicts.report(several, tmp_path, paper_tables())[0].read_text()
    assert "is largest with other (2.0000), smallest with K=2 (1.0000); a single head's" in text
    assert "from the query head is 9.0000 with K=1. The paper" in text
    text = Conflicts.report([single], tmp_path, paper_tables())[0].read_text()
    assert "\nA single head's from the query head is 9.0000 with K=1. The paper" in text


def test_two_numbers_are_no_picture(tmp_path) -> None:
    one = measured(["paa"], np.ones((2, 2)))
    _, *pictures = Conflicts.report([one], tmp_path, paper_tables())
    assert [path.name for path in pictures] == ["conflicts_maps.png"]


def test_maps_lie_on_their_images_in_the_matrices_order(tmp_path, monkeypatch) -> None:
    """And say where they are zero."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, _: drawn.append(figure.axes)
    )
    names = ["query", "faster_rcnn", "atss"]
    one = measured(["atss", "faster_rcnn"], 1.0 - np.eye(3))
    one.arrays["cam/0/atss"][:] = 0
    _draw_maps(one, names, tmp_path)
    assert [axes.get_title() for axes in drawn[0]] == ["image", *names]
    assert [len(axes.images) for axes in drawn[0]] == [1, 2, 2, 2]
    assert all(axes.images[1].get_alpha() < 1 for axes in drawn[0][1:])
    said = [[text.get_text() for text in axes.texts] for axes in drawn[0]]
    assert said == [[], [], [], ["zero map"]]


def test_equal_heads_have_no_paper_beside_them(tmp_path) -> None:
    """Its matrices of two and of six are of different heads."""
    twins = [measured(["atss", "atss_2"], np.ones((3, 3)))]
    twins += [measured(["atss", *(f"atss_{n}" for n in range(2, 7))], np.ones((7, 7)))]
    page, *_ = Conflicts.report(twins, tmp_path, paper_tables())
    assert "| the paper, " not in page.read_text()


def test_without_the_papers_heads_or_an_order_nothing_is_said(tmp_path) -> None:
    same = 1.0 - np.eye(7)
    for one in (measured(OURS, same), measured(["paa"], np.ones((2, 2)))):
        page, *_ = Conflicts.report([one], tmp_path, paper_tables())
        assert "rank correlation" not in page.read_text()
