"""Each benchmark compares before it measures, and refuses where ours and the peer differ."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import analyses
import deformable_operator
import detector_step
import detectors
import evaluation
import gpu
import loading
import pytest
import scaling
import step_profile
import torch
from elsewhere import Elsewhere
from frame import Disagreement, Report

from codetr.analysis import CATALOGUE
from codetr.metrics import evaluate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TASK = detectors.Task(detectors.SMALL, (64, 96), batch=1, objects=3)


def run(monkeypatch: pytest.MonkeyPatch, script: Any, tmp_path: Path, *words: str) -> list[Any]:
    """The content of the files that a benchmark writes."""
    monkeypatch.setattr(sys, "argv", ["benchmark", "--rounds", "1", "--out", str(tmp_path), *words])
    script.main()
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]


# -------------------------------------------------------------------------------------- operator


OPERATOR = (
    "--size", "64", "96", "--queries", "10", "--precisions", "fp32", "bf16", "--threads", "1",
)  # fmt: skip


def test_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (content,) = run(monkeypatch, deformable_operator, tmp_path, *OPERATOR)
    assert len(content["measured"]) == 16
    assert "decoder, 10 queries, from offsets, fp32, forward + backward" in content["measured"]
    assert content["measured"].keys() == content["agreement"].keys()
    assert "encoder, 128 queries, bf16, forward + backward" in content["measured"]


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_an_operator_that_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    def operator(value: Any, shapes: Any, locations: Any, weights: Any) -> Any:
        if wrong == "gradient":
            locations = locations.detach() + 0 * locations
        result = deformable_operator.of_transformers(value, shapes, locations, weights)
        return result * 1.001 if wrong == "output" else result

    monkeypatch.setitem(deformable_operator.CONTENDERS, "codetr", (operator, "auto"))
    with pytest.raises(Disagreement, match="codetr of ours and of transformers differ"):
        run(monkeypatch, deformable_operator, tmp_path, *OPERATOR)
    assert not [*tmp_path.iterdir()]


def test_the_floor_counts_every_byte_once() -> None:
    shape = deformable_operator.Shape(2, [(4, 6), (2, 3)], 7, "bf16")
    value, locations, weights = shape.inputs("cpu")
    with torch.no_grad():
        result = deformable_operator.of_transformers(value, shape.levels, locations, weights)
    read = sum(t.numel() * t.element_size() for t in (value, locations, weights))
    written = result.numel() * 2  # theirs is float32 under autocast
    assert shape.floor_bytes("forward") == read + written
    assert shape.floor_bytes("backward") == 2 * read + written
    assert shape.floor_bytes("forward + backward") == 3 * read + 2 * written


def test_the_floor_from_offsets() -> None:
    shape = deformable_operator.Shape(2, [(4, 6), (2, 3)], 7, "bf16", from_offsets=True)
    inputs = shape.inputs("cpu")
    centers, _ = deformable_operator.frame_of(shape.levels, inputs[1])
    read = sum(t.numel() * t.element_size() for t in inputs)
    result = 2 * 7 * 8 * 32 * 2
    frame = centers.numel() * 4
    assert shape.floor_bytes("forward") == read + frame + result
    assert shape.floor_bytes("backward") == 2 * read + frame + result


def test_the_documented_floors() -> None:
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    for row in deformable_operator.floor_rows():
        assert row in text


# --------------------------------------------------------------------------- training and inference


def test_detectors_compute_the_same() -> None:
    report = Report("", detectors.PEER, {})
    detector_step.require_agreement(report, TASK)
    agreed = report.content()["agreement"]["training step"]
    assert agreed.keys() == {"logits", "boxes", "losses", "scores", "trained parameters"}


def test_detectors_with_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers_deformable

    monkeypatch.setattr(transformers_deformable, "load_peer_weights", lambda *_: None)
    report = Report("", detectors.PEER, {})
    with pytest.raises(Disagreement, match="logits"):
        gpu.require_agreement(report, TASK)


@pytest.mark.parametrize("name", [detectors.PEER, detectors.PLAIN, "K = 2"])
def test_a_step_trains(name: str) -> None:
    torch.manual_seed(0)
    contender = detectors.Theirs(TASK) if name == detectors.PEER else detectors.Ours(TASK, name)
    assert len(contender.inference()) == 1
    losses = [contender.training_step() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_kinds_of_operators_add_up_to_the_step() -> None:
    actions = step_profile.profiled(TASK, "K = 2")
    seconds = actions["profile"]()
    whole = seconds.pop(step_profile.WHOLE)
    assert whole > 0
    assert sum(seconds.values()) == pytest.approx(whole)
    assert all(seconds[kind] > 0 for kind in step_profile.KINDS)


@pytest.mark.parametrize(
    ("operator", "shapes", "kind"),
    [
        ("aten::mm", [[1024, 512], [512, 12544]], step_profile.FIRST_LAYER),
        ("aten::mm", [[900, 256], [256, 256]], step_profile.PRODUCTS),
        ("aten::mul", [[512, 12544], []], step_profile.OTHERS),
        ("aten::convolution_backward", [[1, 256, 4, 5]], "convolutions"),
        ("torchvision::roi_align", [], "RoIAlign and NMS"),
    ],
)
def test_what_an_operator_is_counted_as(operator: str, shapes: list[Any], kind: str) -> None:
    assert step_profile.kind_of(operator, shapes) == kind


# ------------------------------------------------------------------------------------- evaluation


SMALL_EVALUATION = ("--images", "12", "--lvis-images", "8")


def test_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coco, lvis = run(monkeypatch, evaluation, tmp_path, *SMALL_EVALUATION)
    assert (coco["peer"], lvis["peer"]) == ("pycocotools", "lvis")
    for content in (coco, lvis):
        (agreement,) = content["agreement"].values()
        assert agreement.keys() == {"summary", "AP of each class"}


def test_metrics_that_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slightly_wrong(*arguments: Any) -> Any:
        right = evaluate(*arguments)
        return replace(right, summary={**right.summary, "AP": right.summary["AP"] + 1e-6})

    monkeypatch.setattr(evaluation, "evaluate", slightly_wrong)
    with pytest.raises(Disagreement, match="summary of ours and of pycocotools"):
        run(monkeypatch, evaluation, tmp_path, *SMALL_EVALUATION)


# ---------------------------------------------------------------------------------------- loading


IMAGES = ("--images", "4", "--height", "120", "--width", "160", "--workers", "0")


def test_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (content,) = run(monkeypatch, loading, tmp_path, *IMAGES)
    (agreement,) = content["agreement"].values()
    assert {"pixels", "boxes", "labels"} < agreement.keys()


def test_loading_with_other_transforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = loading.open_theirs

    def other(folder: Path) -> Any:
        monkeypatch.setattr(loading, "CONFIG", loading.CONFIG.model_copy(update={"flip": 0.0}))
        return original(folder)

    monkeypatch.setattr(loading, "open_theirs", other)
    with pytest.raises(Disagreement, match="pixels of ours and of torchvision"):
        run(monkeypatch, loading, tmp_path, *IMAGES)


# --------------------------------------------------------------------------------------- analyses


def test_analyses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("--images", "2", "--image-side", "64", "--queries", "10", "12")
    (content,) = run(monkeypatch, analyses, tmp_path, *words)
    assert [*content["measured"]] == ["10 queries", "12 queries"]
    assert content["agreement"]["10 queries"]["metrics"]["difference"] == 0
    contenders = {analyses.PEER, "with the matching", *CATALOGUE}
    assert content["measured"]["12 queries"]["medians"].keys() == contenders


# ---------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize(("error", "refused"), [(0.0, False), (1e-3, True)])
def test_scaling_wants_equal_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, refused: bool
) -> None:
    def pretend(_: Path, trial: Any, contender: str, losses: dict[str, list[float]]) -> Any:
        assert trial.detector.backbone.frozen_norm
        losses[contender] = [10.0, 9.0 * (1 + error * (contender == "2 workers"))]
        return {"steps_per_second": 2.0}

    monkeypatch.setattr(scaling, "train", pretend)
    words = ("--steps", "2", "--batch", "2", "--image-side", "32")
    if refused:
        with pytest.raises(Disagreement, match="first losses of 2 workers"):
            run(monkeypatch, scaling, tmp_path, *words)
    else:
        (content,) = run(monkeypatch, scaling, tmp_path, *words)
        assert content["measured"].keys() == {"K = 0", "K = 2"}


# -------------------------------------------------------------------------------------------- GPU


def test_gpu_names_what_it_had_no_time_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--small", "--budget", "0", "--size", "64", "96")
    (content,) = run(monkeypatch, gpu, tmp_path, *words)
    operator = "operator: encoder, 128 queries, from offsets, bf16, forward"
    assert {"golden folders", operator, "bf16: K = 2", "bf16, compiled: K = 1"} <= content[
        "left_out"
    ].keys()
    assert content["measured"] == {}
    assert content["memory_beside_paper"]["K = 2"]["hours_in_the_paper"] == 1.714


def test_gpu_names_what_failed_and_goes_on() -> None:
    stages = gpu.Stages(60)

    def fails() -> None:
        raise Disagreement("they differ")

    done: list[int] = []
    stages.run("first", 0, fails)
    stages.run("second", 0, lambda: done.append(1))
    assert stages.failed == {"first": "Disagreement: they differ"}
    assert done == [1]
    assert stages.took.keys() == {"first", "second"}


def test_gpu_stops_what_takes_too_long() -> None:
    stages = gpu.Stages(0.2)
    stages.run("endless", 0, threading.Event().wait)
    assert stages.left_out["endless"].startswith("stopped after 0 s")


def test_gpu_stops_a_kernel_without_blaming_it() -> None:
    """What fails in a kernel is an error that names the switch; that time is up is none."""
    from codetr.ops.deformable_attention import _named

    def stage() -> None:
        with _named():
            threading.Event().wait()

    stages = gpu.Stages(2)
    stages.run("operator", 0, stage)
    assert not stages.failed
    assert stages.left_out["operator"].startswith("stopped after 2 s")


def test_gpu_finds_the_tests_of_the_kernels() -> None:
    assert [file.exists() for file in gpu.KERNEL_TESTS] == [True, True]


def test_gpu_measures_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "HEADS", {"K = 1": ["atss"]})
    stages, report = gpu.Stages(600), Report("", detectors.PEER, {})
    measured = gpu.Measured(report, TASK, gpu.exact_losses(TASK), rounds=1)
    gpu.measure_mode(stages, measured, "bf16")
    assert stages.failed.keys() == {"training step, bf16", "inference, bf16"}, "without agreement"
    stages.failed.clear()
    gpu.require_agreement(report, TASK)
    gpu.measure_mode(stages, measured, "bf16")
    assert not stages.failed
    content = report.content()
    medians = content["measured"]["training step, bf16"]["medians"]
    assert medians.keys() == {detectors.PEER, detectors.PLAIN, "K = 1"}
    assert len(content["agreement"]["bf16"]) == 2


def test_gpu_measures_no_mode_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detectors, "HEADS", {"K = 1": ["atss"]})
    stages, report = gpu.Stages(600), Report("", detectors.PEER, {})
    gpu.require_agreement(report, TASK)
    exact = {"K = 1": 1.1 * gpu.exact_losses(TASK)["K = 1"]}
    gpu.measure_mode(stages, gpu.Measured(report, TASK, exact, rounds=1), "bf16")
    assert stages.failed.keys() == {"bf16: K = 1"}
    assert stages.left_out.keys() == {f"bf16: {detectors.PLAIN}"}
    medians = report.content()["measured"]["training step, bf16"]["medians"]
    assert medians.keys() == {detectors.PEER}


def test_gpu_needs_the_detectors_dependencies_alone() -> None:
    program = (
        "import sys; import gpu, detectors, transformers_deformable; import codetr.training; "
        "absent = 'ray mlflow sklearn hotcoco pycocotools lvis rich typer pytest optuna'.split(); "
        "sys.exit(str(found) if (found := [m for m in absent if m in sys.modules]) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_gpu_measures_the_operator_without_the_detectors_dependencies(tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "find, absent = importlib.util.find_spec, set(sys.argv.pop().split())\n"
        "importlib.util.find_spec = lambda name, *o: None if name in absent else find(name, *o)\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in absent: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import gpu; sys.exit(gpu.main())"
    )
    words = ("--device", "cpu", "--size", "32", "32", "--queries", "4", "--rounds", "1")
    command = [sys.executable, "-c", program, *words, "--batch", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "pydantic pydantic_core scipy pytest"],
        cwd=BENCHMARKS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert done.returncode == 1
    assert len(content["measured"]) == 16, done.stderr
    needed = "the detector needs what is missing: pip install pydantic scipy"
    assert content["left_out"]["golden folders"] == content["left_out"]["detector"] == needed


def test_the_step_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with Elsewhere(detectors.build, TASK, "K = 0") as process:
        before = process.do("inference")[1]["peak_mib"]
        assert process.do("training step")[1]["peak_mib"] >= before > 50
