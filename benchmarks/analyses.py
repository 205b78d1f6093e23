"""What looking at a detector costs beside one evaluation of it: its matching, and each analysis.

    python benchmarks/analyses.py [--rounds 3] [--images 24] [--queries 40 300 900]

The detector of the laptop profile with K = 2, untrained, on the embedded digits, one thread. A
training notes at every evaluation which query each object is matched with; that must change nothing
of what is evaluated. Analyses are passes of their own over the same images.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from frame import ROOT, Report, alternate, arguments, settings_of, timed

sys.path.insert(0, str(ROOT))

import torch

from codetr.analysis import CATALOGUE, analysis
from codetr.analysis.frame import Subject, measure
from codetr.data import CocoDataset, build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.training import Evaluation, TrainingState, evaluate
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Trial, make_plan

PEER = "evaluation"
BATCH = 8


def main() -> int:
    options = parse_arguments()
    report = Report(
        "What does looking at a detector cost beside one evaluation?",
        PEER,
        settings_of(options),
        ("torch", "torchvision", "hotcoco"),
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="analyses-") as name:
        folder = Path(name)
        make_digits(
            folder / "digits", train_images=1, val_images=options.images, size=options.image_side
        )
        for queries in options.queries:
            case = f"{queries} queries"
            trial = trial_of(folder, queries)
            dataset = open_dataset(trial.data, "val", seed=trial.seed)
            subject = subject_of(trial, dataset)
            with_matching, without = (evaluated(subject, dataset, matches=m) for m in (True, False))
            ours, theirs = (dict(one.metrics.summary) for one in (with_matching, without))
            report.require_same(case, "metrics", ours, theirs)
            contenders = contenders_of(subject, dataset)
            report.add(case, alternate(contenders, options.rounds))
    report.finish("analyses", options.out)
    return 0


def parse_arguments() -> Any:
    parser = arguments(__doc__, rounds=3, images=24)
    parser.add_argument("--image-side", type=int, default=128, help="of the digits, in pixels")
    parser.add_argument("--queries", type=int, nargs="+", default=[40, 300, 900])
    return parser.parse_args()


def trial_of(folder: Path, queries: int) -> Trial:
    """The last arm of the ablation, with so many queries."""
    plan = make_plan(
        load_experiment("ablation-k"),
        Options(
            profile="laptop", data=str(folder / "digits"), workers=1,
            settings=("epochs=1", "drop_epochs=[]", "batch_size=1", f"queries.count={queries}"),
            output=folder / "runs",
        ),
    )  # fmt: skip
    return plan.trials[-1]


def subject_of(trial: Trial, dataset: CocoDataset) -> Subject:
    state = TrainingState.start(
        trial.detector, trial.training, trial.data, dataset.classes, seed=trial.seed,
        steps_per_epoch=1, device=torch.device("cpu"),
    )  # fmt: skip
    return Subject.of(state.checkpoint(), torch.device("cpu"))


def contenders_of(subject: Subject, dataset: CocoDataset) -> dict[str, Callable[[], Any]]:
    """One evaluation, the same with its matching noted, and each analysis."""
    calls: dict[str, Callable[[], Any]] = {
        PEER: partial(evaluated, subject, dataset, matches=False),
        "with the matching": partial(evaluated, subject, dataset, matches=True),
    }
    for name in CATALOGUE:
        calls[name] = partial(measure, analysis(name), subject, dataset, batch_size=BATCH)
    return {name: timed(call) for name, call in calls.items()}


def evaluated(subject: Subject, dataset: CocoDataset, *, matches: bool) -> Evaluation:
    loader = build_loader(dataset, BATCH, training=False)
    return evaluate(subject.model, loader, dataset, record_matches=matches)


if __name__ == "__main__":
    sys.exit(main())
