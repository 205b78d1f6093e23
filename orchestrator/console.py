"""What the terminal shows: the plan, one live line for each running trial, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from math import isnan
from typing import TYPE_CHECKING, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from codetr.config import DetectorConfig
from orchestrator.board import Epoch, Progress
from orchestrator.machine import local_cpus
from orchestrator.plan import Plan, Trial
from orchestrator.report import WORDS, branch_table, summary_table
from orchestrator.results import TrialResult
from orchestrator.schedule import schedule_text
from orchestrator.wording import without_secrets

if TYPE_CHECKING:
    from codetr.data.check import DatasetReport, SplitReport
    from codetr.metrics import Metrics

# ---------------------------------------------------------------------------------------- the plan


def show_plan(console: Console, plan: Plan) -> None:
    """Everything that is going to run."""
    console.print(f"[bold]{plan.name}[/]: {plan.experiment.question}", highlight=False)
    for table in (_trial_table(plan), _loss_table(plan)):
        # Whole even where the terminal is narrow: nothing of a name or weight may be lost.
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        wide = Console(file=console.file, width=max(needed, console.width))
        wide.print(table)
    facts = [
        *_by_arm("detector", plan, lambda trial: detector_text(trial.detector)),
        *_by_arm("data", plan, _data_text),
        *_by_arm("training", plan, _training_text),
        *_schedules(plan),
        ("resources", _resources_text(plan)),
        *([("analyses", ", ".join(plan.analyses))] if plan.analyses else []),
        ("output", str(plan.folder)),
        ("tracking", without_secrets(plan.tracking_uri)),
    ]
    for name, value in facts:
        console.print(Text.assemble((f"  {name:<11}", "bold"), value), soft_wrap=True)


def _trial_table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("arm", "K", "heads", "λ1", "λ2", "seed: trial"):
        table.add_column(column)
    for arm in plan.arms:
        trials = [trial for trial in plan.trials if trial.arm == arm]
        detector = trials[0].detector
        table.add_row(
            arm,
            str(detector.k),
            ", ".join(detector.head_names) or "none",
            f"{detector.lambda_1:g}",
            f"{detector.lambda_2:g}",
            "\n".join(f"{trial.seed}: {trial.id}" for trial in trials),
        )
    return table


def _by_arm(name: str, plan: Plan, text: Callable[[Trial], str]) -> list[tuple[str, str]]:
    """One line if all arms are alike in this, else one for each."""
    texts = {trial.arm: text(trial) for trial in plan.trials}
    if len(set(texts.values())) == 1:
        return [(name, text(plan.trials[0]))]
    return [(name, f"{arm}: {value}") for arm, value in texts.items()]


def _schedules(plan: Plan) -> list[tuple[str, str]]:
    if not any(trial.schedule for trial in plan.trials):
        return []
    return _by_arm("schedule", plan, lambda trial: schedule_text(trial.schedule) or "nothing")


def detector_text(detector: DetectorConfig) -> str:
    """``resnet50, 256 channels, 6 + 6 layers, 300 queries, two-stage``."""
    sizes, queries = detector.transformer, detector.queries
    return (
        f"{detector.backbone.name}, {sizes.embed_dim} channels, {sizes.encoder_layers} + "
        f"{sizes.decoder_layers} layers, {queries.total} queries, "
        f"{'two-stage' if queries.two_stage else 'one-stage'}"
    )


def _loss_table(plan: Plan) -> Table:
    """Effective weight of every loss term, arm by arm."""
    weights = {
        trial.arm: dict(grouped_weights(trial.detector.loss_weights())) for trial in plan.trials
    }
    table = Table(box=SIMPLE_HEAD)
    table.add_column("effective weight of (equation 6)")
    for arm in weights:
        table.add_column(arm, justify="right")
    for term in dict.fromkeys(term for arm in weights.values() for term in arm):
        table.add_row(term, *(f"{w[term]:g}" if term in w else "" for w in weights.values()))
    return table


def grouped_weights(weights: dict[str, float]) -> list[tuple[str, float]]:
    """Decoder layers with equal weights as one: ``query/0..5/cls``."""
    by_term: dict[tuple[str, str], list[tuple[int, float]]] = {}
    grouped: list[tuple[str, float]] = []
    for name, weight in weights.items():
        *group, term = name.split("/")
        if group[-1].isdigit():
            key = ("/".join(group[:-1]), term)
            by_term.setdefault(key, []).append((int(group[-1]), weight))
        else:
            grouped.append((name, weight))
    layered = [
        (f"{group}/{_span([layer for layer, _ in run])}/{term}", weight)
        for (group, term), layers in by_term.items()
        for weight, run in ((w, list(r)) for w, r in groupby(layers, key=lambda pair: pair[1]))
    ]
    return layered + grouped


def _span(layers: list[int]) -> str:
    return f"{layers[0]}..{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _data_text(trial: Trial) -> str:
    facts = trial.facts
    name = str(trial.data.path) if trial.data.path else f"embedded {trial.data.dataset}"
    return (
        f"{name}: {facts.train_images} training and {facts.val_images} validation images, "
        f"{facts.classes} classes"
    )


def _training_text(trial: Trial) -> str:
    training = trial.training
    text = (
        f"{training.epochs} epochs × {trial.steps_per_epoch} steps = {trial.steps} steps, global "
        f"batch {training.batch_size}, learning rate {training.learning_rate:g}"
    )
    text += f", averaged weights (ema {training.ema:g})" if training.ema is not None else ""
    return text + (f", starts from {training.start_from}" if training.start_from else "")


def _resources_text(plan: Plan) -> str:
    resources = plan.resources
    device = f"{resources.cpus_per_worker} CPU"
    if resources.gpus_per_worker:
        device += f" + {resources.gpus_per_worker:g} GPU"
    at_a_time = resources.concurrency
    if at_a_time is None and plan.address is None:
        at_a_time = max(1, local_cpus() // plan.cpus_per_trial)
    where = f"on the cluster at {plan.address}" if plan.address else "on a Ray started here"
    together = f"{at_a_time} at a time" if at_a_time else "as many at a time as fit"
    workers = f"{resources.least} to " * resources.is_elastic + f"{resources.workers} worker(s)"
    return f"{workers} of {device} for each trial, {together}, {where}"


# --------------------------------------------------------------------------------- while it works


class View(Protocol):
    """Shows a running plan."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def stage(self, text: str, detail: str = "") -> None:
        """What is being done just now beside the trials; the detail may change often."""

    def progress(self, trial: Trial, progress: Progress) -> None:
        """Where a running trial is."""

    def epoch(self, trial: Trial, epoch: Epoch) -> None:
        """A trial has finished an epoch."""

    def ended(self, result: TrialResult) -> None:
        """A trial runs no longer."""


class PlainView:
    """Lines for logs and pipes: one for each epoch of each trial."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._progress: dict[str, Progress] = {}

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, text: str, detail: str = "") -> None:  # noqa: ARG002 - for the eye alone
        if text != self._stage:
            self.say(text)
        self._stage = text

    def progress(self, trial: Trial, progress: Progress) -> None:
        self._progress[trial.id] = progress

    def epoch(self, trial: Trial, epoch: Epoch) -> None:
        self.say(f"{label(trial)}: {epoch_text(trial, epoch, self._progress.get(trial.id))}")

    def ended(self, result: TrialResult) -> None:
        self.say(ended_text(result))


class LiveView:
    """One line for each running trial, redrawn in place, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._running: dict[str, tuple[Trial, Progress, float]] = {}
        self._ap: dict[str, float] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stage = ""
        self._running.clear()
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, text: str, detail: str = "") -> None:
        self._stage = f"{text} {detail}".rstrip()

    def progress(self, trial: Trial, progress: Progress) -> None:
        self._running[trial.id] = (trial, progress, time.monotonic())

    def epoch(self, trial: Trial, epoch: Epoch) -> None:
        if "val/AP" in epoch.values:
            self._ap[trial.id] = epoch.values["val/AP"]

    def ended(self, result: TrialResult) -> None:
        self._running.pop(result.trial.id, None)
        self.say(ended_text(result))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._table()] if self._running else []
        return Group(*parts, *([Text(self._stage, style="dim")] if self._stage else []))

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("trial", "", "epoch", "step", "images/s", "loss", "last AP", "left"):
            table.add_column(
                column, justify="left" if column in ("trial", "") else "right", no_wrap=True
            )
        for trial, progress, since in self._running.values():
            ap = self._ap.get(trial.id)
            left = progress.seconds_left
            table.add_row(
                label(trial),
                progress.stage,
                f"{progress.epoch}/{trial.training.epochs}" if progress.epoch else "",
                f"{progress.step}/{trial.steps_per_epoch}" if progress.epoch else "",
                _optional(progress.images_per_second, ".1f"),
                _optional(progress.loss, ".2f"),
                _optional(None if ap is None else 100 * ap, ".1f"),
                "" if left is None else duration(left - (time.monotonic() - since)),
            )
        return table


@contextmanager
def view_for(console: Console) -> Iterator[View]:
    """The view that suits where the output goes."""
    if not console.is_terminal:
        yield PlainView(console)
        return
    with LiveView(console) as view:
        yield view


def label(trial: Trial) -> str:
    return f"{trial.arm}, seed {trial.seed}"


def epoch_text(trial: Trial, epoch: Epoch, progress: Progress | None) -> str:
    values = epoch.values
    parts = [f"epoch {epoch.epoch}/{trial.training.epochs}", f"loss {values['train/total']:.2f}"]
    if "val/AP" in values:
        parts.append(f"AP {100 * values['val/AP']:.1f}")
    parts.append(f"{values['cost/images_per_second']:.1f} images/s")
    if progress is not None and progress.seconds_left and epoch.epoch < trial.training.epochs:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def ended_text(result: TrialResult) -> str:
    done = f"{len(result.history)}/{result.trial.training.epochs} epochs"
    ap = result.metric("AP")
    parts = [result.state, done, *([] if ap is None else [f"AP {ap:.1f}"])]
    text = f"{label(result.trial)}: {', '.join(parts)}"
    text = f"{text}: {result.reason}" if result.reason else text
    return "\n".join([text, *(f"{label(result.trial)}: {note}" for note in result.notes)])


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# -------------------------------------------------------------------------------------- the result


def show_results(console: Console, results: list[TrialResult]) -> None:
    """Every arm beside the paper, and every branch of it where they are measured."""
    for rows in filter(None, (summary_table(results), branch_table(results))):
        table = Table(box=SIMPLE_HEAD)
        for column in rows[0]:
            table.add_column(column, justify="left" if column in WORDS else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)


def show_metrics(console: Console, metrics: Metrics) -> None:
    """Metrics of an evaluation in percent, the overall ones and AP by class."""
    for title, values in (("metric", metrics.summary), ("class", metrics.per_class)):
        table = Table(box=SIMPLE_HEAD)
        table.add_column(title)
        table.add_column("%" if title == "metric" else "AP %", justify="right")
        for name, value in values.items():
            table.add_row(name, "–" if isnan(value) else f"{100 * value:.2f}")
        console.print(table)


def show_dataset(console: Console, report: DatasetReport) -> None:
    """Counts, the histogram of classes, and every problem."""
    for split in report.splits:
        console.print(
            f"[bold]{split.split}[/]: {split.images} images ({split.empty_images} empty), "
            f"{split.objects} objects ({', '.join(f'{n} {s}' for s, n in split.sizes.items())}), "
            f"{split.crowds} crowd regions; {'LVIS' if split.lvis else 'COCO'} format, "
            f"{split.annotations}",
            soft_wrap=True,
        )
        console.print(_histogram(split))
    for problem in report.problems:
        console.print(problem, markup=False, soft_wrap=True)
    problems = len(report.problems)
    console.print(f"{problems} problem{'s' * (problems != 1)}" if problems else "No problem found.")


def _histogram(split: SplitReport) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("class", "objects", "images"):
        table.add_column(column, justify="left" if column == "class" else "right")
    table.add_column("")
    largest = max(split.class_objects.values(), default=0) or 1
    for name, count in split.class_objects.items():
        bar = "█" * round(30 * count / largest)
        table.add_row(name, str(count), str(split.class_images[name]), bar)
    return table
