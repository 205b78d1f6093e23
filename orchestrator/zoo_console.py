"""How the detectors of the zoo, and detecting in many images, look on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from codetr.config import DataConfig
from codetr.zoo.catalogue import Entry, Published, entry

if TYPE_CHECKING:
    from codetr.zoo.files import Report

NARROWEST, WIDE = 130, 180
"""Columns of the table: at least so many, also where a terminal must wrap them; and so many where
it goes into a file or a pipe."""


def show_models(entries: list[Entry]) -> None:
    """A line for each detector."""
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("detector", "backbone"):
        table.add_column(column, no_wrap=True)
    for column in ("queries", "levels", "K"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("data", no_wrap=True)
    for column in ("params", "training", "GFLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("AP (epochs)", overflow="fold")
    for found in entries:
        table.add_row(found.name, *_sizes(found), aps(found.published))
    console.print(table)
    console.print("params, training: millions of parameters at inference and in training. AP: as")
    console.print("published; LSJ: with large-scale jitter. –: 'codetr models NAME' says why.")


def show_detector(entry: Entry) -> None:
    """All of one detector, as YAML that an experiment could have."""
    console = _console()
    console.print(f"# {entry.name}: AP {aps(entry.published)}", markup=False)
    if entry.unavailable is not None:
        console.print(f"# cannot be built: {entry.unavailable}", markup=False)
        return
    if (measured := entry.measured) is not None:
        console.print(
            f"# {measured.inference_parameters:,} parameters, {measured.training_parameters:,} in "
            f"training, {measured.gflops:,} GFLOPs"
        )
    console.print(f"# images: {image_size(entry.data_config)}")
    settings = entry.config.model_dump(mode="json")
    console.print(yaml.safe_dump({"detector": settings}, sort_keys=False), markup=False, end="")


def show_conversion(out: Path, report: Report) -> None:
    """What a file became, and what a user may want to have otherwise."""
    detector, names = report.weights.detector, report.names
    print(
        f"{out}: {names[0] if names else detector.backbone.name}, "
        f"K = {detector.k}, {detector.queries.total} queries, {detector.num_classes} classes; "
        f"{report.tensors} tensors read"
    )
    print(f"  images: {image_size(report.weights.data)}")
    if names == ():
        print("  no detector of the zoo has these shapes: this size, and all else that shapes do")
        print("  not say, may not be what its published AP was measured with")
    elif names and names[1:]:
        others = (f"{name} ({image_size(entry(name).data_config)})" for name in names[1:])
        print(f"  ambiguous: as well {', or '.join(others)}: choose with --name")
    for why, count in Counter(report.dropped.values()).items():
        first = next(key for key, reason in report.dropped.items() if reason == why)
        print(f"  left out: {count}, as {first} ({why})")


def image_size(data: DataConfig) -> str:
    """In what size a detector is shown images."""
    if data.jitter.enabled:
        return f"on a canvas of {data.jitter.canvas} × {data.jitter.canvas} pixels"
    if not data.short_sides:
        return "in their own size"
    return f"short side {max(data.short_sides)} pixels, long side at most {data.max_side}"


def aps(published: tuple[Published, ...]) -> str:
    """``52.1 (12), 54.8 (36, LSJ)``; what several tables report, once."""
    texts = []
    for row in published:
        remarks = ", ".join(filter(None, [str(row.epochs or ""), row.note]))
        texts.append(f"{row.ap:.1f} ({remarks})" if remarks else f"{row.ap:.1f}")
    return ", ".join(dict.fromkeys(texts))


def _sizes(entry: Entry) -> tuple[str, ...]:
    if entry.unavailable is not None:
        return ("–", "", "", "", entry.data, "", "", "")
    config, measured = entry.config, entry.measured
    numbers = ["?", "?", "?"]
    if measured is not None:
        parameters = (measured.inference_parameters, measured.training_parameters)
        numbers = [*(f"{n / 1e6:.1f}" for n in parameters), f"{measured.gflops:,.0f}"]
    return (
        config.backbone.name,
        str(config.queries.total),
        str(config.transformer.levels),
        str(config.k),
        entry.data,
        *numbers,
    )


def _console() -> Console:
    console = Console(highlight=False)
    width = max(console.width, NARROWEST) if console.is_terminal else WIDE
    return Console(highlight=False, width=width)


@contextmanager
def image_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that is gone in the end; what it gives is called with what is done, how many images it
    is done with, and of how many."""
    nobody_looks = not console.is_terminal
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=nobody_looks) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield report
