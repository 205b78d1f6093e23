"""Many short trials through the runner, or through Ray Tune: does each arrive once?

    python benchmarks/load.py run|sweep [--trials 500] [--at-a-time 4] [--out benchmarks/results]

Real Ray, Ray Train and MLflow (SQLite); only the training is pretended: each trial is a Ray Train
job that saves and reports two epochs at once. It needs no core of its own, so Ray is told of more
cores than there are, lest the machine wait for processes to start. Afterwards MLflow must hold one
finished run for each trial, with each epoch once. The result is a dated JSON file with trials per
minute and with the memory of the driver and of its foreman while trials went by.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from frame import RESULTS, ROOT, environment, settings_of, write_result

sys.path.insert(0, str(ROOT))

import psutil
from rich.console import Console

from codetr.data.digits import make_digits
from orchestrator import cluster
from orchestrator.console import PlainView
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Trial, make_plan
from orchestrator.results import TrialResult
from orchestrator.runner import run_plan
from orchestrator.sweep import SweepOptions, make_sweep
from orchestrator.sweep_run import run_sweep

EPOCHS = 2
EXPERIMENT = f"""
question: Does every trial arrive once?
detector:
  backbone: {{name: tiny, pretrained: false, frozen_stages: -1, frozen_norm: true}}
  transformer: {{embed_dim: 32, ffn_dim: 32, attention_heads: 4, encoder_layers: 1,
                decoder_layers: 2, levels: 3, group_norm_groups: 8}}
  queries: {{count: 20}}
  heads: [atss]
training: {{epochs: {EPOCHS}, batch_size: 4, drop_epochs: [2]}}
data: {{short_sides: [], crop: false}}
arms: {{K=1: {{}}}}
profiles: {{laptop: {{about: as small as can be}}}}
"""
LIBRARIES = ("ray", "mlflow", "torch")
_SAMPLE_SECONDS = 2.0


def pretend(job: dict[str, Any]) -> None:
    """Ray Train's loop: two epochs that cost nothing."""
    import json
    import tempfile
    from pathlib import Path

    import ray.train

    history: list[dict[str, Any]] = []
    for epoch in range(1, EPOCHS + 1):
        values = {"val/AP": job["trial"]["seed"] / 1000, "train/total": 1.0, "cost/core_hours": 0.0}
        history.append({"epoch": epoch, "step": epoch, "values": values, "time": time.time()})
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        (folder / "history.json").write_text(json.dumps(history))
        ray.train.report(
            {"epoch": epoch, "step": epoch, "AP": values["val/AP"], "history": history},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
        )


class CountingView(PlainView):
    """Counts the trials that have ended, and says no more than every tenth."""

    def __init__(self) -> None:
        super().__init__(Console())
        self.count = 0

    def epoch(self, trial: Trial, epoch: Any) -> None:
        """Not worth a line."""

    def ended(self, result: TrialResult) -> None:
        self.count += 1
        if self.count % 10 == 0 or result.state != "finished":
            super().ended(result)


class Meter(threading.Thread):
    """Memory of this process and of the foreman, the driver's actor, while trials end."""

    def __init__(self, view: CountingView) -> None:
        super().__init__(daemon=True)
        self.view = view
        self.samples: list[tuple[int, float, float]] = []
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(_SAMPLE_SECONDS):
            foremen = [p for p in me.children(recursive=True) if _is_foreman(p)]
            memory = [sum(map(_megabytes, processes)) for processes in ([me], foremen)]
            self.samples.append((self.view.count, *memory))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def by_quarter(self, which: int) -> list[float]:
        """Median megabytes while each quarter of the trials ended; 1: driver, 2: foreman."""
        last = max(count for count, *_ in self.samples) or 1
        quarters: list[list[float]] = [[], [], [], []]
        for sample in self.samples:
            if 0 < sample[0] < last:
                quarters[4 * sample[0] // last].append(sample[which])
        return [round(median(quarter), 1) for quarter in quarters if quarter]


def _is_foreman(process: psutil.Process) -> bool:
    try:
        return any(kind in process.name() for kind in ("Foreman", "Searcher"))
    except psutil.Error:
        return False


def _megabytes(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.Error:
        return 0.0


def main() -> int:
    options = parse_arguments()
    out = options.out.resolve()  # before the current folder is another
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        os.chdir(folder)
        cluster.local_cpus = lambda: options.at_a_time
        report = load(options.through, options.trials, Path(folder))
    report["settings"] = settings_of(options)
    report["environment"] = environment(LIBRARIES)
    print(report)
    print(f"written to {write_result(f'load-{options.through}', report, out)}")
    return 1 if report["wrong"] else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("through", choices=["run", "sweep"])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--at-a-time", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def load(through: str, trials: int, folder: Path) -> dict[str, Any]:
    """Send so many trials through, and look at what has arrived."""
    (folder / "load.yaml").write_text(EXPERIMENT)
    make_digits(folder / "digits", train_images=8, val_images=2, size=64)
    common = Options(output=folder / "runs", data=str(folder / "digits"), workers=1)
    view = CountingView()
    meter = Meter(view)
    meter.start()
    started = time.perf_counter()
    exit_code = (send_to_runner if through == "run" else send_to_tune)(common, trials, view)
    seconds = time.perf_counter() - started
    meter.stop()
    return {
        "exit_code": exit_code,
        "wrong": what_is_wrong(folder, trials) + ["exit code"] * (exit_code != 0),
        "trials_per_minute": round(60 * trials / seconds, 2),
        "driver_mb_by_quarter": meter.by_quarter(1),
        "foreman_mb_by_quarter": meter.by_quarter(2),
    }


def send_to_runner(common: Options, trials: int, view: CountingView) -> int:
    """One arm with many seeds."""
    plan = make_plan(load_experiment("load.yaml"), replace(common, seeds=tuple(range(trials))))
    return run_plan(plan, view, pretend).exit_code


def send_to_tune(common: Options, trials: int, view: CountingView) -> int:
    """A grid over a loss weight."""
    weights = ",".join(str(number / 1000) for number in range(1, trials + 1))
    options = SweepOptions(
        over=(f"lambda_1={weights}",), searcher="grid", scheduler="none", common=common
    )
    return run_sweep(make_sweep("load.yaml", options), view, pretend).exit_code


def what_is_wrong(folder: Path, trials: int) -> list[str]:
    """Every trial that MLflow lacks, has twice, or has not whole."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("load").experiment_id
    children = client.search_runs([experiment], "tags.k = '1'", max_results=10 * trials)
    wrong = [
        f"{identity} has {count} runs"
        for identity, count in Counter(run.data.tags["trial_id"] for run in children).items()
        if count != 1
    ]
    for run in children:
        points = client.get_metric_history(run.info.run_id, "val/AP")
        if run.info.status != "FINISHED" or [p.step for p in points] != [1, 2]:
            wrong.append(f"{run.data.tags['trial_id']}: {run.info.status}, {len(points)} epochs")
    if len(children) != trials:
        wrong.append(f"{len(children)} runs for {trials} trials")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
