"""All that a GPU can tell, in one file: correctness first, then seconds and memory.

    python benchmarks/gpu.py [--budget 500] [--size 800 1333]
    python benchmarks/gpu.py --device cpu --small --size 64 96 --rounds 1    # to try it out

Stages, in this order: the golden folders on the device; the tests of the kernels; the operator and
its floor; equal logits, boxes, losses and detections of ours and of transformers' detector; their
training step and inference in bf16 for K = 0, 1 and 2, then compiled, then in fp32. The operator
needs torch, triton and transformers; the detector torchvision, timm, pydantic, scipy and PyYAML
besides; with pytest the kernels' own tests run, without it their cases. A stage that fails, that
something is missing for, or for which no time is left, is named in the result, and the exit status
says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import deformable_operator
import torch
from clocks import clock, empty_cache
from deformable_operator import PEER
from frame import ROOT, Disagreement, Report, Sample, arguments, settings_of

if TYPE_CHECKING:
    from detectors import Ours, Task

DETECTOR_NEEDS = ("torchvision", "timm", "pydantic", "scipy", "yaml")
GOLDEN = ["co_deformable", *(f"co_deformable_edge/{c}" for c in ("empty1", "allempty", "trunc"))]
GOLDEN_TOLERANCE = 1e-3
"""Of a tensor's largest value: convolutions on a GPU sum in another order than on a CPU."""
COMPUTED_TOLERANCE = 1e-3
KERNEL_TESTS = [ROOT / "tests" / "ops" / f"test_kernels{on}.py" for on in ("", "_on_gpu")]
AGREED = "Co-Deformable-DETR, K = 0, and transformers' detector"

PAPER = {"K = 0": (12808, 70), "K = 1": (13947, 86), "K = 2": (14387, 120)}
"""Memory in MB of each GPU, and GPU-hours: the paper's table 7 (Deformable-DETR++, ResNet-50)."""


@dataclass
class Stages:
    """Runs stages while there is time.

    Attributes:
        seconds: for all stages; what still runs then is stopped.
        failed: what went wrong, by stage.
        left_out: stages that were not begun, with the reason.
        took: seconds of each stage.
    """

    seconds: float
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    _begin: float = field(default_factory=time.monotonic)

    def run(self, name: str, needs: float, stage: Callable[[], Any]) -> bool:
        """One stage, if the ``needs`` seconds that it should take are left; was it begun?"""
        left = self.seconds - (time.monotonic() - self._begin)
        if left < needs:
            self.left_out[name] = f"{left:.0f} s left, {needs:.0f} s needed"
            return False
        print(f"{name} …", flush=True)
        begin = time.monotonic()
        try:
            with stopped_after(left):
                stage()
        except LeftOut as reason:
            self.left_out[name] = str(reason)
        except (Exception, Disagreement) as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {self.failed[name]}", file=sys.stderr)
        self.took[name] = round(time.monotonic() - begin, 1)
        return True


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise :class:`LeftOut` in what takes longer; a single call into a library is not broken."""

    def stop(*_: Any) -> None:
        raise LeftOut(f"stopped after {seconds:.0f} s, when no time was left")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class LeftOut(BaseException):
    """A stage cannot be run here; its text says why.

    It may come from a signal, in the midst of what turns every Exception into another.
    """


def main() -> int:
    options = parse_arguments()
    # Compare in full float32; speed is measured in bf16.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(
        "What does a GPU compute, in what time and memory?",
        PEER,
        settings_of(options),
        ("torch", "torchvision", "timm", "triton", "transformers"),
        deformable_operator.device_of(options.device),
    )
    stages = Stages(options.budget)
    run_stages(stages, report, options)
    report.note(
        memory_beside_paper=beside_paper(report),
        seconds_of_stages=stages.took,
        left_out=stages.left_out,
        failed=stages.failed,
    )
    report.finish("gpu", options.out)
    for name, reason in {**stages.left_out, **stages.failed}.items():
        print(f"NOT MEASURED  {name}: {reason}")
    return 1 if stages.failed or stages.left_out else 0


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=10, batch=2, objects=7, queries=900, budget=500)
    deformable_operator.add_device_arguments(parser)
    parser.set_defaults(device="cuda", size=(800, 1333), precisions=["fp32", "bf16"])
    parser.add_argument("--small", action="store_true", help="a small detector, to try this out")
    parser.add_argument("--without-compile", action="store_true", help="no torch.compile")
    return parser.parse_args()


def run_stages(stages: Stages, report: Report, options: argparse.Namespace) -> None:
    stages.run("golden folders", 60, lambda: check_golden(report, options.device))
    stages.run("tests of the kernels", 60, lambda: run_kernel_tests(report, options.device))
    for case, measure in deformable_operator.cases_of(report, options):
        stages.run(f"operator: {case}", 5, measure)
    if missing := missing_modules():
        stages.left_out["detector"] = missing
        return
    from detectors import R50, SMALL, Task

    detector, size = SMALL if options.small else R50, tuple(options.size)
    task = Task(detector, size, options.batch, options.objects, "fp32", options.device)
    stages.run("agreement", 20, lambda: require_agreement(report, task))
    exact: dict[str, float] = {}
    stages.run("losses in fp32", 40, lambda: exact.update(exact_losses(task)))
    for mode in MODES if not options.without_compile else (m for m in MODES if "compile" not in m):
        measure_mode(stages, Measured(report, task, exact, options.rounds), mode)


# ------------------------------------------------------------------------------------- correctness


def check_golden(report: Report, device: str) -> None:
    """Every tensor that the original computed, against ours on the device."""
    if missing := missing_modules():
        raise LeftOut(missing)
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    from comparison import AMPLIFIED, AS_SETS, assert_matches, compare_detections, of_one_image
    from replay import Golden, trace, trace_detections

    compared, failures = 0, []

    def check(compare: Callable[..., None], *values: Any) -> None:
        nonlocal compared
        compared += 1
        try:
            compare(*values)
        except AssertionError as error:
            failures.append(f"{folder}: {str(error).splitlines()[0]}")

    for folder in GOLDEN:
        golden = Golden(ROOT / "tests" / "golden" / folder, device)
        ours, detections = trace(golden), trace_detections(golden)
        for name, expected in golden.outputs.items():
            if name.startswith("31_det.") and name.endswith(".boxes"):
                check(compare_detections, name.removesuffix(".boxes"), detections, golden.outputs)
            if not name.startswith((*AS_SETS, "21_randperm", "24_grad_norm")):
                actual = ours[name] if name in ours else of_one_image(name, ours)
                tolerance = GOLDEN_TOLERANCE * (5 if name in AMPLIFIED else 1)
                check(assert_matches, name, actual, expected, tolerance)
    report.note(golden={"compared": compared, "failures": failures})
    if failures:
        raise Disagreement(f"{len(failures)} of {compared} recorded tensors differ: {failures[0]}")


def run_kernel_tests(report: Report, device: str) -> None:
    """The kernels against the definition, in the sizes and corner cases of their own tests."""
    if torch.device(device).type != "cuda":
        raise LeftOut("there is no GPU")
    if importlib.util.find_spec("pytest") is None:
        report.note(kernel_tests=f"{check_kernels(device)} cases agree, without pytest")
        return
    # Without conftest.py, which wants hypothesis.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", *map(str, KERNEL_TESTS)]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    report.note(kernel_tests=last)
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise Disagreement(last)


def check_kernels(device: str) -> int:
    """The cases of the kernels' tests alone; how many."""
    sys.path.insert(0, str(ROOT / "tests" / "ops"))
    from attention_cases import (
        SMALL,
        assert_kernels_agree,
        fused,
        fused_inputs,
        plain,
        plain_inputs,
    )

    for case in SMALL:
        assert_kernels_agree(plain(case), plain_inputs(case), device)
        assert_kernels_agree(fused(case), fused_inputs(case), device)
    return 2 * len(SMALL)


def missing_modules() -> str:
    """What the detector needs and this machine lacks, and how to come by it; or nothing."""
    missing = [name for name in DETECTOR_NEEDS if importlib.util.find_spec(name) is None]
    names = " ".join("pyyaml" if name == "yaml" else name for name in missing)
    return f"the detector needs what is missing: pip install {names}" if missing else ""


def require_agreement(report: Report, task: Task) -> None:
    """Of the detector without heads with transformers'; the golden folders know the heads."""
    from detectors import computed

    for what, (ours, theirs) in computed(task).items():
        report.require_same(AGREED, what, ours, theirs, COMPUTED_TOLERANCE)
    free(task.device)


# ---------------------------------------------------------------------------------- seconds, memory


MODES = {"bf16": ("bf16", False), "bf16, compiled": ("bf16", True), "fp32": ("fp32", False)}
"""Precision, and whether ours is compiled; transformers' detector never is."""
MODE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Of the first loss, beside that in fp32: bf16 has three digits, and may match other queries."""
ACTIONS = ("training step", "inference")


@dataclass(frozen=True)
class Measured:
    """What every mode is measured on.

    Attributes:
        report: of all modes.
        task: in fp32.
        exact: :func:`exact_losses`.
        rounds: samples of each contender.
    """

    report: Report
    task: Task
    exact: dict[str, float]
    rounds: int


def exact_losses(task: Task) -> dict[str, float]:
    """The total loss of each of ours before its first step, in fp32 and not compiled."""
    from detectors import HEADS, PLAIN, Ours

    losses = {}
    for name in (PLAIN, *HEADS):
        losses[name] = first_loss(Ours(task, name))
        free(task.device)
    return losses


def first_loss(contender: Ours) -> float:
    """The total loss before a first step, with the same random draws for every contender."""
    torch.manual_seed(0)
    return contender.training_step()


def require_exact(measured: Measured, mode: str, name: str, loss: float) -> None:
    """That a mode computes what fp32 does, to its own rounding.

    Raises:
        LeftOut: nothing is known to compare with.
        Disagreement: it does not.
    """
    if name not in measured.exact:
        raise LeftOut("the loss in fp32 is not known")
    tolerance = MODE_TOLERANCE[MODES[mode][0]]
    what = f"{name}: first loss, relative"
    measured.report.require_same(mode, what, loss / measured.exact[name], 1.0, tolerance)


def measure_mode(stages: Stages, measured: Measured, mode: str) -> None:
    """One contender after the other, each alone on the device."""
    from detectors import HEADS, PLAIN, Ours, Theirs

    precision, compiled = MODES[mode]
    task = replace(measured.task, precision=precision)
    samples: dict[str, dict[str, list[Sample]]] = {action: {} for action in ACTIONS}

    def stage(name: str) -> None:
        contender = Theirs(task) if name == PEER else Ours(task, name, compiled)
        if isinstance(contender, Ours):
            require_exact(measured, mode, name, first_loss(contender))
        for action, call in zip(
            ACTIONS, (contender.training_step, contender.inference), strict=True
        ):
            measure = clock(call, task.device, whole=True)
            for _ in range(3):  # warm up, compile
                call()
            samples[action][name] = [measure() for _ in range(measured.rounds)]

    for name in (PEER, *([] if compiled else [PLAIN]), *HEADS):
        needs = 60 if compiled and name != PEER else 15
        if stages.run(f"{mode}: {name}", needs, lambda n=name: stage(n)):
            free(task.device)
    for action, of_action in samples.items():
        if PEER in of_action:
            case = f"{action}, {mode}"
            stages.run(case, 0, lambda c=case, s=of_action: measured.report.add(c, s, AGREED))


def free(device: str) -> None:
    """Forget compiled code and memory of what was measured last."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # takes seconds to import
        torch.compiler.reset()
    empty_cache(device)


def beside_paper(report: Report) -> dict[str, dict[str, float]]:
    """Peak memory and seconds of a step in bf16 as multiples of K = 0, and the paper's."""
    measured = report.content()["measured"].get("training step, bf16", {"medians": {}})["medians"]
    base = measured.get("K = 0", {})
    rows = {}
    for name, (megabytes, hours) in PAPER.items():
        own = measured.get(name, {})
        rows[name] = {
            "memory_in_the_paper": round(megabytes / PAPER["K = 0"][0], 3),
            "hours_in_the_paper": round(hours / PAPER["K = 0"][1], 3),
        } | {key: round(own[key] / base[key], 3) for key in own if key in base}
    return rows


if __name__ == "__main__":
    sys.exit(main())
