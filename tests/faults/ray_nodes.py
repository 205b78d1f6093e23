"""A Ray cluster of several nodes on this machine, each of which can be lost like a machine."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from laboratory import CODETR, PATIENCE, descendants, free_port

RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
_MEMORY = "--object-store-memory=100000000"


@dataclass(frozen=True)
class Place:
    """Where a node is: its address, and what makes a command run there.

    Attributes:
        enter: words before the command, as of another network namespace.
    """

    ip: str
    enter: tuple[str, ...] = ()


def on_loopback(number: int) -> Place:
    """All of 127.0.0.0/8 is this machine: the nodes have addresses of their own."""
    return Place(f"127.0.0.{number}")


def apart(number: int) -> Place:
    """The same, of a node whose processes see no others: which node a command runs on, Ray tells by
    the processes that it finds beside it."""
    return Place(f"127.0.0.{number}", ("unshare", "--pid", "--fork", "--mount-proc"))


HEAD = on_loopback(1)


@dataclass
class RayNodes:
    """A head without CPUs, and nodes with one CPU each, behind a token.

    Attributes:
        environment: for commands that use the cluster.
    """

    head: Place = HEAD
    port: int = field(default_factory=free_port)
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rn-", dir="/tmp")))
    _running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**token, "RAY_USAGE_STATS_ENABLED": "0"}
        self._start(
            self.head, "--head", f"--port={self.port}", "--num-cpus=0",
            "--include-dashboard=false", f"--temp-dir={self._folder}",
        )  # fmt: skip

    @property
    def address(self) -> str:
        return f"{self.head.ip}:{self.port}"

    def add(self, place: Place) -> None:
        """Start a node with one CPU, and wait until the cluster knows it."""
        self._start(place, f"--address={self.address}", "--num-cpus=1")

    def kill(self, place: Place) -> None:
        """kill -9 of all that runs on a node, at once."""
        process = self._running.pop(place.ip)
        for one in [*descendants(process), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def drain(self, place: Place, seconds: int) -> None:
        """Have ``codetr`` tell Ray, as after a cloud's notice, that the node on which it runs is
        going to be taken away; returns after so many seconds.

        Args:
            place: one whose processes see no other node's: see :func:`apart`.
        """
        inside = psutil.Process(self._running[place.ip].pid).children()[0].pid
        drained = subprocess.run(
            ["nsenter", f"--target={inside}", "--pid", "--mount", *CODETR,
             "cluster", "drain", "--within", str(seconds)],
            env={**os.environ, **self.environment, "RAY_ADDRESS": self.address},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert drained.returncode == 0, drained.stdout + drained.stderr

    def stop(self) -> None:
        for place in [*self._running]:
            self.kill(Place(place))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, place: Place, *words: str) -> None:
        log = self._folder.with_suffix(f".{place.ip}.log")
        with log.open("w") as out:
            self._running[place.ip] = subprocess.Popen(
                [*place.enter, *RAY, "start", *words, f"--node-ip-address={place.ip}",
                 _MEMORY, "--block"],
                env={**os.environ, **self.environment},
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait_for(place, log)

    def _wait_for(self, place: Place, log: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while "--block" not in log.read_text():  # printed once the node has started
            assert self._running[place.ip].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        log.unlink()
