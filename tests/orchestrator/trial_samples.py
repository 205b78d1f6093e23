"""Plans and results without any training."""

from dataclasses import replace
from pathlib import Path

from orchestrator.board import Epoch
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Plan, make_plan
from orchestrator.results import TrialResult


def sample_plan(output: Path, settings: tuple[str, ...] = (), **options) -> Plan:
    """Four epochs of 250 steps, whatever the shipped experiment has."""
    few = ("epochs=4", "batch_size=8", "decoder_layers=2", "faster_rcnn.rcnn.fc_dim=128")
    settings = (*few, *settings)
    experiment = load_experiment("ablation-k")
    plan = make_plan(experiment, Options(output=output, settings=settings, **options))
    resources = plan.resources.model_copy(update={"workers": 1})
    return replace(plan, resources=resources)


def sample_epoch(number: int, ap: float) -> Epoch:
    return Epoch(
        number,
        250 * number,
        {
            "train/total": 30 / number,
            "train/loss/query/0/cls": 1 / number,
            "val/AP": ap,
            "val/AP50": 1.7 * ap,
            "val/AP75": 0.8 * ap,
            "cost/seconds_per_step": 0.2,
            "cost/images_per_second": 40.0,
            "cost/core_hours": 0.01 * number,
            "cost/gpu_hours": 0.0,
            "cost/peak_memory_mb": 900.0,
            "cost/parameters_training": 500_000,
            "cost/parameters_inference": 400_000,
        },
    )


def sample_results(plan: Plan) -> list[TrialResult]:
    """AP after the last epoch: 0.1 + 0.1 K + 0.01 seed."""
    return [
        TrialResult(
            trial,
            "finished",
            [
                sample_epoch(e, (0.1 + 0.1 * trial.detector.k + 0.01 * trial.seed) * e / 4)
                for e in range(1, 5)
            ],
        )
        for trial in plan.trials
    ]
