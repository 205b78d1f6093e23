"""Multi-scale deformable attention: the definition, our kernels, and transformers' function.

    python benchmarks/deformable_operator.py [--device cpu|cuda] [--size 480 640] [--rounds 5]

Encoder shape (every token is a query) and decoder shape (``--queries``), forward, and forward with
backward; of locations and weights, and "from offsets": with locations and softmax computed on the
way, which is what the layers call. Outputs and all gradients must agree with the peer's first.
On a GPU the seconds are CUDA's from a cold cache, and beside them stands the floor: the seconds in
which the device copies as many bytes as the operator must at least read and write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from clocks import bytes_per_second, clock, empty_cache
from frame import ROOT, Report, alternate, arguments, settings_of
from torch import Tensor

sys.path.insert(0, str(ROOT))

from codetr.ops import deformable_attention, deformable_attention_fused, implementation

PEER = "transformers"
HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of outputs and gradients, relative to the largest; sums of many terms on a GPU in any order."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"

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


def from_offsets(
    value: Tensor, shapes: list[tuple[int, int]], offsets: Tensor, logits: Tensor
) -> Tensor:
    """transformers' module after locations and softmax, as its layer computes them."""
    centers, scales = frame_of(shapes, offsets)
    locations = centers[:, :, None, :, None] + offsets * scales[None, None, None, :, None]
    weights = logits.flatten(3).softmax(-1, dtype=torch.float32).view(logits.shape)
    return of_transformers(value, shapes, locations, weights)


def fused(value: Tensor, shapes: list[tuple[int, int]], offsets: Tensor, logits: Tensor) -> Tensor:
    return deformable_attention_fused(value, shapes, *frame_of(shapes, offsets), offsets, logits)


def frame_of(shapes: list[tuple[int, int]], offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Centers (B, Q, levels, 2) next to cells' centres, and scales (levels, 2) of one cell."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=offsets.device)
    batch, queries = offsets.shape[:2]
    # Queries walk over the map; a sixteenth of a cell beside, so that no sample lies at a kink.
    share = torch.arange(queries, device=offsets.device)[:, None, None] / queries
    cells = (torch.cat((share * 7 % 1, share), -1) * sizes).floor() + 0.5 + 1 / 16
    return (cells / sizes).expand(batch, -1, -1, -1), 1 / sizes


FROM_OFFSETS: dict[str, tuple[Operator, str]] = {
    PEER: (from_offsets, "auto"),
    "definition": (fused, "reference"),
    "codetr": (fused, "auto"),
}
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
    from_offsets: bool = False

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def tolerance(self) -> float:
        """A location's last bit in float32, in cells, grows with the map's width."""
        width = max(w for _, w in self.levels)
        return max(TOLERANCE[self.precision], 2.5 * width * 2**-23)

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Value of the precision; locations and weights in float32, as under autocast.

        A quarter of the points lies outside of the image, as at its edges. None lies where a cell
        ends: there the last bit decides which of two slopes is the gradient.
        """
        if self.from_offsets:
            return self.offsets(device)
        draw = torch.Generator().manual_seed(0)
        points = (self.batch, self.queries, HEADS, len(self.levels), POINTS)
        value = torch.randn(self.batch, self.tokens, HEADS, CHANNELS, generator=draw)
        sizes = torch.tensor([(w, h) for h, w in self.levels])[:, None]  # (levels, 1, 2)
        cells = (torch.rand(*points, 2, generator=draw) * 1.15 - 0.075) * sizes - 0.5
        locations = (cells.floor() + 0.05 + 0.9 * cells.frac().abs() + 0.5) / sizes
        weights = torch.randn(*points, generator=draw).flatten(3).softmax(-1).view(points)
        inputs = (value.to(DTYPES[self.precision]), locations, weights)
        return tuple(t.to(device).requires_grad_() for t in inputs)  # type: ignore[return-value]

    def offsets(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Value, offsets in cells and logits, all of the precision, as under autocast.

        Offsets are eighths, exact in bf16, so that with :func:`frame_of` none lies at a kink.
        """
        draw = torch.Generator().manual_seed(0)
        points = (self.batch, self.queries, HEADS, len(self.levels), POINTS)
        value = torch.randn(self.batch, self.tokens, HEADS, CHANNELS, generator=draw)
        offsets = torch.randint(-16, 17, (*points, 2), generator=draw) / 8
        inputs = (value, offsets, torch.randn(points, generator=draw))
        moved = (t.to(device, DTYPES[self.precision]).requires_grad_() for t in inputs)
        return tuple(moved)  # type: ignore[return-value]

    def floor_bytes(self, kind: str) -> int:
        """Every input read once and every output written once.

        Forward: value, locations and weights (or offsets, logits and centers) in; the result out.
        Backward: these and the result's gradient in, the gradients of value, locations and weights
        (offsets and logits) out. Locations, their weights and centers have four bytes each, under
        autocast, too; all else is of the precision.
        """
        size = DTYPES[self.precision].itemsize
        value = self.batch * self.tokens * HEADS * CHANNELS * size
        result = self.batch * self.queries * HEADS * CHANNELS * size
        places = self.batch * self.queries * len(self.levels)
        points = places * HEADS * POINTS * (2 + 1) * (size if self.from_offsets else 4)
        centers = places * 2 * 4 if self.from_offsets else 0
        forward = value + points + centers + result
        backward = forward + value + points
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[kind]


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
    for _, measure_one in cases_of(report, options):
        measure_one()


def cases_of(
    report: Report, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each case by its name: what compares and measures it, and notes what it reached."""
    for name, shape in shapes_of(options):
        for kind in (FORWARD, BOTH):
            case = f"{name}, {shape.precision}, {kind}"
            yield case, partial(measure_case, report, case, kind, shape, options)


def measure_case(
    report: Report,
    case: str,
    kind: str,
    shape: Shape,
    options: argparse.Namespace,
) -> None:
    compare(report, case, forward if kind == FORWARD else backward, shape, options)
    empty_cache(options.device)
    if torch.device(options.device).type != "cuda":
        return
    content, needed = report.content(), shape.floor_bytes(kind)
    speed = content.get("bytes_per_second") or bytes_per_second(options.device)
    floor = {"bytes": needed, "seconds": needed / speed}
    report.note(
        bytes_per_second=speed,
        floors=content.get("floors", {}) | {case: floor},
        share_of_floor=content.get("share_of_floor", {}) | {case: shares(report, case, floor)},
        times_definition=content.get("times_definition", {})
        | {case: times_definition(report, case)},
    )


def compare(
    report: Report, case: str, call: Callable[..., Any], shape: Shape, options: argparse.Namespace
) -> None:
    inputs = shape.inputs(options.device)
    contenders = FROM_OFFSETS if shape.from_offsets else CONTENDERS
    on_gpu = torch.device(options.device).type == "cuda"
    calls = {
        name: partial(within, choice, call, operator, shape, inputs)
        for name, (operator, choice) in contenders.items()
        if on_gpu or name != "definition"
    }
    theirs = calls[PEER]()
    for name, ours in calls.items():
        if name != PEER:
            report.require_same(case, name, ours(), theirs, shape.tolerance)
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
        for name, queries in (("encoder", tokens), ("decoder", options.queries)):
            for offsets in (False, True):
                shape = Shape(options.batch, levels, queries, precision, offsets)
                yield f"{name}, {queries} queries{', from offsets' * offsets}", shape


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


def shares(report: Report, case: str, floor: dict[str, float]) -> dict[str, float]:
    """Floor by measured seconds: 1 is as fast as the memory allows."""
    medians = report.content()["measured"][case]["medians"]
    return {name: round(floor["seconds"] / own["seconds"], 3) for name, own in medians.items()}


def times_definition(report: Report, case: str) -> dict[str, float]:
    """How many times as fast as our definition each contender is."""
    medians = report.content()["measured"][case]["medians"]
    theirs = medians["definition"]["seconds"]
    return {name: round(theirs / own["seconds"], 2) for name, own in medians.items()}


def floor_rows(bytes_each_second: float = 3.35e12) -> list[str]:
    """The table of floors in docs/performance.md: 800 x 1333, batch 2, on an H100."""
    levels = [(-(-800 // s), -(-1333 // s)) for s in STRIDES]
    rows = []
    for name, queries in (("encoder (Q = T)", None), ("decoder (Q = 900)", 900)):
        for precision in DTYPES:
            cells = []
            for offsets, kind in ((False, FORWARD), (True, FORWARD), (True, BACKWARD)):
                shape = Shape(2, levels, 0, precision, offsets)
                needed = replace(shape, queries=queries or shape.tokens).floor_bytes(kind)
                cells += [f"{needed / 1e6:.0f}", f"{needed / bytes_each_second * 1e6:.0f}"]
            rows.append(f"| {name}, {precision} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    sys.exit(main())
