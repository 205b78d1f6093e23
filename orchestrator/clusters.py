"""Clusters of Ray's launcher: check a cluster file, then hand it to the installed ``ray``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from codetr.config import ConfigError, nearest
from orchestrator.options import JOBS_PORT
from orchestrator.share import share
from orchestrator.wording import one_line

Action = Literal["up", "status", "down", "ssh"]

_STATUS = "test ! -f ~/.ray/auth_token || export RAY_AUTH_MODE=token; ray status"
_PLACEHOLDER = re.compile(r"YOUR-[A-Z-]+")
_OTHER_LAUNCHERS = {
    "kuberay": "kubectl apply -f {path}",
    "slurm": "sbatch {path}",
}


@dataclass(frozen=True)
class ClusterFile:
    """A file for Ray's launcher that Ray itself accepts."""

    path: Path

    def command(self, action: Action, *, yes: bool = False, forward: bool = False) -> list[str]:
        """What to run: Ray's command line.

        Args:
            action: what to do with the cluster.
            yes: do not let Ray ask.
            forward: with ``ssh``, have :data:`JOBS_PORT` of the head on this machine too.
        """
        path = str(self.path)
        return {
            "up": ["ray", "up", *["--yes"] * yes, path],
            "down": ["ray", "down", *["--yes"] * yes, path],
            "status": ["ray", "exec", path, _STATUS],
            "ssh": ["ray", "attach", *["--port-forward", str(JOBS_PORT)] * forward, path],
        }[action]


def open_cluster_file(name: str) -> ClusterFile:
    """The cluster file of that path, or the shipped one of that name.

    Raises:
        ConfigError: no such file, none of Ray's launcher, one that Ray refuses, or one in which
            something is still to be filled in.
    """
    path = _find(name)
    content = _read(path)
    _require_ray_accepts(path, content)
    left = sorted(set(_placeholders(content)))
    if left:
        raise ConfigError(f"{path}: fill in {', '.join(left)} first, in a copy of your own")
    return ClusterFile(path)


def run_ray(command: list[str]) -> int:
    """Run a command of the ``ray`` that is installed beside this Python; returns its exit code.

    Raises:
        ConfigError: it is not there.
    """
    beside = Path(sys.executable).with_name("ray")
    program = str(beside) if beside.exists() else shutil.which("ray")
    if program is None:
        raise ConfigError("Ray's command 'ray' is not installed: pip install 'ray[default]'")
    return subprocess.run([program, *command[1:]], check=False).returncode


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(share("cluster").glob("*.yaml"))}
    for other, command in _OTHER_LAUNCHERS.items():
        if name == other:
            file = next(share("cluster").glob(f"{other}.*"))
            raise ConfigError(f"{name} is not started by Ray: {command.format(path=file)}")
    launchable = [stem for stem in shipped if stem not in _OTHER_LAUNCHERS]
    if name in launchable:
        return shipped[name]
    raise ConfigError(f"{name}: no such file or shipped cluster; {nearest(name, launchable)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is not a mapping of settings")
    if content.get("kind") == "RayCluster":
        raise ConfigError(f"{path} is for Kubernetes: kubectl apply -f {path}")
    return content


def _require_ray_accepts(path: Path, content: dict[str, Any]) -> None:
    """Prepare and check the file as ``ray up`` will.

    Raises:
        ConfigError: with Ray's reason.
    """
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(content))
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "top level"
        raise ConfigError(f"{path}: {where}: {one_line(error.message)}") from None
    except Exception as error:  # Ray's preparation meets wrong types with whatever comes
        raise ConfigError(f"{path}: Ray refuses it: {one_line(error)}") from None


def _placeholders(content: Any) -> Iterator[str]:
    """What the shipped files leave to their user."""
    if isinstance(content, dict):
        for value in content.values():
            yield from _placeholders(value)
    elif isinstance(content, list):
        for value in content:
            yield from _placeholders(value)
    elif isinstance(content, str):
        yield from _PLACEHOLDER.findall(content)
