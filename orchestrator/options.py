"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

JOBS_PORT = 8265
"""Where a head's dashboard and Jobs API listen, on its 127.0.0.1."""

JOBS_API = f"http://127.0.0.1:{JOBS_PORT}"

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
