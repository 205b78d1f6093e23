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


@pytest.mark.parametrize("case", [SMALL[1], SMALL[6]], ids=str)
def test_deterministic(case: Case) -> None:
    """test_kernels_on_gpu.py shows that it is: an interpreter has but one thread."""
    torch.use_deterministic_algorithms(True)
    try:
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


def test_operator_is_as_pytorch_demands() -> None:
    case = Case(((2, 3),), queries=3, batch=1, heads=1, points=1, channels=4)
    inputs = tuple(t.to(DEVICE).nan_to_num().requires_grad_() for t in fused_inputs(case))
    with implementation("triton"):
        torch.library.opcheck(
            torch.ops.codetr.deformable_attention_fused.default, (inputs[0], [2, 3], *inputs[1:])
        )
        grad = inputs[0].new_zeros(1, 3, 4)
        detached = [tensor.detach() for tensor in inputs]
        for with_frame in (True, False):
            torch.library.opcheck(
                torch.ops.codetr.deformable_attention_fused_backward.default,
                (grad, detached[0], [2, 3], *detached[1:], with_frame),
            )
