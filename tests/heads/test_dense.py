from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from codetr.heads.dense import detect_dense, flatten_maps, top_per_level


def test_flatten_maps_is_level_row_column_shape() -> None:
    maps = [torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 1, 1)]
    maps[0][0, 2:, 1, 2] = torch.tensor([5.0, 6.0])  # the second of two shapes, last cell
    flat = flatten_maps(maps, 2)
    assert flat.shape == (1, 14, 2)
    assert flat[0, 11].tolist() == [5, 6]
    assert flat.sum() == 11


def test_top_per_level() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2], [0.9, 0.1, 0.2, 0.4, 0.8]])
    assert top_per_level(scores, [3, 2], 2).tolist() == [[1, 2, 3, 4], [0, 2, 4, 3]]
    assert top_per_level(scores, [3, 2], 1).tolist() == [[1, 3], [0, 4]]


@given(st.integers(0, 2**32), st.booleans())
def test_detect_dense_is_the_greedy_algorithm(seed: int, with_quality: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts, classes, size = (12, 6), 2, (30, 40)
    scores = torch.rand(1, 18, classes, generator=generator)
    corner = torch.rand(1, 18, 2, generator=generator) * 30
    boxes = torch.cat((corner, corner + 10 + corner.flip(1) * 0.2), -1)
    quality = torch.rand(1, 18, generator=generator) if with_quality else None
    (found,) = detect_dense(
        scores,
        boxes,
        counts,
        [size],
        quality=quality,
        threshold=0.3,
        candidates=9,
        iou=0.5,
        keep=7,
    )

    clipped = boxes[0].clamp(min=0).minimum(torch.tensor([40.0, 30.0, 40.0, 30.0]))
    pool = []
    for rows in (range(12), range(12, 18)):
        pairs = sorted((scores[0, r, c].item(), r, c) for r in rows for c in range(classes))
        pool += [(s, r, c) for s, r, c in pairs[::-1][:9] if s > scores.new_tensor(0.3)]
    if quality is not None:
        pool = [((scores[0, r, c] * quality[0, r]).item(), r, c) for _, r, c in pool]
    kept: list[tuple[float, int, int]] = []
    for candidate in sorted(pool, reverse=True):
        rivals = [r for _, r, c in kept if c == candidate[2]]
        overlap = box_iou(clipped[candidate[1]][None], clipped[rivals])
        if not (overlap > 0.5).any():
            kept.append(candidate)
    kept = kept[:7]
    assert [round(s, 6) for s in found.scores.tolist()] == [round(s, 6) for s, _, _ in kept]
    assert found.labels.tolist() == [c for _, _, c in kept]
    assert torch.equal(found.boxes, clipped[[r for _, r, _ in kept]])
