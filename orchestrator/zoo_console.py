"""How the detectors of the zoo, and detecting in many images, look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from codetr.zoo.catalogue import Entry, Published

WIDE = 180
"""Columns of a table that goes into a file or a pipe, where nothing is cut off."""


def show_models(entries: list[Entry]) -> None:
    """A line for each detector."""
    console = _console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("detector", no_wrap=True)
    table.add_column("backbone")
    for column in ("queries", "levels", "K"):
        table.add_column(column, justify="right")
    table.add_column("data")
    for column in ("parameters", "in training", "GFLOPs"):
        table.add_column(column, justify="right")
    table.add_column("published AP (epochs)", overflow="fold")
    for found in entries:
        table.add_row(found.name, *_sizes(found), aps(found.published))
    console.print(table)
    if any(found.unavailable for found in entries):
        console.print("–: listed for its published AP; codetr models NAME says what is missing")


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
    settings = entry.config.model_dump(mode="json")
    console.print(yaml.safe_dump({"detector": settings}, sort_keys=False), markup=False, end="")


def aps(published: tuple[Published, ...]) -> str:
    """``52.1 (12), 54.8 (36, large-scale jitter)``; what several tables report, once."""
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
        numbers = [*(f"{n / 1e6:.1f} M" for n in parameters), f"{measured.gflops:,.0f}"]
    return (
        config.backbone.name,
        str(config.queries.count),
        str(config.transformer.levels),
        str(config.k),
        entry.data,
        *numbers,
    )


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


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
