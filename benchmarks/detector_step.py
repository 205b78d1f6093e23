"""Co-Deformable-DETR, ResNet-50: seconds and memory of a training step and of inference.

    python benchmarks/detector_step.py [--rounds 7] [--size 256 320] [--small]

The peer is transformers' Deformable DETR of the same sizes: two-stage, box refinement, 300 queries,
256 channels, 6 + 6 layers, one image with 5 objects, 2 threads. With equal weights both must give
equal logits, boxes, losses and detections first. Each contender has a process of its own, which
waits while others compute: its peak memory is that of inference alone, then of training as well,
with all libraries.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack

# Threads that spin while they wait would compute against the other contenders; before torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectors import HEADS, PEER, PLAIN, R50, SMALL, Task, build, computed
from elsewhere import Elsewhere
from frame import Report, alternate, arguments, settings_of

TOLERANCE = 1e-4


def main() -> int:
    options = parse_arguments(__doc__, rounds=7)
    report, task = begin(
        "What do a training step and inference of Co-Deformable-DETR take?", options
    )
    with ExitStack() as processes:
        contenders = {
            name: processes.enter_context(Elsewhere(build, task, name))
            for name in (PEER, PLAIN, *HEADS)
        }
        report.note(built_mib={name: round(p.built_mib) for name, p in contenders.items()})
        for action in ("inference", "training step"):
            turns = {name: process.measure(action) for name, process in contenders.items()}
            report.add(action, alternate(turns, options.rounds))
    report.finish("detector_step", options.out)
    return 0


def begin(question: str, options: argparse.Namespace) -> tuple[Report, Task]:
    """What these options measure, once ours and the peer have been shown to agree on it."""
    task = Task(
        SMALL if options.small else R50, tuple(options.size), options.batch, options.objects
    )
    report = Report(
        question, PEER, settings_of(options), ("torch", "torchvision", "timm", "transformers")
    )
    require_agreement(report, task)
    return report, task


def parse_arguments(doc: str | None, rounds: int) -> argparse.Namespace:
    parser = arguments(doc, rounds=rounds, batch=1, objects=5)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height width")
    parser.add_argument("--small", action="store_true", help="a small detector, to try this out")
    return parser.parse_args()


def agreement(task: Task) -> dict[str, object]:
    """What a process of its own is asked for, so that its memory is nobody else's."""
    return {"compute": lambda: computed(task)}


def require_agreement(report: Report, task: Task) -> None:
    with Elsewhere(agreement, task) as process:
        pairs, _ = process.do("compute")
    for case in ("inference", "training step"):
        for what, (ours, theirs) in pairs.items():
            exact = what == "trained parameters"
            report.require_same(case, what, ours, theirs, 0.0 if exact else TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
