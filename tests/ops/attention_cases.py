"""Inputs of deformable attention, and the comparison of two implementations on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codetr.ops import deformable_attention, deformable_attention_fused, implementation
from codetr.structures import Size


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; ``spread`` is how far samples lie from the map, in maps."""

    shapes: tuple[Size, ...]
    queries: int = 5
    batch: int = 2
    heads: int = 2
    points: int = 2
    channels: int = 32
    dtype: torch.dtype = torch.float64
    spread: float = 0.3

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{len(self.shapes)}levels-{self.queries}q-{self.points}p-{self.channels}ch-{kind}"


# One to five levels; head widths that fill a power of two and others; odd sizes, maps of one cell.
SMALL = [
    Case(((3, 5),), channels=8, points=1),
    Case(((3, 4), (2, 2))),
    Case(((5, 7), (3, 4), (1, 1)), channels=20, points=3, queries=9, batch=1),
    Case(((4, 6), (2, 3), (1, 2), (1, 1)), points=4, queries=3, batch=1, heads=3),
    Case(((2, 3), (6, 5), (3, 2), (2, 1), (1, 1)), channels=64, queries=4, batch=1, heads=1),
    Case(((5, 3), (2, 2)), dtype=torch.float32, queries=40, heads=1),
    Case(((5, 3), (2, 2)), dtype=torch.bfloat16, queries=40, heads=1),
    Case(((5, 3), (2, 2)), dtype=torch.float16, heads=1),
    Case(((3, 4), (2, 2)), queries=0),
    Case(((3, 4), (2, 2)), batch=0),
    # (x, y) of all samples fill more columns than the channels
    Case(((2, 3), (3, 2), (1, 1), (2, 1), (1, 1)), points=4, queries=3, batch=1, heads=1),
]
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,  # both compute in float32 and round once
    torch.bfloat16: 3e-2,
}


def plain_inputs(case: Case, *, odd: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """value, locations, weights; where ``odd``, some locations are NaN, infinite or far away."""
    draw = torch.Generator().manual_seed(0)
    head = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    tokens = sum(height * width for height, width in case.shapes)
    value = torch.randn(case.batch, tokens, case.heads, case.channels, generator=draw)
    locations = torch.rand(*head, 2, generator=draw) * (1 + 2 * case.spread) - case.spread
    weights = torch.randn(head, generator=draw).flatten(3).softmax(-1).view(head)
    # As a model has them: positions are in float32, whatever the value is in.
    exact = torch.promote_types(case.dtype, torch.float32)
    if odd and case.queries >= 3 and case.batch:
        locations[0, 0, 0, 0, 0, 0] = math.nan
        locations[0, 1, 0, -1, 0] = torch.tensor([math.inf, 0.5])
        locations[0, 2, 0, 0, 0] = torch.tensor([-math.inf, 1e30])
        locations[-1, 0, -1, -1, -1, 1] = math.nan
    return value.to(case.dtype), locations.to(exact), weights.to(case.dtype)


def fused_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """value, centers, scales, offsets, logits."""
    draw = torch.Generator().manual_seed(1)
    value, _, _ = plain_inputs(case)
    head = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    centers = torch.rand(case.batch, case.queries, len(case.shapes), 2, generator=draw)
    scales = torch.rand(case.batch, case.queries, len(case.shapes), 2, generator=draw) * case.spread
    offsets = torch.randn(*head, 2, generator=draw)
    logits = torch.randn(head, generator=draw) * 2
    if case.queries >= 3 and case.batch:
        offsets[0, 1, 0, -1, 0, 1] = math.nan
        logits[-1, 2, -1, 0, 0] = math.nan
    exact = torch.promote_types(case.dtype, torch.float32)
    return (
        value,
        centers.to(exact),
        scales.to(exact),
        offsets.to(case.dtype),
        logits.to(case.dtype),
    )


def plain(case: Case) -> Callable[..., Tensor]:
    return lambda value, *others: deformable_attention(value, list(case.shapes), *others)


def fused(case: Case) -> Callable[..., Tensor]:
    return lambda value, *others: deformable_attention_fused(value, list(case.shapes), *others)


def with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: str
) -> list[Tensor]:
    """The result and the gradient of every input, for a fixed gradient of the result."""
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
    result = function(*leaves)
    draw = torch.Generator().manual_seed(2)
    grad = torch.randn(result.shape, generator=draw).to(result)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_kernels_agree(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: str
) -> None:
    """The Triton kernels give what the definition gives, with the same NaN."""
    with implementation("reference"):
        expected = with_gradients(function, inputs, device)
    with implementation("triton"):
        actual = with_gradients(function, inputs, device)
    for index, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        assert ours.dtype == reference.dtype
        scale = reference.nan_to_num().abs().max().item() if reference.numel() else 0.0
        tolerance = TOLERANCES[inputs[0].dtype]
        torch.testing.assert_close(
            ours,
            reference,
            rtol=tolerance,
            atol=tolerance * max(scale, 1.0) / 8,
            equal_nan=True,
            msg=lambda text, index=index: f"result 0 and gradients, tensor {index}: {text}",
        )
