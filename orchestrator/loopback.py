"""torch's process group on one machine, for which nothing listens beyond 127.0.0.1.

Ray Train has the workers meet at a TCP store, and torch's listens on every interface. Workers of
one machine can meet at a file, and talk over the loopback interface. Imports torch and Ray, so
import it late.
"""

from __future__ import annotations

import os
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from torch import distributed


class LoopbackConfig(TorchConfig):  # type: ignore[misc]
    """A :class:`TorchConfig` for a Ray cluster that is one machine."""

    @property
    def backend_cls(self) -> type[Backend]:
        return LoopbackBackend


class LoopbackBackend(Backend):  # type: ignore[misc]
    """Joins the workers, or leaves a single one by itself."""

    share_cuda_visible_devices = True  # as Ray's own: NCCL wants to see the neighbours' GPUs

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        world_size = len(worker_group)
        if world_size == 1:
            return
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        folder = Path(tempfile.mkdtemp(prefix="codetr-rendezvous-"))
        futures = [
            worker_group.execute_single_async(
                rank,
                _join,
                backend_config.backend or ("nccl" if gpus else "gloo"),
                folder / "store",
                rank,
                world_size,
                timedelta(seconds=backend_config.timeout_s),
            )
            for rank in range(world_size)
        ]
        ray.get(futures)


def _join(
    backend: str, meeting_point: Path, rank: int, world_size: int, timeout: timedelta
) -> None:
    interface = _loopback_interface()
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    distributed.init_process_group(
        backend,
        init_method=meeting_point.as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def _loopback_interface() -> str:
    """``lo`` on Linux, ``lo0`` on a Mac."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == "127.0.0.1" for a in addresses):
            return name
    raise RuntimeError("this machine has no interface with the address 127.0.0.1")
