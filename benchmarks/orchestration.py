"""What the laboratory costs: a trial under ``codetr run``, and the same loop under plain torchrun.

    python benchmarks/orchestration.py [--rounds 3] [--steps 100] [--out benchmarks/results]

Both train the laptop profile of the K ablation on the same digits with one worker; their losses
must be equal, step by step, before anything is reported. The result is a dated JSON file with the
medians and ratios of steps per second, and of the time from the command to the end of the first
step: processes, imports, Ray, MLflow, data and model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from frame import ROOT, Report, Sample, alternate, arguments, settings_of

sys.path.insert(0, str(ROOT))

LIBRARIES = ("ray", "mlflow", "torch")
PEER = "torchrun"
CASE = "K = 0, laptop profile"
BATCH = 4
WARM_UP = 10
"""Steps that count for the time to the first one alone."""

STEPS_FILE = "CODETR_BENCHMARK_STEPS"
"""Environment variable: where the training notes the time and the loss of each step."""


# ------------------------------------------------------------------- what runs in other processes


def noting(train_epoch: Any) -> Any:
    """``train_epoch`` that notes each step beside whatever it does."""

    def work(state: Any, loader: Any, on_step: Any = None, leave: Any = None) -> Any:
        with Path(os.environ[STEPS_FILE]).open("a") as file:

            def note(step: Any) -> None:
                print(json.dumps([time.time(), step.loss]), file=file)
                if on_step:
                    on_step(step)

            return train_epoch(state, loader, note, leave)

    return work


def noting_trial(job: dict[str, Any]) -> str | None:
    """The worker's own loop, with the steps noted."""
    from codetr import training
    from orchestrator.worker import train

    training.train_epoch = noting(training.train_epoch)
    return train(job)


def the_plan(folder: Path) -> Any:
    from orchestrator.experiment import load_experiment
    from orchestrator.plan import Options, make_plan

    settings = ("epochs=1", f"batch_size={BATCH}", "drop_epochs=[]")
    data = str(folder / "digits")
    plan = make_plan(
        load_experiment("ablation-k"),
        Options(profile="laptop", data=data, workers=1, settings=settings, output=folder / "runs"),
    )
    return replace(plan, trials=plan.trials[:1])


def under_codetr(folder: Path) -> int:
    """``codetr run``, without its command line."""
    from rich.console import Console

    from orchestrator.console import PlainView
    from orchestrator.runner import run_plan

    return run_plan(the_plan(folder), PlainView(Console()), noting_trial).exit_code


def under_torchrun(folder: Path) -> int:
    """The same loop, in a script such as its users write."""
    from codetr import training
    from codetr.data import build_loader, open_dataset
    from orchestrator.plan import Trial

    trial = Trial.model_validate_json((folder / "trial.json").read_text())
    training.limit_threads(cores=1)
    import torch

    torch.distributed.init_process_group("gloo")
    dataset = open_dataset(trial.data, "train", seed=trial.seed)
    loader = build_loader(
        dataset, training=True, epoch=1, batch_size=trial.training.batch_size,
        rank=0, world_size=1, seed=trial.seed, workers=trial.training.loader_workers,
    )  # fmt: skip
    state = training.TrainingState.start(
        trial.detector,
        trial.training,
        trial.data,
        dataset.classes,
        seed=trial.seed,
        steps_per_epoch=len(dataset) // trial.training.batch_size,
        device=torch.device("cpu"),
    )
    noting(training.train_epoch)(state, loader)
    torch.distributed.destroy_process_group()
    return 0


# ------------------------------------------------------------------------------------ what measures


def main() -> int:
    options = parse_arguments()
    if options.inside:
        inside = {"codetr": under_codetr, PEER: under_torchrun}[options.inside]
        return inside(options.folder)
    report = Report("What does codetr run cost a trial?", PEER, settings_of(options), LIBRARIES)
    losses: dict[str, list[list[float]]] = {PEER: [], "codetr": []}
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        prepare(Path(folder), options.steps)
        turns = {
            name: lambda n=name, o=of_name: measure(n, Path(folder), o)
            for name, of_name in losses.items()
        }
        samples = alternate(turns, options.rounds, warm_up=0)
    for ours, theirs in zip(losses["codetr"], losses[PEER], strict=True):
        report.require_same(CASE, "losses", ours, theirs)
    report.add(CASE, samples)
    report.finish("orchestration", options.out)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=3, steps=100)
    parser.add_argument("--inside", choices=["codetr", PEER], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path, steps: int) -> None:
    from codetr.data.digits import make_digits

    make_digits(folder / "digits", train_images=BATCH * steps, val_images=4, size=128)
    (folder / "trial.json").write_text(the_plan(folder).trials[0].model_dump_json())


def measure(name: str, folder: Path, losses: list[list[float]]) -> Sample:
    """One training from the command to its end, in fresh processes and a fresh output."""
    steps_file = folder / f"{name}-{len(losses)}.jsonl"
    script = (str(Path(__file__).resolve()), "--inside", name, "--folder", str(folder))
    launcher = ("-m", "torch.distributed.run", "--standalone") if name == PEER else ()
    started = time.time()
    subprocess.run(
        [sys.executable, *launcher, *script],
        check=True,
        env={**os.environ, STEPS_FILE: str(steps_file)},
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(folder / "runs", ignore_errors=True)
    times, of_run = zip(*map(json.loads, steps_file.read_text().splitlines()), strict=True)
    losses.append([*of_run])
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return {
        "seconds_to_first_step": times[0] - started,
        "steps_per_second": 1 / median(seconds[WARM_UP:] or seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
