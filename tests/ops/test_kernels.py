"""The Triton kernels against the definition: on a GPU, or under Triton's interpreter.

Without either, tests/ops/test_kernels_interpreted.py runs this file in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import (
    SMALL,
    Case,
    assert_kernels_agree,
    fused,
    fused_inputs,
    plain,
    plain_inputs,
)

from codetr.ops import deformable_attention_fused, implementation

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_plain(case: Case) -> None:
    assert_kernels_agree(plain(case), plain_inputs(case), DEVICE)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fused(case: Case) -> None:
    assert_kernels_agree(fused(case), fused_inputs(case), DEVICE)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_deterministic(case: Case) -> None:
    """test_kernels_on_gpu.py shows that it is: an interpreter has but one thread.

    PyTorch then fills new memory with NaN: what is equal nevertheless was written.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        assert_kernels_agree(plain(case), plain_inputs(case), DEVICE)
        assert_kernels_agree(fused(case), fused_inputs(case), DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)


def test_frame_of_an_encoder() -> None:
    """Scales of all queries alike, and no gradient asked of centers and scales."""
    case = SMALL[1]
    value, centers, scales, offsets, logits = (t.to(DEVICE) for t in fused_inputs(case))
    scales = scales[0, 0].clone()

    def function(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return deformable_attention_fused(value, list(case.shapes), centers, scales, *others)

    assert_kernels_agree(function, (value, offsets, logits), DEVICE)


def test_views() -> None:
    """Neither value nor offsets need be contiguous."""
    case = SMALL[1]
    value, *others = fused_inputs(case)
    strided = value.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    others[2] = torch.cat((others[2], others[2]), -1)[..., :2]
    assert_kernels_agree(fused(case), (strided, *others), DEVICE)


@pytest.mark.parametrize(
    "part",
    [(..., slice(1)), (slice(None), slice(None), slice(1), slice(1)), (0, 0, 0, slice(1))],
    ids=["axes alike", "levels and axes alike", "one number"],
)
def test_frames_that_are_views(part: tuple) -> None:
    """x and y need not be neighbours in memory, nor differ."""
    case = SMALL[3]
    value, centers, scales, *others = fused_inputs(case)
    centers = torch.stack(centers.unbind(-1)).movedim(0, -1)
    assert centers.stride(-1) != 1
    scales = scales[part]
    assert_kernels_agree(fused(case), (value, centers, scales, *others), DEVICE)
    # What a view repeats is a leaf of its own: its gradient has all of its elements.
    repeated = scales.expand(centers.shape)
    assert_kernels_agree(fused(case), (value, centers, repeated, *others), DEVICE)


def test_a_frozen_value() -> None:
    """Its gradient is not computed, and the others are as with it."""
    case = SMALL[1]
    for function, (value, *others) in (
        (plain(case), plain_inputs(case)),
        (fused(case), fused_inputs(case)),
    ):
        frozen = value.to(DEVICE)
        assert_kernels_agree(lambda *rest, f=function, v=frozen: f(v, *rest), tuple(others), DEVICE)


def test_operator_is_as_pytorch_demands() -> None:
    case = Case(((2, 3),), queries=3, batch=1, heads=1, points=1, channels=4)
    inputs = tuple(t.to(DEVICE).nan_to_num().requires_grad_() for t in fused_inputs(case))
    with implementation("triton"):
        torch.library.opcheck(
            torch.ops.codetr.deformable_attention_fused.default, (inputs[0], [2, 3], *inputs[1:])
        )
        grad = inputs[0].new_zeros(1, 3, 4)
        detached = [tensor.detach() for tensor in inputs]
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.codetr.deformable_attention_fused_backward.default,
                (grad, detached[0], [2, 3], *detached[1:], *wanted),
            )
