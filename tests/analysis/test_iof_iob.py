"""Foreground and background shares against equation 8 as it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codetr.analysis.iof_iob import GRID, area, iof_iob, on_grid


@st.composite
def scored_pixels(draw) -> tuple[list[float], list[bool]]:
    """Few different values, so that many are equal; both kinds of pixels."""
    count = draw(st.integers(2, 30))
    scores = draw(st.lists(st.integers(0, 6).map(lambda n: n / 6), min_size=count, max_size=count))
    objects = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    objects[0], objects[-1] = True, False
    return scores, objects


def equation_8(scores: list[float], objects: list[bool], threshold: float) -> tuple[float, float]:
    shares = []
    for kind in (True, False):
        mask = [is_object == kind for is_object in objects]
        above = sum((score > threshold) * m for score, m in zip(scores, mask, strict=True))
        shares.append(above / sum(mask))
    return shares[0], shares[1]


@given(scored_pixels())
def test_curve_is_equation_8_at_every_threshold(pixels) -> None:
    scores, objects = pixels
    curve = iof_iob(torch.tensor([scores]), torch.tensor([objects]))
    thresholds = [*sorted(set(scores), reverse=True), -1.0]
    wanted = [equation_8(scores, objects, s) for s in thresholds]
    np.testing.assert_allclose(np.stack(curve, 1), wanted, atol=1e-6)


@given(scored_pixels())
def test_ends_and_monotony(pixels) -> None:
    foreground, background = iof_iob(torch.tensor([pixels[0]]), torch.tensor([pixels[1]]))
    assert (foreground[0], background[0]) == (0, 0)
    assert (foreground[-1], background[-1]) == (1, 1)
    assert (np.diff(foreground) >= 0).all()
    assert (np.diff(background) >= 0).all()
    grid = on_grid(foreground, background)
    assert (np.diff(grid) >= -1e-12).all()
    assert grid[-1] == 1


@given(scored_pixels())
def test_area_is_the_chance_that_an_object_scores_higher(pixels) -> None:
    scores, objects = pixels
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, is_object in zip(scores, objects, strict=True)
        if is_object
        for b, other in zip(scores, objects, strict=True)
        if not other
    ]
    found = area(*iof_iob(torch.tensor([scores]), torch.tensor([objects])))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_curves_are_averaged_where_they_are() -> None:
    """Straight pieces, and the top of a vertical one."""
    foreground, background = np.array([0, 0.4, 0.8, 1]), np.array([0, 0, 0.5, 1])
    found = on_grid(foreground, background)
    wanted = np.where(GRID < 0.5, 0.4 + 0.8 * GRID, 0.6 + 0.4 * GRID)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
