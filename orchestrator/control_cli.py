"""The commands that look at runs and steer them: they read the disk alone, and start at once."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrator.records import Record

OutputOption = Annotated[Path, typer.Option("--output", help="Folder that runs were written to.")]
TrialArgument = Annotated[
    str, typer.Argument(metavar="TRIAL", help="Its id, a beginning of it, or its folder's name.")
]


def _absolute(output: Path) -> Path:
    return output.expanduser().absolute()


def status(
    name: Annotated[str | None, typer.Argument(help="Of this experiment only.")] = None,
    output: OutputOption = Path("runs"),
) -> None:
    """Show every trial: its state, since when, where, and its last metrics."""
    from orchestrator import control
    from orchestrator.records import at_work

    for folder, records in control.status(_absolute(output), name).items():
        lease = at_work(folder)
        _print_table(
            f"{folder.name}: " + ("not running" if lease is None else f"running ({lease.owner})"),
            [
                ["trial", "arm", "seed", "state", "epoch", "AP", "loss", "since", "where"],
                *map(_status_cells, records),
            ],
        )
        for record in records:
            if record.reason:
                print(f"  {record.id} failed: {record.reason}")


def _status_cells(record: Record) -> list[str]:
    last = record.history[-1].values if record.history else {}
    ap, loss = record.metric("AP"), last.get("train/total")
    since = record.since and datetime.fromtimestamp(record.since).strftime("%Y-%m-%d %H:%M:%S")
    return [
        record.id,
        record.arm,
        str(record.seed),
        record.state,
        f"{len(record.history)}/{record.epochs or '?'}",
        "" if ap is None else f"{ap:.1f}",
        "" if loss is None else f"{loss:.2f}",
        since or "",
        record.where,
    ]


def logs(
    trial: TrialArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written next.")
    ] = False,
    output: OutputOption = Path("runs"),
) -> None:
    """Print a trial's log, which its workers write."""
    from orchestrator import control

    with control.log_file(_absolute(output), trial).open(errors="replace") as file:
        while True:
            for line in file:
                print(line, end="", flush=follow)
            if not follow:
                return
            time.sleep(0.5)


def stop(
    target: Annotated[str, typer.Argument(metavar="NAME|TRIAL", help="What is to stop.")],
    output: OutputOption = Path("runs"),
) -> None:
    """Have a run end in order, as Ctrl-C would, or one trial save and stop where it is."""
    from orchestrator import control

    print(control.stop(_absolute(output), target))


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Experiment or trial.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same kind.")],
    output: OutputOption = Path("runs"),
) -> None:
    """Show how two experiments, or two trials, differ in their settings and their metrics."""
    from orchestrator import control

    settings, metrics = control.compare(_absolute(output), first, second)
    if len(settings) == 1:
        print("The settings are the same.")
    else:
        _print_table("settings", settings)
    _print_table("metrics (AP in percent)", metrics)


def _print_table(title: str, rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    # Whole even where the terminal is narrow: names are there to be copied.
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(needed, console.width), markup=False, highlight=False).print(table)
