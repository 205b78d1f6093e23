"""How a recorded tensor is compared with ours; without pytest, for machines that have none."""

from __future__ import annotations

import torch
from replay import Trace
from torch import Tensor

# Near ties order these differently after a change in the last bit: they are compared as sets.
AS_SETS = ("15_rpn_proposals", "30_test.rpn_proposals", "31_det.")

# Group norm on the extra level's map of 1 x 2 cells (level 4 of Co-Deformable-DETR, 5 of Co-DINO),
# one channel in each group, divides the difference of two numbers by itself: what is left is
# rounding, magnified (method.md 6).
AMPLIFIED = {
    f"{output}.{level}"
    for output in ("13_rpn.cls", "13_rpn.reg", "18_atss.cls", "18_atss.reg", "18_atss.ctr")
    for level in (4, 5)
}


def assert_matches(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Integers exactly, floats to ``tolerance`` of the expected tensor's largest value."""
    actual = actual.detach().cpu()
    assert actual.shape == expected.shape, name
    if not expected.is_floating_point():
        assert torch.equal(actual.long(), expected.long()), name
        return
    assert torch.equal(actual.isinf(), expected.isinf()), name
    finite = expected.isfinite()
    difference = (actual - expected)[finite].abs()
    scale = expected[finite].abs().max() if finite.any() else torch.tensor(1.0)
    worst = difference.max() if len(difference) else torch.tensor(0.0)
    assert worst <= tolerance * max(scale, 1e-3), f"{name}: {worst} of {scale}"


def of_one_image(name: str, trace: Trace) -> Tensor:
    """A tensor stored for the second image alone is cut out of the batch's."""
    base = name.removesuffix(".img1").replace("unact_img1", "unact")
    return trace[base][1]


def compare_detections(prefix: str, actual: Trace, expected: Trace) -> None:
    boxes, scores, labels = (
        [side[f"{prefix}.{part}"].cpu() for side in (actual, expected)]
        for part in ("boxes", "scores", "labels")
    )
    assert len(scores[0]) == len(scores[1]), prefix
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-4, msg=prefix)
    distance = (boxes[0][:, None] - boxes[1][None]).abs().amax(-1)
    distance = distance + 1e6 * (labels[0][:, None] != labels[1][None])
    distance = distance + 1e6 * ((scores[0][:, None] - scores[1][None]).abs() > 1e-3)
    unmatched = (distance.amin(0) > 1e-4 * boxes[1].abs().max().clamp(min=1) * 10).sum()
    # Detections whose scores tie at the cut may be exchanged for one another.
    assert unmatched <= 1, f"{prefix}: {unmatched} detections differ"
