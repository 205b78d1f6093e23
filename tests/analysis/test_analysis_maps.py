"""Maps over the image against pixel-by-pixel loops."""

from __future__ import annotations

import math

import pytest
import torch
from analysis_samples import levels_of, random_memory
from hypothesis import given
from hypothesis import strategies as st

from codetr.analysis.discriminability import discriminability
from codetr.analysis.maps import as_fraction, as_share, foreground, to_image, valid_maps
from codetr.structures import Memory

SHAPES = [(5, 6), (3, 3)]


def bilinear(level: list[list[float]], y: float, x: float) -> float:
    """The value at (y, x) in cells, whose centres are at halves; the border's beyond it."""
    height, width = len(level), len(level[0])
    y, x = (min(max(v - 0.5, 0), n - 1) for v, n in ((y, height), (x, width)))
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            share = (y - top if dy else 1 - y + top) * (x - left if dx else 1 - x + left)
            if share:
                total += share * level[top + dy][left + dx]
    return total


def slow_discriminability(memory: Memory, image: int, valid, size) -> torch.Tensor:
    """Equation 7, pixel by pixel."""
    height, width = size
    total = [[0.0] * width for _ in range(height)]
    for level, (h, w) in zip(levels_of(memory, image), valid, strict=True):
        norms = [
            [math.sqrt(sum(float(v) ** 2 for v in level[i, j])) for j in range(w)] for i in range(h)
        ]
        most = max(map(max, norms))
        scaled = [[norm / most for norm in row] for row in norms]
        for y in range(height):
            for x in range(width):
                at = ((y + 0.5) * h / height, (x + 0.5) * w / width)
                total[y][x] += bilinear(scaled, *at) / len(valid)
    return torch.tensor(total)


@pytest.mark.parametrize("valid", [[(5, 6), (3, 3)], [(4, 3), (2, 2)], [(1, 6), (1, 3)]])
def test_discriminability_is_equation_7(valid) -> None:
    memory = random_memory(SHAPES, [[(5, 6), (3, 3)], valid])
    _, found = discriminability(memory, [(20, 24), (14, 11)])
    torch.testing.assert_close(found, slow_discriminability(memory, 1, valid, (14, 11)))
    assert found.max() <= 1


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_padding_never_counts(height: int, width: int, seed: int) -> None:
    """Neither its values nor that it is there."""
    fine, coarse = (height, width), (min(height, 3), min(width, 3))
    padded = random_memory(SHAPES, [[fine, coarse]], seed=seed)
    padded.tokens[padded.padding] *= 1e6
    alone = random_memory([fine, coarse], [[fine, coarse]])
    alone.tokens = torch.cat(
        [
            level[:h, :w].flatten(0, 1)
            for level, (h, w) in zip(levels_of(padded, 0), (fine, coarse), strict=True)
        ]
    )[None]
    size = (3 * height, 4 * width)
    torch.testing.assert_close(discriminability(padded, [size]), discriminability(alone, [size]))


def test_features_of_nothing_score_nothing() -> None:
    memory = random_memory([(2, 2)], [[(2, 2)]])
    memory.tokens.zero_()
    (found,) = discriminability(memory, [(4, 4)])
    assert (found == 0).all()


def test_levels_are_cut_to_the_image() -> None:
    memory = random_memory(SHAPES, [[(5, 6), (3, 3)], [(2, 5), (1, 3)]])
    maps = valid_maps(memory.tokens, memory)
    assert [[tuple(level.shape) for level in image] for image in maps] == [
        [(5, 6, 5), (3, 3, 5)],
        [(2, 5, 5), (1, 3, 5)],
    ]
    assert torch.equal(maps[1][1], levels_of(memory, 1)[1][:1, :3])


def test_resizing_is_bilinear() -> None:
    level = torch.rand(3, 4)
    found = to_image(level, (7, 5))
    for y in range(7):
        for x in range(5):
            wanted = bilinear(level.tolist(), (y + 0.5) * 3 / 7, (x + 0.5) * 4 / 5)
            assert float(found[y, x]) == pytest.approx(wanted, abs=1e-6)


def test_foreground_is_every_pixel_whose_centre_a_box_covers() -> None:
    boxes = torch.tensor([[1.0, 0.5, 3.5, 2.0], [2.6, 1.4, 9.0, 2.5]])
    found = foreground(boxes, (4, 6))
    for y in range(4):
        for x in range(6):
            inside = any(a <= x + 0.5 < c and b <= y + 0.5 < d for a, b, c, d in boxes.tolist())
            assert bool(found[y, x]) == inside
    assert not foreground(torch.zeros(0, 4), (4, 6)).any()


def test_scaling_leaves_zero_alone() -> None:
    zero, some = torch.zeros(2, 3), torch.tensor([[1.0, 3.0]])
    assert torch.equal(as_share(zero), zero)
    assert torch.equal(as_fraction(zero), zero)
    assert as_share(some).tolist() == [[0.25, 0.75]]
    torch.testing.assert_close(as_fraction(some), torch.tensor([[1 / 3, 1.0]]))
