"""This machine: what it has, found without importing torch, and what of it a trial takes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from codetr.config import ConfigError
from orchestrator.experiment import Resources


def local_cpus() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone knows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def local_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", d.name)]
    if visible is None:
        return len(devices)
    return min(len(devices), len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def fitted(resources: Resources, batch_sizes: Collection[int]) -> Resources:
    """The same with as many workers as this machine has room for, up to as many as were asked for.

    Nothing that is learned depends on their number: the batch is the trial's.
    """
    cpus, gpus = local_cpus(), local_gpus()
    room = gpus // resources.gpus_per_worker if resources.gpus_per_worker else cpus
    workers = max(
        (
            count
            for count in range(1, min(resources.workers, int(room)) + 1)
            if all(size % count == 0 for size in batch_sizes)
        ),
        default=1,
    )
    each = max(1, min(resources.cpus_per_worker, cpus // workers))
    least = min(resources.least, workers) if resources.least_workers else None
    return resources.model_copy(
        update={"workers": workers, "least_workers": least, "cpus_per_worker": each}
    )


def require_room(resources: Resources) -> None:
    """Refuse what this machine can never run, before anything is started.

    Raises:
        ConfigError: says what a trial needs and what is there.
    """
    for what, each, there in (
        ("CPU", resources.cpus_per_worker, local_cpus()),
        ("GPU", resources.gpus_per_worker, local_gpus()),
    ):
        if resources.least * each > there:
            raise ConfigError(
                f"one trial needs {resources.least * each:g} {what}(s) for {resources.least} "
                f"worker(s), this machine has {there}: use fewer --workers, --gpus-per-worker 0 "
                "for CPUs alone, or a cluster by --address"
            )


def require_even_shares(resources: Resources, batch_sizes: Collection[int]) -> None:
    """Refuse workers that would not get equally many images of a batch.

    Raises:
        ConfigError: names both numbers.
    """
    for size in batch_sizes:
        if size % resources.workers:
            raise ConfigError(
                f"training.batch_size={size} cannot be shared evenly by {resources.workers} "
                "workers: change --workers or --set batch_size="
            )
