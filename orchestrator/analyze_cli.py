"""``codetr analyze``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _print_list(wanted: bool) -> None:
    if wanted:
        from codetr.analysis import CATALOGUE

        for name, about in CATALOGUE.items():
            print(f"{name:<{max(map(len, CATALOGUE))}}  {about.question} ({about.figure})")
        raise typer.Exit


def analyze(
    name: Annotated[str, typer.Argument(help="Of the analysis: see --list.")],
    checkpoints: Annotated[
        list[str], typer.Argument(help="Of a training or of convert: files, folders, or URLs.")
    ],
    *,
    data: Annotated[
        str, typer.Option("--data", help="Folder in COCO layout, or digits, or digits-lvis.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for page, pictures and arrays.")] = Path(
        "analysis"
    ),
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many validation images, evenly spread. Default: all."),
    ] = None,
    list_: Annotated[  # noqa: ARG001
        bool,
        typer.Option(
            "--list", callback=_print_list, is_eager=True, help="Print what there is, and end."
        ),
    ] = False,
) -> None:
    """Look at why it works: one of the paper's figures, for one checkpoint or several."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from orchestrator.analyze import analyze_checkpoints

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        tasks: dict[str, object] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done)  # type: ignore[arg-type]

        written = analyze_checkpoints(
            name,
            checkpoints,
            data,
            output,
            batch_size=batch_size,
            images=images,
            progress=show,
        )
    for path in written:
        print(path)
