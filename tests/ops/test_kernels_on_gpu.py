"""The Triton kernels at the sizes of a training, on a GPU (``pytest tests/ops``)."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, fused, fused_inputs, plain, plain_inputs, with_gradients
from torch import Tensor

from codetr.ops import implementation
from codetr.ops.switch import uses_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MAPS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of 800 x 1333
TOKENS = sum(height * width for height, width in MAPS)
CASES = [
    Case(MAPS, queries, heads=8, points=4, dtype=dtype, spread=0.1)
    for queries in (900, TOKENS)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_agrees_with_the_definition(kind: str, case: Case) -> None:
    """Almost everywhere: at a cell's centre the gradient of a location jumps, and there a last
    digit decides."""
    function, inputs = _problem(kind, case)
    with implementation("reference"):
        expected = with_gradients(function, inputs, "cuda")
    with implementation("triton"):
        actual = with_gradients(function, inputs, "cuda")
    tolerance = 2e-4 if case.dtype == torch.float32 else 2e-2
    for index, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        scale = reference.float().nan_to_num().abs().mean()
        close = torch.isclose(
            ours.float(), reference.float(), tolerance, tolerance * scale.item(), equal_nan=True
        )
        assert close.float().mean() > 0.999, f"tensor {index}: {close.float().mean()} are close"


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_deterministic_on_request(kind: str) -> None:
    function, inputs = _problem(kind, CASES[1])
    torch.use_deterministic_algorithms(True)
    try:
        with implementation("triton"):
            runs = [with_gradients(function, inputs, "cuda") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_chosen_by_itself() -> None:
    pytest.importorskip("triton")
    with implementation("auto"):
        assert uses_triton(torch.device("cuda"))


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_compiled(kind: str) -> None:
    function, inputs = _problem(kind, CASES[1])
    with implementation("triton"):
        expected = with_gradients(function, inputs, "cuda")
        actual = with_gradients(torch.compile(function, fullgraph=True), inputs, "cuda")
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2, equal_nan=True)


def _problem(kind: str, case: Case):
    if kind == "plain":
        return plain(case), _without_nan(plain_inputs(case, odd=False))
    return fused(case), _without_nan(fused_inputs(case))


def _without_nan(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.nan_to_num() for tensor in inputs)
