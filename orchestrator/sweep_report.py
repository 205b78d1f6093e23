"""What a sweep has found: the ranking, what mattered, AP against cost, and the best of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from orchestrator.files import write_whole
from orchestrator.results import TrialResult, Value
from orchestrator.results import row as trial_row
from orchestrator.schedule import schedule_text
from orchestrator.search import Entry, firsts
from orchestrator.space import Dimension
from orchestrator.sweep import Sweep, suggestion_text

ABSENT = "–"
BINS = 4
"""Into so many parts of equal counts the values of a range go, to ask how much they matter."""


@dataclass(frozen=True)
class Row:
    """A suggestion and what came of it.

    Attributes:
        rank: 1 is the best; None: it has no metric. Before those that a scheduler has stopped come
            those that have finished, for their metrics are of later epochs.
        is_first: False for a suggestion whose trial an earlier one has trained.
        on_front: no other finished one is at once better and cheaper.
    """

    entry: Entry
    result: TrialResult
    metric: float | None
    rank: int | None = None
    is_first: bool = True
    on_front: bool = False

    @property
    def finished(self) -> bool:
        return self.entry.state == "finished" and self.metric is not None

    @property
    def cost(self) -> float | None:
        """Of training and evaluations: hours of GPUs, or of cores where there is none."""
        return self.result.final(f"cost/{self.cost_unit}")

    @property
    def cost_unit(self) -> str:
        return "gpu_hours" if self.result.final("cost/gpu_hours") else "core_hours"


def ranked(
    sweep: Sweep, entries: list[Entry], result_of: Callable[[Entry], TrialResult]
) -> list[Row]:
    """Every suggestion, the best first; equal trials have equal ranks.

    Args:
        result_of: what the trial of a suggestion, its first, has come to.
    """
    states = firsts(entries)
    results = {trial: result_of(first) for trial, first in states.items()}
    rows = []
    for entry in entries:
        first, result = states[entry.trial], results[entry.trial]
        # What the first suggestion of a trial came to is what all of them did.
        told = replace(entry, state=first.state, reason=first.reason)
        metric = result.metric(sweep.search.metric)
        rows.append(Row(told, result, metric, is_first=first is entry))
    rows.sort(key=_order)
    ranks: dict[str, int] = {}
    for row in rows:
        if row.metric is not None and row.entry.state in ("finished", "stopped"):
            ranks.setdefault(row.entry.trial, len(ranks) + 1)
    front = {row.entry.trial for row in pareto_front(rows)}
    return [
        replace(row, rank=ranks.get(row.entry.trial), on_front=row.entry.trial in front)
        for row in rows
    ]


def _order(row: Row) -> tuple[Any, ...]:
    metric = -1.0 if row.metric is None else row.metric
    usable = row.metric is not None and row.entry.state in ("finished", "stopped")
    return (not usable, -len(row.result.history), -metric, row.entry.number)


def pareto_front(rows: list[Row]) -> list[Row]:
    """The finished trials than which none is both better and cheaper, by rising cost."""
    front: list[Row] = []
    candidates = [row for row in rows if row.finished and row.is_first and row.cost is not None]
    for row in sorted(candidates, key=lambda row: (row.cost or 0, -(row.metric or 0))):
        if not front or (row.metric or 0) > (front[-1].metric or 0):
            front.append(row)
    return front


def importance(sweep: Sweep, rows: list[Row]) -> dict[str, float]:
    """Share of the metric's variance over the finished trials that each dimension explains alone.

    Of a dimension that is there only on condition: among the trials in which it was, or K would be
    counted again in all that hangs on it. The correlation ratio (between-group over total
    variance), adjusted for the number of groups as R² is for that of regressors, and not below 0.
    A range's values go into quarters. What two dimensions explain only together is in neither. None
    of it makes sense for a population, whose members change values and have weights in common.
    """
    if sweep.is_population:
        return {}
    trials = [row for row in rows if row.finished and row.is_first]
    shares = {}
    for dimension in real_choices(sweep):
        there = [row for row in trials if dimension.name in row.entry.suggestion]
        metrics = [row.metric or 0.0 for row in there]
        shares[dimension.name] = _correlation_ratio(_groups(dimension, there), metrics)
    return shares


def real_choices(sweep: Sweep) -> list[Dimension]:
    """The dimensions without those of a single value."""
    return [d for d in sweep.search.space.dimensions if len(d.choices) > 1]


def _groups(dimension: Dimension, rows: list[Row]) -> list[Any]:
    values = [row.entry.suggestion[dimension.name] for row in rows]
    if dimension.values is not None:
        return list(values)
    numbers = sorted(float(value or 0) for value in values)
    bounds = [numbers[len(numbers) * part // BINS] for part in range(1, BINS)] if numbers else []
    return [sum(float(value or 0) >= bound for bound in bounds) for value in values]


def _correlation_ratio(groups: list[Any], metrics: list[float]) -> float:
    count, members = len(metrics), dict[Any, list[float]]()
    for group, metric in zip(groups, metrics, strict=True):
        members.setdefault(group, []).append(metric)
    if len(members) < 2 or count <= len(members):
        return 0.0
    mean = fmean(metrics)
    total = sum((metric - mean) ** 2 for metric in metrics)
    if total == 0:
        return 0.0
    within = sum(sum((m - fmean(group)) ** 2 for m in group) for group in members.values())
    return max(0.0, 1 - (within / (count - len(members))) / (total / (count - 1)))


# ---------------------------------------------------------------------------------------- on disk


def write_report(sweep: Sweep, rows: list[Row]) -> list[Path]:
    """Tables, the best configuration and the pictures, as far as there is something to tell."""
    contents = {"results.csv": _csv(sweep, rows), "results.md": _markdown(sweep, rows)}
    if rows and rows[0].rank == 1:
        contents["best.yaml"] = best_yaml(sweep, rows[0])
    files = [write_whole(sweep.folder / name, content) for name, content in contents.items()]
    if any(row.metric is not None for row in rows):
        from orchestrator.sweep_pictures import draw_all

        files += draw_all(sweep, rows)
    return files


def best_yaml(sweep: Sweep, best: Row) -> str:
    """The best trial as an experiment of one arm, every setting written out."""
    trial, plan = best.result.trial, sweep.plan
    detector = trial.detector.model_dump(mode="json", exclude={"num_classes"})
    metric = f"{sweep.search.metric} {best.metric:.2f}"
    epochs = f"after {len(best.result.history)} of {trial.training.epochs} epochs"
    content = {
        "question": f"How good is the best of the sweep {plan.name}?",
        "detector": detector,
        "training": trial.training.model_dump(mode="json"),
        "data": trial.data.model_dump(mode="json"),
        "seeds": [trial.seed],
        "arms": {"best": {}},
        "schedule": [change.model_dump(mode="json") for change in trial.schedule],
        "profiles": {
            plan.profile: {
                "about": f"suggestion {best.entry.number}, trial {trial.id}: {metric} {epochs}",
                "resources": plan.resources.model_dump(mode="json"),
            }
        },
    }
    if not trial.schedule:
        del content["schedule"]
    head = f"# {suggestion_text(best.entry.latest)}: {metric} {epochs}.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _csv(sweep: Sweep, rows: list[Row]) -> str:
    lines = [_csv_row(sweep, row) for row in rows]
    text = io.StringIO()
    columns = [*dict.fromkeys(key for line in lines for key in line)]
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_row(sweep: Sweep, row: Row) -> dict[str, Value]:
    suggestion = row.entry.latest
    own = trial_row(row.result)
    own.pop("arm")
    own.pop("paper_AP")
    of_member: dict[str, Value] = {}
    if sweep.is_population:
        of_member = {
            "member": row.entry.member,
            "origin": row.entry.origin,
            "schedule": schedule_text(row.result.trial.schedule),
        }
    return {
        "rank": row.rank,
        "suggestion": row.entry.number,
        **of_member,
        **{d.name: suggestion.get(d.name) for d in sweep.search.space.dimensions},
        **own,
        "status": _status(row),
        "stop_reason": row.entry.reason,
        "on_front": int(row.on_front),
    }


def _status(row: Row) -> str:
    state = "interrupted" if row.entry.state == "open" else row.entry.state
    return state if row.is_first else f"{state} (same trial)"


def _markdown(sweep: Sweep, rows: list[Row]) -> str:
    search, experiment = sweep.search, sweep.experiment
    trial = sweep.plan.trials[0]
    lines = [
        f"# {sweep.plan.name}",
        "",
        experiment.question,
        "",
        f"{_what(sweep, rows)}; profile {sweep.plan.profile}, `{trial.data.dataset}` "
        f"({trial.facts.fingerprint}), {trial.training.epochs} epochs, seed {search.seed}. "
        f"{search.metric} in percent after the last epoch that was trained.",
        "",
        "## Space",
        "",
        *[f"- `{dimension.name}`: {dimension}" for dimension in search.space.dimensions],
        "",
        "## Ranking",
        "",
        *_table(sweep, rows),
    ]
    if front := pareto_front(rows):
        unit = front[0].cost_unit.replace("_", "-")
        lines += ["", f"## The front of {search.metric} against {unit}", ""]
        lines += _table(sweep, [replace(row, rank=_rank_of(row, rows)) for row in front])
    shares = importance(sweep, rows)
    if any(shares.values()):
        lines += [
            "",
            "## Share of the variance that each dimension explains alone, where it is there",
            "",
        ]
        lines += ["| dimension | share |", "| --- | ---: |"]
        by_share = sorted(shares.items(), key=lambda item: -item[1])
        lines += [f"| {name} | {100 * share:.0f} % |" for name, share in by_share]
    return "\n".join(lines) + "\n"


def _what(sweep: Sweep, rows: list[Row]) -> str:
    search = sweep.search
    if sweep.is_population:
        return (
            f"{len(rows)} members of a population of {sweep.count}, which exchanges every "
            f"{sweep.interval} epochs (scheduler {search.scheduler}); values are the last ones, "
            "costs those of the same training from its beginning"
        )
    return (
        f"{len(rows)} of {sweep.count} suggestions by {search.searcher}, scheduler "
        f"{search.scheduler}"
    )


def _rank_of(row: Row, rows: list[Row]) -> int | None:
    return next(other.rank for other in rows if other.entry.trial == row.entry.trial)


def _table(sweep: Sweep, rows: list[Row]) -> list[str]:
    names = [dimension.name for dimension in sweep.search.space.dimensions]
    names_of_member = ["from"] if sweep.is_population else []
    head = [
        "rank", "#", *names, *names_of_member, sweep.search.metric, "epochs", "core-h", "GPU-h",
        "status",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}"]
    for row in rows:
        cells = [
            str(row.rank or ABSENT),
            str(row.entry.number),
            *(str(row.entry.latest.get(name, ABSENT)) for name in names),
            *([row.entry.origin or ABSENT] if sweep.is_population else []),
            ABSENT if row.metric is None else f"{row.metric:.1f}",
            str(len(row.result.history)),
            _hours(row, "cost/core_hours"),
            _hours(row, "cost/gpu_hours"),
            f"{_status(row)}: {row.entry.reason}" if row.entry.reason else _status(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _hours(row: Row, path: str) -> str:
    hours = row.result.final(path)
    return f"{hours:.3f}" if hours else ABSENT
