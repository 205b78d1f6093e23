"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Training workers that share each trial's batch.")
]
GpusPerWorkerOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each worker; 0 trains on CPUs.")
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that are broken.")
]
