"""Multi-scale deformable attention: the definition, our kernels, and transformers' function.

    python benchmarks/deformable_operator.py [--device cpu|cuda] [--size 480 640] [--rounds 5]

Encoder shape (every token is a query) and decoder shape (``--queries``), forward, and forward with
backward. Outputs and all three gradients must agree with the peer's first. On a GPU the seconds are
CUDA's from a cold cache, and beside them stands the floor: the seconds in which the device copies
as many bytes as the operator must at least read and write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from clocks import bytes_per_second, clock, empty_cache
from frame import ROOT, Report, alternate, arguments, settings_of
from torch import Tensor

sys.path.insert(0, str(ROOT))

from codetr.ops import deformable_attention, implementation

PEER = "transformers"
HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of outputs and gradients, relative to the largest; sums of many terms on a GPU in any order."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Operator = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]


def of_transformers(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """transformers' module, which is the original's definition too; under autocast, as it is used:
    it samples in float32."""
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    operator = theirs.MultiScaleDeformableAttention()
    sizes = torch.tensor(shapes)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    with torch.autocast(value.device.type, torch.bfloat16, enabled=value.dtype == torch.bfloat16):
        return operator(value, sizes, shapes, starts, locations, weights, 64)


CONTENDERS: dict[str, tuple[Operator, str]] = {
    PEER: (of_transformers, "auto"),
    "definition": (deformable_attention, "reference"),
    "codetr": (deformable_attention, "auto"),
}
"""One line for each way to compute it, with the implementation that it asks for. On a CPU the
definition is what the detector calls, and stands there once."""


@dataclass(frozen=True)
class Shape:
    """The operator's sizes, and the bytes that it cannot do without."""

    batch: int
    levels: list[tuple[int, int]]
    queries: int
    precision: str

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.levels)

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Value of the precision; locations and weights in float32, as under autocast.

        A quarter of the points lies outside of the image, as at its edges. None lies where a cell
        ends: there the last bit decides which of two slopes is the gradient.
        """
        draw = torch.Generator().manual_seed(0)
        points = (self.batch, self.queries, HEADS, len(self.levels), POINTS)
        value = torch.randn(self.batch, self.tokens, HEADS, CHANNELS, generator=draw)
        sizes = torch.tensor([(w, h) for h, w in self.levels])[:, None]  # (levels, 1, 2)
        cells = (torch.rand(*points, 2, generator=draw) * 1.15 - 0.075) * sizes - 0.5
        locations = (cells.floor() + 0.05 + 0.9 * cells.frac().abs() + 0.5) / sizes
        weights = torch.randn(*points, generator=draw).flatten(3).softmax(-1).view(points)
        inputs = (value.to(DTYPES[self.precision]), locations, weights)
        return tuple(t.to(device).requires_grad_() for t in inputs)  # type: ignore[return-value]

    def floor_bytes(self, backward: bool) -> int:
        """Every input read once and every output written once.

        Forward: value, locations and weights in; the result out. Backward: these and the result's
        gradient in, their three gradients out.
        """
        size = DTYPES[self.precision].itemsize
        value = self.batch * self.tokens * HEADS * CHANNELS * size
        result = self.batch * self.queries * HEADS * CHANNELS * size
        points = self.batch * self.queries * HEADS * len(self.levels) * POINTS * (2 + 1) * 4
        forward = value + points + result
        return forward + 2 * (value + points) + result if backward else forward


def main() -> int:
    options = parse_arguments()
    report = Report(
        "What does multi-scale deformable attention take?",
        PEER,
        settings_of(options),
        ("torch", "transformers", "triton"),
        device_of(options.device),
    )
    measure(report, options)
    report.finish("deformable_operator", options.out)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=5, batch=1, queries=900, threads=2)
    add_device_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height width")
    parser.add_argument("--precisions", nargs="+", choices=[*DTYPES], default=["fp32"])


def device_of(device: str) -> dict[str, str | None]:
    """What a report says of the machine beside its processor."""
    return {"gpu": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None}


def measure(report: Report, options: argparse.Namespace) -> None:
    """All shapes and precisions on one device; notes the floors on a GPU."""
    on_gpu = torch.device(options.device).type == "cuda"
    speed = bytes_per_second(options.device) if on_gpu else None
    floors = {}
    for name, shape in shapes_of(options):
        for kind, call in (("forward", forward), ("forward + backward", backward)):
            case = f"{name}, {shape.precision}, {kind}"
            compare(report, case, call, shape, options)
            empty_cache(options.device)
            if speed:
                needed = shape.floor_bytes(call is backward)
                floors[case] = {"bytes": needed, "seconds": needed / speed}
    if speed:
        report.note(bytes_per_second=speed, floors=floors, share_of_floor=shares(report, floors))


def compare(
    report: Report, case: str, call: Callable[..., Any], shape: Shape, options: argparse.Namespace
) -> None:
    inputs = shape.inputs(options.device)
    on_gpu = torch.device(options.device).type == "cuda"
    calls = {
        name: partial(within, choice, call, operator, shape, inputs)
        for name, (operator, choice) in CONTENDERS.items()
        if on_gpu or name != "definition"
    }
    theirs = calls[PEER]()
    for name, ours in calls.items():
        if name != PEER:
            report.require_same(case, name, ours(), theirs, TOLERANCE[shape.precision])
    del theirs
    turns = {name: clock(one, options.device) for name, one in calls.items()}
    report.add(case, alternate(turns, options.rounds))


def within(choice: str, call: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """The call, backward pass and all, computed by this implementation."""
    with implementation(choice):
        return call(*arguments)


def shapes_of(options: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    height, width = options.size
    levels = [(-(-height // s), -(-width // s)) for s in STRIDES]
    tokens = sum(h * w for h, w in levels)
    for precision in options.precisions:
        yield f"encoder, {tokens} queries", Shape(options.batch, levels, tokens, precision)
        yield (
            f"decoder, {options.queries} queries",
            Shape(options.batch, levels, options.queries, precision),
        )


Inputs = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def forward(operator: Operator, shape: Shape, inputs: Inputs) -> list[Tensor]:
    value, locations, weights = inputs
    return [operator(value, shape.levels, locations, weights).float()]


def backward(operator: Operator, shape: Shape, inputs: Inputs) -> list[Tensor]:
    """The gradients of value, locations and weights."""
    value, locations, weights = inputs
    result = operator(value, shape.levels, locations, weights)
    return [*torch.autograd.grad(result, inputs, torch.ones_like(result))]


def shares(report: Report, floors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Floor by measured seconds: 1 is as fast as the memory allows."""
    measured = report.content()["measured"]
    return {
        case: {
            name: round(floor["seconds"] / values["seconds"], 3)
            for name, values in measured[case]["medians"].items()
        }
        for case, floor in floors.items()
    }


if __name__ == "__main__":
    sys.exit(main())
