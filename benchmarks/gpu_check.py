"""What a GPU machine can tell: correctness first, then seconds and memory of a training step.

    python benchmarks/gpu_check.py [--device cuda] [--out benchmarks/results]

Needs the detector's own dependencies (torch, torchvision, timm, scipy, pydantic, PyYAML), neither
Ray nor MLflow. It compares every tensor of the golden folders on the device, takes a bf16 training
step, measures the training step of Co-Deformable-DETR with a ResNet-50 for K = 0, 1 and 2, and
writes one dated JSON file with the environment and the commit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frame import RESULTS, ROOT, environment, write_result

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

from replay import Golden, trace, trace_detections  # noqa: E402
from test_golden import (  # noqa: E402
    AMPLIFIED,
    AS_SETS,
    assert_matches,
    compare_detections,
    of_one_image,
)

from codetr.config import DetectorConfig  # noqa: E402
from codetr.detector import CoDETR  # noqa: E402
from codetr.structures import ImageBatch, Targets  # noqa: E402

HEADS: list[list[str]] = [[], ["atss"], ["atss", "faster_rcnn"]]
LIBRARIES = ("torch", "torchvision", "timm")
GOLDEN = ["co_deformable", *(f"co_deformable_edge/{c}" for c in ("empty1", "allempty", "trunc"))]
TOLERANCE = 1e-3
"""Of a tensor's largest value: convolutions on a GPU sum in another order than on a CPU."""


def main() -> int:
    options = parse_arguments()
    # Compare in full float32; speed is measured in bf16.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report: dict[str, Any] = {"environment": {**environment(LIBRARIES), "gpu": gpu}}
    report["golden"] = {name: check_golden(name, options.device) for name in GOLDEN}
    for precision in options.precisions:
        report[precision] = [measure(heads, precision, options) for heads in HEADS]
    file = write_result("gpu_check", report, options.out)
    print(json.dumps(report, indent=1))
    print(f"written to {file}")
    failed = [name for name, result in report["golden"].items() if result["failures"]]
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="height width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--objects", type=int, default=7, help="in each image; COCO has 7.3")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    return parser.parse_args()


def check_golden(name: str, device: str) -> dict[str, Any]:
    """How many recorded tensors match on the device, and which do not."""
    golden = Golden(ROOT / "tests" / "golden" / name, device)
    ours = trace(golden)
    failures, compared = [], 0
    for tensor, expected in golden.outputs.items():
        if tensor.startswith((*AS_SETS, "21_randperm", "24_grad_norm")):
            continue
        actual = ours[tensor] if tensor in ours else of_one_image(tensor, ours)
        try:
            assert_matches(tensor, actual, expected, TOLERANCE * (5 if tensor in AMPLIFIED else 1))
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
        compared += 1
    detections = trace_detections(golden)
    for tensor in golden.outputs:
        if tensor.startswith("31_det.") and tensor.endswith(".boxes"):
            try:
                compare_detections(tensor.removesuffix(".boxes"), detections, golden.outputs)
            except AssertionError as error:
                failures.append(f"{tensor}: {str(error).splitlines()[0]}")
            compared += 1
    return {"compared": compared, "failures": failures}


def measure(heads: list[str], precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds and peak memory of a training step, and of inference."""
    torch.manual_seed(0)
    config = DetectorConfig.model_validate({"backbone": {"pretrained": False}, "heads": heads})
    model = CoDETR(config).to(options.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    batch, targets = synthetic(options, config.num_classes)
    kind = torch.device(options.device).type
    enabled = precision == "bf16"

    def step() -> float:
        with torch.autocast(kind, torch.bfloat16, enabled=enabled):
            total = model.losses(batch, targets).total
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return float(total.detach())

    def infer() -> float:
        with torch.autocast(kind, torch.bfloat16, enabled=enabled):
            return float(len(model.detect(batch)))

    model.train()
    training = timed(step, options)
    assert all(math.isfinite(loss) for loss in training.pop("values")), "a loss is not finite"
    model.eval()
    inference = timed(infer, options)
    inference.pop("values")
    return {"k": len(heads), "heads": heads, "training": training, "inference": inference}


def synthetic(options: argparse.Namespace, classes: int) -> tuple[ImageBatch, list[Targets]]:
    """Noise images of full size, with boxes of COCO's spread of sizes."""
    height, width = options.size
    draw = torch.Generator().manual_seed(0)
    targets = []
    for image in range(options.batch):
        centre = torch.rand(options.objects, 2, generator=draw)
        side = 0.05 * 12 ** torch.rand(options.objects, 2, generator=draw)
        boxes = torch.cat((centre - side / 2, centre + side / 2), 1).clamp(0, 1)
        boxes = boxes * torch.tensor([width, height, width, height])
        labels = torch.randint(classes, (options.objects,), generator=draw)
        targets.append(Targets(boxes, labels, image, (height, width), image).to(options.device))
    pixels = torch.randn(options.batch, 3, height, width, generator=draw)
    return ImageBatch(pixels, [(height, width)] * options.batch).to(options.device), targets


def timed(call: Callable[[], float], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each call after three that warm up; peak memory of all of them."""
    on_gpu = torch.device(options.device).type == "cuda"
    for _ in range(3):
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, values = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        values.append(call())  # reads a number from the device: the call is over when it returns
        seconds.append(time.perf_counter() - start)
    return {
        "median_seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "values": values,
    }


if __name__ == "__main__":
    sys.exit(main())
