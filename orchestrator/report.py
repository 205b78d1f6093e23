"""Tables on disk: measured numbers beside the paper's."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from orchestrator.files import read_json, write_whole
from orchestrator.plan import Plan
from orchestrator.records import write_configuration
from orchestrator.results import (
    ArmSummary,
    TrialResult,
    Value,
    measured_branches,
    row,
    summarise,
)
from orchestrator.worker import PER_CLASS, PREDICTIONS

CSV, MARKDOWN = "results.csv", "results.md"


def write_tables(plan: Plan, results: list[TrialResult]) -> list[Path]:
    """Write ``results.csv`` and ``results.md`` in the plan's folder, and return their paths."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    contents = {CSV: csv_table(results), MARKDOWN: markdown(plan, results)}
    return [write_whole(plan.folder / name, content) for name, content in contents.items()]


def csv_table(results: list[TrialResult]) -> str:
    rows = [row(result) for result in results]
    columns = dict.fromkeys(key for r in rows for key in r)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(plan: Plan, results: list[TrialResult]) -> str:
    """The experiment's question and its answer: arms beside the paper, then every trial."""
    experiment, trial = plan.experiment, plan.trials[0]
    facts, training = trial.facts, trial.training
    lines = [
        f"# {plan.name}",
        "",
        experiment.question,
        "",
        f"Profile {plan.profile}: {facts.train_images} training and {facts.val_images} validation "
        f"images of `{trial.data.dataset}` ({facts.fingerprint}), {training.epochs} epochs of "
        f"{trial.steps_per_epoch} steps, global batch {training.batch_size}. "
        "AP in percent after the last epoch."
        f" Gains are over {_base(plan)}."
        + " Of several seeds: mean (least and greatest), and so for the gains, each over that "
        "arm's trial of the same seed." * (len({t.seed for t in plan.trials}) > 1),
        "",
        *_markdown_table(summary_table(results)),
    ]
    if experiment.paper is not None:
        lines += [
            "",
            f"Paper: `{experiment.paper.table}`, COCO val2017. "
            "Other data and other sizes give other numbers: compare the gains.",
        ]
    if branches := branch_table(results):
        lines += [
            "",
            "## Branches",
            "",
            "Each branch of the trained detectors on its own, the auxiliary heads with non-maximum "
            f"suppression. Gains are over {_base(plan)}, or the first arm that has the branch.",
            "",
            *_markdown_table(branches),
        ]
    lines += ["", "## Trials", "", *_markdown_table(trial_table(results))]
    failed = [result for result in results if result.reason]
    lines += [f"\n**{r.trial.arm}, seed {r.trial.seed}, failed:** {r.reason}" for r in failed]
    lines += [f"\n{r.trial.arm}, seed {r.trial.seed}: {note}" for r in results for note in r.notes]
    return "\n".join(lines) + "\n"


def _base(plan: Plan) -> str:
    """Over what gains are told."""
    return plan.experiment.reference or f"the first arm, {plan.arms[0]}"


EMPTY = "–"
Rows = list[list[str]]

_SUMMARY_HEAD = ["arm", "AP", "gain", "paper's AP", "paper's gain"]
WORDS = ("branch", "arm")
"""Columns that are read from the left; all others are numbers."""


def summary_table(results: list[TrialResult]) -> Rows:
    """Head and a row for each arm, beside the paper."""
    return _without_empty_columns([_SUMMARY_HEAD, *map(_summary_cells, summarise(results))])


def branch_table(results: list[TrialResult]) -> Rows:
    """Head and a row for each branch of each arm (table 11 of the paper); empty where no auxiliary
    head is measured."""
    branches = measured_branches(results)
    if len(branches) == 1:
        return []
    rows = [
        [branch, *_summary_cells(summary)]
        for branch in branches
        for summary in summarise(results, branch)
    ]
    return _without_empty_columns([["branch", *_SUMMARY_HEAD], *rows])


def trial_table(results: list[TrialResult]) -> Rows:
    """Head and a row for each trial."""
    head = [
        "arm", "seed", "status", "AP", "AP50", "AP75", "small", "medium", "large",
        "core-h", "GPU-h", "s/step", "images/s", "peak MB", "M params training", "inference",
    ]  # fmt: skip
    return _without_empty_columns([head, *map(_trial_cells, results)])


def _without_empty_columns(rows: Rows) -> Rows:
    kept = [i for i in range(len(rows[0])) if any(row[i] != EMPTY for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _summary_cells(summary: ArmSummary) -> list[str]:
    spread = gains = ""
    if len(summary.aps) > 1:
        spread = f" ({min(summary.aps):.1f}–{max(summary.aps):.1f})"
    if len(summary.gains) > 1:
        gains = f" ({min(summary.gains):+.1f} to {max(summary.gains):+.1f})"
    return [
        summary.arm,
        _number(summary.ap, ".1f") + spread,
        _number(summary.gain, "+.1f") + gains,
        _number(summary.paper_ap, ".1f"),
        _number(summary.paper_gain, "+.1f"),
    ]


def _trial_cells(result: TrialResult) -> list[str]:
    r = row(result)
    training, inference = r["parameters_training"], r["parameters_inference"]
    return [
        str(r["arm"]),
        str(r["seed"]),
        str(r["status"]),
        *(
            _number(r[name], ".1f")
            for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        ),
        _number(r["core_hours"], ".3f"),
        _number(r["gpu_hours"] or None, ".2f"),
        _number(r["seconds_per_step"], ".3f"),
        _number(r["images_per_second"], ".1f"),
        _number(r["peak_memory_mb"], ".0f"),
        *(
            _number(count / 1e6 if isinstance(count, int) else None, ".2f")
            for count in (training, inference)
        ),
    ]


def _number(value: Value, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else EMPTY


def _markdown_table(rows: Rows) -> list[str]:
    rule = ["---" if title in WORDS else "---:" for title in rows[0]]
    return [f"| {' | '.join(line)} |" for line in (rows[0], rule, *rows[1:])]


# ------------------------------------------------------------------------------ files of one trial


def write_trial_files(plan: Plan, result: TrialResult) -> list[Path]:
    """Write the trial's configuration and curves beside its checkpoints; return these and the
    predictions."""
    from orchestrator.pictures import draw_curves

    folder = plan.store / result.trial.name
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_configuration(folder, result.trial)]
    if result.history:
        files.append(draw_curves(result, folder / "curves.png"))
    if result.best is not None and (result.best / PREDICTIONS).exists():
        files.append(result.best / PREDICTIONS)
    return files


def write_class_table(plan: Plan, result: TrialResult) -> list[Path]:
    """Write AP per class at the trial's best epoch beside its checkpoints, if it is at hand.

    Raises:
        ConfigError: what was measured then is damaged.
    """
    if result.best is None or not (result.best / PER_CLASS).exists():
        return []
    advice = "no table per class is written"
    per_class: dict[str, float] = read_json(result.best / PER_CLASS, advice)
    path = plan.store / result.trial.name / "per_class_AP.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "AP"])
        writer.writerows([name, round(100 * ap, 2)] for name, ap in per_class.items())
    return [path]
