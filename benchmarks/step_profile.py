"""Where a training step of Co-Deformable-DETR goes: seconds of its operators, by kind.

    python benchmarks/step_profile.py [--rounds 3] [--size 256 320] [--small]

The step is that of ``detector_step.py``, beside the same peer; here each runs under PyTorch's
profiler. An operator's seconds are those of its own code, without the operators that it calls, and
every operator belongs to one kind: the kinds add up to the step, which profiling makes longer.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detector_step import begin, parse_arguments
from detectors import PEER, Task, build
from elsewhere import Elsewhere
from frame import Sample
from torch.profiler import ProfilerActivity, profile

CONTENDERS = (PEER, "K = 0", "K = 2")
REGION = 256 * 7 * 7
"""Numbers of each region that Faster R-CNN's first fully connected layer reads."""

WHOLE = "the whole step"
PRODUCTS, FIRST_LAYER = "matrix products", "those of Faster R-CNN's first layer"
OTHERS = "copies, sums and all else"
KINDS = {
    PRODUCTS: r"aten::(mm|addmm_?|bmm|baddbmm_?)",
    "convolutions": r".*conv.*",
    "attention among queries": r".*scaled_dot_product.*",
    "deformable sampling": r".*(grid_sampler|embedding_bag|sampled_addmm).*",
    "RoIAlign and NMS": r"torchvision::.*",
    "norms": r".*(layer|group|batch)_norm.*",
    "optimiser": r".*(_fused_adamw|linalg_vector_norm).*",
}
"""What the names of each kind's operators look like."""


def main() -> int:
    options = parse_arguments(__doc__, rounds=3)
    report, task = begin("Where does a training step of Co-Deformable-DETR go?", options)
    samples: dict[str, dict[str, list[Sample]]] = {}
    with ExitStack() as processes:
        contenders = {
            name: processes.enter_context(Elsewhere(profiled, task, name)) for name in CONTENDERS
        }
        for number in range(1 + options.rounds):
            for name, process in contenders.items():
                seconds, _ = process.do("profile")
                for kind, value in seconds.items() if number else ():
                    of_kind = samples.setdefault(kind, {})
                    of_kind.setdefault(name, []).append({"seconds": value})
    for kind, of_kind in samples.items():
        report.add(kind, of_kind, agreed="training step")
    report.finish("step_profile", options.out)
    return 0


def profiled(task: Task, contender: str) -> dict[str, Callable[[], Any]]:
    """A training step under the profiler, for a process of its own."""
    step = build(task, contender)["training step"]

    def seconds_by_kind() -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            step()
        found = Counter(dict.fromkeys([WHOLE, PRODUCTS, FIRST_LAYER, *KINDS, OTHERS], 0.0))
        for event in seen.key_averages(group_by_input_shape=True):
            seconds = event.self_cpu_time_total / 1e6
            found[kind_of(event.key, event.input_shapes)] += seconds
            found[WHOLE] += seconds
        return dict(found)

    return {"profile": seconds_by_kind}


def kind_of(operator: str, shapes: list[list[int]]) -> str:
    """What the operator is counted as.

    Args:
        operator: its name, as ``aten::mm``.
        shapes: of its inputs; empty for what is no tensor.
    """
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, operator):
            wide = kind == PRODUCTS and any(REGION in shape for shape in shapes)
            return FIRST_LAYER if wide else kind
    return OTHERS


if __name__ == "__main__":
    sys.exit(main())
