"""Steps per second of one training on two workers, beside the same training on one.

    python benchmarks/scaling.py [--rounds 3] [--steps 30] [--batch 8]

Our training loop on the embedded digits over gloo, the detector and the heads of the laptop profile
of the K ablation, its batch norms frozen: trained ones know their own worker's images alone. The
global batch is the same, so the losses must be equal, step by step. On two cores the
fair case is one thread for each worker, beside one worker with one thread: two workers then have
twice the cores. One worker with two threads, which has as many, stands beside them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

# Threads that spin while they wait would compute against the other worker; before torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from frame import ROOT, Report, Sample, alternate, arguments, settings_of

sys.path.insert(0, str(ROOT))

import torch
from torch import distributed, multiprocessing

from codetr.data import build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.training import TrainingState, train_epoch
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Trial, make_plan

PEER = "1 worker"
CONTENDERS = {PEER: (1, 1), "2 workers": (2, 1), "1 worker, 2 threads": (1, 2)}
"""(workers, threads of each)."""
WARM_UP = 5
EARLY = 5
TOLERANCE = 1e-4
LATE_TOLERANCE = 5e-2
"""Of the first losses, and of all: sums over two workers round otherwise, and with every step a
training magnifies that."""


def main() -> int:
    options = parse_arguments()
    report = Report(
        "How much faster do two workers train than one?",
        PEER,
        settings_of(options),
        ("torch", "torchvision"),
    )
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        trials = prepare(folder, options)
        for case, trial in trials.items():
            losses: dict[str, list[float]] = {}
            turns = {
                contender: lambda c=contender, t=trial, o=losses: train(folder, t, c, o)
                for contender in CONTENDERS
            }
            samples = alternate(turns, options.rounds, warm_up=0)
            for contender in CONTENDERS:
                ours, theirs = losses[contender], losses[PEER]
                what = f"losses of {contender}"
                early = (ours[:EARLY], theirs[:EARLY], TOLERANCE)
                report.require_same(case, f"first {what}", *early)
                report.require_same(case, what, ours, theirs, LATE_TOLERANCE)
            report.add(case, samples)
    report.finish("scaling", options.out)
    return 0


def parse_arguments() -> Any:
    parser = arguments(__doc__, rounds=3, steps=30, batch=8)
    parser.add_argument("--image-side", type=int, default=128, help="of the digits, in pixels")
    return parser.parse_args()


def prepare(folder: Path, options: Any) -> dict[str, Trial]:
    """The data, and the first and the last arm of the ablation: without heads, and with two."""
    make_digits(
        folder / "digits", train_images=options.batch * options.steps, val_images=4,
        size=options.image_side,
    )  # fmt: skip
    # Norms that are trained would use the statistics of each worker's own images.
    settings = (
        "epochs=1", f"batch_size={options.batch}", "drop_epochs=[]", "backbone.frozen_norm=true",
    )  # fmt: skip
    plan = make_plan(
        load_experiment("ablation-k"),
        Options(
            profile="laptop", data=str(folder / "digits"), workers=1, settings=settings,
            output=folder / "runs",
        ),
    )  # fmt: skip
    return {f"K = {len(t.detector.heads)}": t for t in (plan.trials[0], plan.trials[-1])}


def train(folder: Path, trial: Trial, contender: str, losses: dict[str, list[float]]) -> Sample:
    """One training in fresh processes; notes its losses."""
    workers, threads = CONTENDERS[contender]
    (folder / "trial.json").write_text(trial.model_dump_json())
    with tempfile.TemporaryDirectory(dir=folder) as meeting:
        multiprocessing.spawn(work, (workers, threads, folder, Path(meeting)), nprocs=workers)
        noted = json.loads((Path(meeting) / "steps.json").read_text())
    losses[contender] = [loss for _, loss in noted]
    seconds = [after - before for (before, _), (after, _) in pairwise(noted)]
    return {"steps_per_second": 1 / median(seconds[WARM_UP:] or seconds)}


def work(rank: int, workers: int, threads: int, folder: Path, meeting: Path) -> None:
    """What one worker does; ``meeting`` is a fresh folder where all find one another."""
    torch.set_num_threads(threads)
    store = f"file://{meeting}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=workers)
    trial = Trial.model_validate_json((folder / "trial.json").read_text())
    dataset = open_dataset(trial.data, "train", seed=trial.seed)
    loader = build_loader(
        dataset, trial.training.batch_size, rank=rank, world_size=workers, training=True, epoch=1,
        seed=trial.seed,
    )  # fmt: skip
    state = TrainingState.start(
        trial.detector, trial.training, trial.data, dataset.classes, seed=trial.seed,
        steps_per_epoch=len(loader), device=torch.device("cpu"),
    )  # fmt: skip
    noted: list[tuple[float, float]] = []
    train_epoch(state, loader, lambda step: noted.append((time.perf_counter(), step.loss)))
    if rank == 0:
        (meeting / "steps.json").write_text(json.dumps(noted))
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
