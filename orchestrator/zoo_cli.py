"""Commands of the zoo: what detectors there are, and official checkpoints in and out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def models(
    name: Annotated[
        str | None, typer.Argument(help="Of one detector: all of its settings as YAML.")
    ] = None,
) -> None:
    """List the detectors that have a name, with their sizes and what the paper reports."""
    from codetr.zoo.catalogue import entries, entry
    from orchestrator.zoo_console import show_detector, show_models

    if name is None:
        show_models(entries())
    else:
        show_detector(entry(name))


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint, or one of a training.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .pth.")],
    *,
    name: Annotated[
        str | None,
        typer.Option(help="Which detector it is, where several have the same shapes."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Annotation file with the classes, where the checkpoint names none."),
    ] = None,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="Back: write the original's names.")
    ] = False,
) -> None:
    """Make weights for eval and predict of an official checkpoint; no code in it is run."""
    from codetr.config import ConfigError
    from codetr.zoo.files import convert as convert_file
    from codetr.zoo.files import export

    if to_official:
        if name is not None or classes is not None:
            raise ConfigError("--to-official takes neither --name nor --classes")
        export(checkpoint, out)
        print(f"{out}: official names")
        return
    report = convert_file(checkpoint, out, name=name, annotations=classes)
    detector = report.weights.detector
    print(
        f"{out}: {report.names[0] if report.names else detector.backbone.name}, "
        f"K = {detector.k}, {detector.queries.count} queries, {detector.num_classes} classes; "
        f"{report.tensors} tensors read"
    )
    if len(report.names) > 1:
        others = ", ".join(report.names[1:])
        print(f"  has the shapes of {others}, too: choose its settings with --name")
    for why, count in Counter(report.dropped.values()).items():
        first = next(key for key, reason in report.dropped.items() if reason == why)
        print(f"  left out: {count}, as {first} ({why})")
