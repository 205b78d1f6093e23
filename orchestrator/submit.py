"""Runs on a cluster elsewhere: the working tree and the command go to its Jobs API.

Nothing of this machine's environment goes with them: a cluster has its own tokens and keys, and
what a job is submitted with can be read by everyone who sees its dashboard.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetr.config import ConfigError
from orchestrator.cluster import show_token
from orchestrator.options import JOBS_API
from orchestrator.plan import Options
from orchestrator.settings import parse_settings
from orchestrator.tracking import REVISION, revision_of
from orchestrator.wording import has_secret, one_line, without_secrets

EXCLUDED = (
    ".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".hypothesis", "node_modules", "/runs", "/dist", "/build", "mlruns", "*.db",
    "*.pt", "*.pth", "*.safetensors", "*.zip", "*.tar", "*.tar.gz", "*.tgz",
)  # fmt: skip
"""Never uploaded, beside what .gitignore and .rayignore name; in gitignore's syntax."""

SECRETS = (
    ".env", ".env.*", ".netrc", ".aws", ".ssh", ".ray", "*.pem", "*.key", "id_rsa*", "id_ed25519*",
    "credentials*",
)  # fmt: skip
"""Never uploaded either: everyone who reaches the cluster could read them."""

BIG_FILE = 20 * 2**20
"""Files from this many bytes on are data, not code."""


def is_jobs_api(address: str | None) -> bool:
    """Whether this is the address of a Jobs API, not of a Ray cluster to join."""
    return address is not None and address.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Submission:
    """What is sent to a Jobs API.

    Attributes:
        tree: the folder that is uploaded, and in which the job runs.
        command: the words of the job's command line.
        big: files that stay here for their size, relative to the tree.
        grace: seconds that the job's trials have to save when it is stopped.
    """

    tree: Path
    command: tuple[str, ...]
    big: tuple[str, ...]
    grace: float

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of the job."""
        excludes = [*EXCLUDED, *SECRETS, *(f"/{_escaped(file)}" for file in self.big)]
        return {
            "working_dir": str(self.tree),
            "excludes": excludes,
            # A stopped run then ends its MLflow runs and writes its tables; Ray's 3 s are too few.
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": f"{self.grace + 60:.0f}",
                # Its history stays here.
                **({REVISION: revision} if (revision := revision_of(self.tree)) else {}),
            },
        }


def make_submission(tree: Path, words: list[str], file: str | None, options: Options) -> Submission:
    """The same command for a cluster elsewhere.

    Args:
        tree: absolute; the working tree.
        words: of the command as it was given, without the program's name.
        file: the experiment's or sweep's, or its name, which has been read here.
        options: what the words mean.

    Raises:
        ConfigError: it can never work there.
    """
    if tree in (Path.home(), Path(tree.anchor)):
        raise ConfigError(f"{tree} would be uploaded whole: go to the folder of your experiments")
    parse_settings(list(options.settings))
    if file is not None and (Path(file).is_absolute() or ".." in Path(file).parts):
        raise ConfigError(f"{file}: not below {tree}, so the cluster would not have it")
    if not options.output.is_absolute():
        raise ConfigError(
            f"--output {options.output}: on a cluster elsewhere it must be an absolute path, on "
            "storage that all its nodes share: a job's own folder goes away with it"
        )
    data = options.data
    if data not in (None, "digits", "digits-lvis") and not Path(data).is_absolute():
        raise ConfigError(f"--data {data}: give its absolute path on the cluster")
    command = ("codetr", *_without_address(words))
    _require_no_secret(options, command)
    return Submission(tree, command, tuple(_big_files(tree)), options.grace)


def _require_no_secret(options: Options, command: tuple[str, ...]) -> None:
    shown = "the command is shown in the cluster's dashboard"
    if has_secret(options.tracking_uri or ""):
        raise ConfigError(
            f"--tracking-uri: {shown}: set user and password in the environment of the cluster "
            "instead (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN)"
        )
    if has_secret(options.storage or ""):
        raise ConfigError(
            f"--storage: {shown}: give the address without its secret, and the cluster the key: in "
            "its environment, or in files of its own"
        )
    for word in command:
        if has_secret(word):
            raise ConfigError(f"{without_secrets(word)}: {shown}: leave the secret out")


def _without_address(words: list[str]) -> Iterator[str]:
    """Ray tells a job where its cluster is."""
    rest = iter(words)
    for word in rest:
        if word == "--address":
            next(rest, None)
        elif word != "--detach" and not word.startswith("--address="):
            yield word


def _big_files(tree: Path) -> Iterator[str]:
    skipped = {name.strip("/") for name in (*EXCLUDED, *SECRETS)}
    for folder, folders, files in os.walk(tree):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for file in sorted(files):
            path = Path(folder, file)
            if path.is_file() and path.stat().st_size >= BIG_FILE:
                yield path.relative_to(tree).as_posix()


def _escaped(file: str) -> str:
    """A file's name as a pattern of gitignore that means this file alone."""
    return "".join(f"\\{c}" if c in "\\*?[]!# " else c for c in file)


# ------------------------------------------------------------------------------------- the Jobs API


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """
        Raises:
            ConfigError: nobody answers there, or not to us.
        """
        if not is_jobs_api(address):
            raise ConfigError(f"--address {address}: jobs need http://HOST:PORT of the dashboard")
        self.address = address
        show_token()
        # Ray prefers these to what it is told.
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        os.environ.pop("RAY_ADDRESS", None)
        with self._told():
            from ray.dashboard.modules import dashboard_sdk
            from ray.dashboard.modules.job import sdk

            for module in (dashboard_sdk, sdk):  # they tell of every upload and connection
                module.logger.setLevel(logging.WARNING)
            self._client = sdk.JobSubmissionClient(address)

    def submit(self, submission: Submission) -> str:
        """Upload the tree, start the command there; returns the job's id.

        Raises:
            ConfigError: the cluster does not take it.
        """
        with self._told():
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(submission.command),
                    runtime_env=submission.runtime_env,
                )
            )

    def follow(self, job: str) -> int:
        """Print the job's log from its beginning until it ends; returns its exit code.

        Raises:
            ConfigError: no such job.
        """
        self._require(job)

        async def print_all() -> None:
            async for text in self._client.tail_job_logs(job):
                print(text, end="", flush=True)

        with self._told():
            asyncio.run(print_all())
            return self._exit_code(job)

    def logs(self, job: str) -> str:
        """What the job has printed so far.

        Raises:
            ConfigError: no such job.
        """
        self._require(job)
        with self._told():
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Have the job end in order; False if it had ended before.

        Raises:
            ConfigError: no such job.
        """
        self._require(job)
        with self._told():
            return bool(self._client.stop_job(job))

    def list(self) -> list[tuple[str, str, str]]:
        """Id, state and command of every job, the newest first."""
        with self._told():
            jobs = self._client.list_jobs()
        jobs.sort(key=lambda job: -(job.start_time or 0))
        return [(str(j.submission_id), str(j.status.value), j.entrypoint) for j in jobs]

    def _exit_code(self, job: str) -> int:
        info = self._client.get_job_info(job)
        if info.status.value == "SUCCEEDED":
            return 0
        print(f"job {job}: {info.status.value.lower()}: {one_line(info.message or '')}", flush=True)
        return int(info.driver_exit_code or 1)

    def _require(self, job: str) -> None:
        with self._told():
            known = any(job == info.submission_id for info in self._client.list_jobs())
        if not known:
            raise ConfigError(f"no job '{job}' at {self.address}: 'codetr job list' shows them")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Ray's errors as one line."""
        import ray

        logging.getLogger(ray.__name__).setLevel(logging.WARNING)
        try:
            yield
        except ConfigError:
            raise
        except ray.exceptions.AuthenticationError:
            raise ConfigError(
                f"--address {self.address}: the cluster wants its token: put it into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--address {self.address}: {one_line(error)}") from None


def how_to_return(job: str, address: str) -> str:
    """What to type for a job that goes on without us."""
    where = "" if address == JOBS_API else f" --address {address}"
    return (
        f"{job} goes on. See it again: codetr job attach {job}{where}\n"
        f"Stop it: codetr job stop {job}{where}"
    )
