"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

JOBS_PORT = 8265
"""Where a head's dashboard and Jobs API listen, on its 127.0.0.1."""

JOBS_API = f"http://127.0.0.1:{JOBS_PORT}"

ProfileOption = Annotated[
    Literal["laptop", "paper"] | None,
    typer.Option(help="Its size. Default: laptop, or paper with a GPU and --data."),
]
DataOption = Annotated[
    str | None, typer.Option(help="Folder in COCO layout, or digits, or digits-lvis.")
]
NeededDataOption = Annotated[
    str, typer.Option("--data", help="Folder in COCO layout, or digits, or digits-lvis.")
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of folder and MLflow experiment.")
]
OutputOption = Annotated[
    Path, typer.Option("--output", help="Folder for everything that runs write.")
]
TrackingOption = Annotated[
    str | None, typer.Option(help="MLflow server or database. Default: OUTPUT/mlflow.db.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="Ray cluster. Default: one on this machine."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be trained, and start nothing.")
]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|MIN-MAX",
        help="Training workers that share each trial's batch; 2-8: as many as have room.",
    ),
]
GpusPerWorkerOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each worker; 0 trains on CPUs.")
]
GraceOption = Annotated[
    float,
    typer.Option(min=0, help="Seconds to save in, within the epoch, when asked to end."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Where checkpoints lie, as s3://bucket/path. Default: below OUTPUT."
    ),
]
AnalyzeOption = Annotated[
    str | None,
    typer.Option(
        "--analyze",
        metavar="all|none|LIST",
        help="Look at the trained detectors in the end: see 'codetr analyze --list'.",
    ),
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="With --address http://…: return once submitted.")
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that are broken.")
]
