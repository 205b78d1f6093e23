"""Instability of a constructed history, and what the recorder hears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_batch, tiny_detector

from codetr.analysis.stability import MatchRecorder, instability
from codetr.detector import CoDETR
from codetr.inference import detect
from codetr.matching.hungarian import hungarian


def test_constructed_history() -> None:
    """Three images, six objects; what changes is written beside it."""
    before = {1: [4, 7, 2], 2: [0, 1], 3: [5], 4: []}
    after = {
        1: [4, 9, 2],  # one object: query 7 loses it, query 9 gets it
        2: [1, 0],  # two objects, and the same two queries
        3: [5],
        4: [],
    }
    found = instability(before, after)
    assert found is not None
    assert found.changed == 3 / 6
    assert found.per_image == (2 + 2 + 0 + 0) / 4
    same = instability(after, after)
    assert (same.changed, same.per_image) == (0, 0)


def test_objects_without_a_query() -> None:
    """There may be more objects than queries."""
    found = instability({1: [0, -1, 3]}, {1: [0, 3, -1]})
    assert (found.changed, found.per_image) == (2 / 3, 1)


def test_only_common_images_count() -> None:
    assert instability({}, {1: [2]}) is None
    assert instability({1: []}, {1: []}) is None
    assert instability({1: [2], 2: [3]}, {1: [4]}).changed == 1


@st.composite
def assignments(draw) -> tuple[list[int], list[int]]:
    count = draw(st.integers(1, 6))
    rows = [draw(st.permutations(range(8)))[:count] for _ in range(2)]
    return list(rows[0]), list(rows[1])


@given(assignments())
def test_per_image_is_dn_detrs_formula(pair) -> None:
    """The index vector of every query, compared place by place."""
    vectors = [[row.index(q) if q in row else -1 for q in range(8)] for row in pair]
    wanted = sum(a != b for a, b in zip(*vectors, strict=True))
    assert instability({1: pair[0]}, {1: pair[1]}).per_image == wanted


@pytest.mark.parametrize("two_stage", [False, True])
def test_recorder_hears_the_matching_of_the_last_layer(two_stage: bool) -> None:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", two_stage=two_stage)).eval()
    batch, targets = tiny_batch([5, 6, 7], [3, 0, 14])  # 14 objects, 12 queries
    silent = detect(model, batch, batch.sizes)
    with MatchRecorder(model) as recorder:
        found = detect(model, batch, batch.sizes)
        recorder.note(targets, batch.sizes)
    for one, other in zip(silent, found, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)

    with torch.no_grad():
        memory = model.encode(batch)
        selection = model.queries(memory)
        last = model.decoder([selection.group], memory)["query"]
    cost = model.config.matching_cost
    pairs = hungarian(last.logits[-1], last.boxes[-1], targets, batch.sizes, cost)
    assert [*recorder.matches] == [5, 6, 7]
    for number, (query, chosen) in enumerate(pairs):
        wanted = [-1] * len(targets[number])
        for q, g in zip(query.tolist(), chosen.tolist(), strict=True):
            wanted[g] = int(selection.tokens[number, q]) if two_stage else q
        assert recorder.matches[targets[number].image_id] == wanted
    assert recorder.matches[7].count(-1) == 2
    assert not model.decoder._forward_hooks
    assert not model.queries._forward_hooks


def test_every_batch_is_kept() -> None:
    model = CoDETR(tiny_detector()).eval()
    batch, targets = tiny_batch([1, 2], [2, 2])
    with MatchRecorder(model) as recorder:
        for shift in (0, 10):
            detect(model, batch, batch.sizes)
            moved = [replace(t, image_id=t.image_id + shift) for t in targets]
            recorder.note(moved, batch.sizes)
    assert [*recorder.matches] == [1, 2, 11, 12]
    assert recorder.matches[1] == recorder.matches[11]
