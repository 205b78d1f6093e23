"""Commands of the zoo: what detectors there are, and official checkpoints in and out."""

from __future__ import annotations

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
    from orchestrator.zoo_console import show_conversion

    if to_official:
        if name is not None or classes is not None:
            raise ConfigError("--to-official takes neither --name nor --classes")
        export(checkpoint, out)
        print(f"{out}: official names")
        return
    show_conversion(out, convert_file(checkpoint, out, name=name, annotations=classes))
