"""Ray: the cluster that a plan runs on, started here or joined."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from codetr.config import ConfigError
from orchestrator.experiment import Resources
from orchestrator.interrupt import descendants, end_processes
from orchestrator.machine import local_cpus
from orchestrator.plan import Plan
from orchestrator.wording import one_line

_ENVIRONMENT = {
    # Every port of a cluster that is started here listens on 127.0.0.1 alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Workers without a GPU still see that there is none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The default of 2 s is spent several times while a worker group starts and ends.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_LOCAL_ENVIRONMENT = {
    # Other users of this machine reach 127.0.0.1, too.
    "RAY_AUTH_MODE": "token",
    # Watches for nodes about to be taken away: a process for each trial, and there is one node.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_OBJECT_STORE_BYTES = 128 * 2**20
"""Only arguments and reports pass through it; the default is a third of the memory."""

_MANY = 64
"""Nodes of a kind for which an autoscaler has no limit."""


class Cluster:
    """The Ray cluster of a plan, from :meth:`start` to :meth:`stop`.

    Make it before anything imports Ray, which reads its environment when it is imported.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._session: Path | None = None
        self._started = False
        more = _LOCAL_ENVIRONMENT if plan.address is None else authentication()
        for key, value in (_ENVIRONMENT | more).items():
            os.environ.setdefault(key, value)
        import ray

        logging.getLogger(ray.__name__).setLevel(logging.WARNING)

    @property
    def started(self) -> bool:
        return self._started

    def start(self) -> None:
        """Join the plan's cluster, or start one on this machine.

        Raises:
            ConfigError: the cluster does not answer, Ray does not start here, or there is no place
                for its token.
        """
        self._started = True
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "namespace": "codetr",
        }
        if self.plan.address is not None:
            self._join(self.plan.address, quiet)
            return
        if os.environ["RAY_AUTH_MODE"] == "token":
            _prepare_token()
        self._session = _start_local(quiet)

    def _join(self, address: str, options: dict[str, Any]) -> None:
        import ray

        _require_answer(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(f"--address {address}: no Ray cluster there: {reason}") from None

    def slots(self) -> int:
        """How many of the plan's trials run at a time, on the nodes that are there or may come.

        Raises:
            ConfigError: not even one fits; says what is there.
        """
        resources = self.plan.resources
        nodes = _nodes()
        workers = sum(_fit(node, resources) for node in nodes)
        if workers < resources.least:
            raise ConfigError(
                f"one trial needs {resources.least} worker(s) of {resources.cpus_per_worker} "
                f"CPUs and {resources.gpus_per_worker:g} GPUs, Ray has room for {workers} "
                f"({_described(nodes)}): use fewer --workers or --gpus-per-worker"
            )
        # Where not even one has all that it may have, the others wait until it has.
        fit = max(1, workers // resources.workers)
        return min(fit, resources.concurrency or fit)

    def stop(self, *, keep_logs: bool) -> None:
        """Leave the cluster, or end the one started here: all its processes, and its files unless
        they are needed to see what went wrong."""
        if not self._started:
            return
        import ray

        processes = descendants() if self._session else []
        ray.shutdown()
        # Its C++ side has put the default action in the place of our handler, unknown to Python.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        end_processes(processes, patience=5)
        if self._session and not keep_logs:
            shutil.rmtree(self._session, ignore_errors=True)

    @property
    def logs(self) -> Path | None:
        return self._session and self._session / "logs"


def _nodes() -> list[dict[str, float]]:
    """CPU and GPU of every node that the cluster has, or could have where that is more: a cluster
    that grows by itself may have no worker before one is asked for."""
    import ray
    from ray._private.state import state

    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()  # None without an autoscaler
    groups = config.node_group_configs if config is not None else ()
    could = [
        dict(group.resources)
        for group in groups
        for _ in range(group.max_count if group.max_count >= 0 else _MANY)
    ]
    nodes = max(there, could, key=_cpus)
    wanted = [{key: node.get(key, 0.0) for key in ("CPU", "GPU")} for node in nodes]
    return [node for node in wanted if any(node.values())]


def free_workers(resources: Resources) -> int:
    """How many workers have room on the cluster at this moment."""
    from ray._private.state import available_resources_per_node

    nodes = available_resources_per_node().values()
    return sum(
        _fit({key: node.get(key, 0.0) for key in ("CPU", "GPU")}, resources) for node in nodes
    )


def bundle(resources: Resources) -> dict[str, float]:
    """What one worker takes, in Ray's terms."""
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker, **gpus}


def _cpus(nodes: list[dict[str, float]]) -> float:
    return sum(node.get("CPU", 0.0) for node in nodes)


def _fit(node: dict[str, float], resources: Resources) -> int:
    """How many of a trial's workers have room on a node."""
    fit = node["CPU"] / resources.cpus_per_worker
    if resources.gpus_per_worker:
        fit = min(fit, node["GPU"] / resources.gpus_per_worker)
    return int(fit + 1e-6)  # ten workers of 0.1 GPU share one


def _described(nodes: list[dict[str, float]]) -> str:
    kinds = Counter(f"{node['CPU']:g} CPUs, {node['GPU']:g} GPUs" for node in nodes)
    return "; ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"


def show_token() -> None:
    """Have this process, and Ray's commands that it starts, show the token."""
    for key, value in authentication().items():
        os.environ.setdefault(key, value)
    _hide(_token_file())


def authentication() -> dict[str, str]:
    """Have Ray show its token where there is one: a cluster that wants none does not mind."""
    return {"RAY_AUTH_MODE": "token"} if _token_is_given() or _token_file().exists() else {}


def _token_file() -> Path:
    """Where Ray looks for a token that the environment does not give."""
    return Path("~/.ray/auth_token").expanduser()


def _token_is_given() -> bool:
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ


def _start_local(options: dict[str, Any]) -> Path:
    """Start Ray on this machine, twice if need be: it gives its own processes 30 s, which may be
    too few on a busy laptop. Returns its session's folder.

    Raises:
        ConfigError: it does not start.
    """
    with suppress(Exception):  # as bare as Ray raises it
        return _try_local(options)
    try:
        return _try_local(options)
    except Exception as error:
        raise ConfigError(
            f"Ray does not start on this machine: {one_line(error)} If the machine is busy, try "
            "again later; Ray's own words are in /tmp/ray/session_latest/logs"
        ) from error


def _try_local(options: dict[str, Any]) -> Path:
    """One attempt, which leaves nothing behind where it fails."""
    import ray

    before = set(descendants())
    try:
        context = ray.init(
            address="local",
            num_cpus=local_cpus(),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **options,
        )
    except Exception:
        ray.shutdown()
        end_processes([*set(descendants()) - before], patience=0)
        raise
    return Path(context.address_info["session_dir"])


def _prepare_token() -> None:
    """Have a token that no other user can read, before Ray makes one that all can.

    Raises:
        ConfigError: it cannot be written.
    """
    if _token_is_given():
        return
    path = _token_file()
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(file, "w") as stream:
            stream.write(secrets.token_hex(32))  # as Ray does
    except FileExistsError:
        _hide(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}: Ray keeps its token there; set "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that has one"
        ) from None


def _hide(path: Path) -> None:
    """Take a file of ours from the eyes of others, as far as its file system lets us."""
    with suppress(OSError):
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)


def _require_answer(address: str) -> None:
    """Refuse at once where nobody listens: Ray would try for ten minutes.

    Raises:
        ConfigError: not HOST:PORT, or no connection.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f"--address {address}: give HOST:PORT of the cluster's head, or 'auto' on one of its "
            "nodes"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: nothing answers there ({error})") from None
