"""``codetr cluster ...`` for machines elsewhere, ``codetr job ...`` for runs there."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.options import JOBS_API

if TYPE_CHECKING:
    from orchestrator.clusters import Action
    from orchestrator.plan import Options
    from orchestrator.submit import Jobs

cluster_app = typer.Typer(help="Start, look at and stop a cluster of Ray's launcher.")
job_app = typer.Typer(help="Runs on a cluster elsewhere: see them again, stop them.")

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="Cluster file, or a shipped one: aws, gcp, …")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print Ray's command, and stop.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id: see 'codetr job list'.")]
AddressOption = Annotated[
    str, typer.Option(envvar="RAY_ADDRESS", help="Jobs API of the cluster.", show_default=True)
]


@cluster_app.command()
def up(file: FileArgument, *, yes: YesOption = False, dry_run: DryRunOption = False) -> None:
    """Start a cluster, or bring it to what FILE says now."""
    _launch("up", file, yes=yes, dry_run=dry_run)


@cluster_app.command()
def status(file: FileArgument, *, dry_run: DryRunOption = False) -> None:
    """Show its nodes, what they have, and what waits for more."""
    _launch("status", file, dry_run=dry_run)


@cluster_app.command()
def down(file: FileArgument, *, yes: YesOption = False, dry_run: DryRunOption = False) -> None:
    """Stop all its machines."""
    _launch("down", file, yes=yes, dry_run=dry_run)


@cluster_app.command()
def ssh(
    file: FileArgument,
    *,
    forward: Annotated[
        bool,
        typer.Option("--forward", help=f"Meanwhile its Jobs API is here too, as {JOBS_API}."),
    ] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Open a shell on its head."""
    _launch("ssh", file, forward=forward, dry_run=dry_run)


@cluster_app.command()
def drain(
    *,
    after_notice: Annotated[
        str | None,
        typer.Option(metavar="aws|gcp", help="Wait until that cloud takes the machine away."),
    ] = None,
    within: Annotated[
        int, typer.Option(min=0, help="Else: seconds to save in, for which it returns not.")
    ] = 100,
) -> None:
    """On a node of a cluster: have its trials save, as it is going away. See cluster/*.yaml."""
    from orchestrator.cluster import show_token
    from orchestrator.drain import leave, leave_and_stay, wait_for_notice

    show_token()
    if after_notice is None:
        raise typer.Exit(leave_and_stay(within))
    seconds = wait_for_notice(after_notice)
    raise typer.Exit(leave(seconds, f"{after_notice} takes the machine away"))


def _launch(
    action: Action, file: str, *, yes: bool = False, forward: bool = False, dry_run: bool = False
) -> None:
    from orchestrator.clusters import open_cluster_file, run_ray

    command = open_cluster_file(file).command(action, yes=yes, forward=forward)
    print(shlex.join(command), flush=True)
    if not dry_run:
        raise typer.Exit(run_ray(command))


# -------------------------------------------------------------------------------------------- jobs


def submits(address: str | None, *, detach: bool) -> bool:
    """Whether ``--address`` means a Jobs API, to which the command goes, and not a cluster to join.

    Raises:
        typer.BadParameter: ``--detach`` without one.
    """
    from orchestrator.submit import is_jobs_api

    if is_jobs_api(address):
        return True
    if detach:
        raise typer.BadParameter("needs --address http://HOST:PORT", param_hint="--detach")
    return False


def submit_command(file: str | None, options: Options, *, detach: bool, dry_run: bool) -> None:
    """``codetr run`` or ``codetr sweep`` with the address of a Jobs API.

    Args:
        file: the experiment's or sweep's, or its name.
    """
    from orchestrator.submit import Jobs, how_to_return, make_submission

    assert options.address is not None
    submission = make_submission(Path.cwd(), sys.argv[1:], file, options)
    for left_out in submission.big:
        print(f"not uploaded, as it is big: {left_out}", flush=True)
    if dry_run:
        print(f"would upload {submission.tree} to {options.address} and start there:")
        print(shlex.join([word for word in submission.command if word != "--dry-run"]))
        return
    jobs = Jobs(options.address)
    job = jobs.submit(submission)
    print(f"submitted {job}: {shlex.join(submission.command)}", flush=True)
    if detach:
        print(how_to_return(job, options.address))
        return
    _follow(jobs, job)


@job_app.command()
def attach(job: JobArgument, address: AddressOption = JOBS_API) -> None:
    """Print a job's log from its beginning until it ends. Ctrl-C leaves the job running."""
    from orchestrator.submit import Jobs

    _follow(Jobs(address), job)


@job_app.command()
def logs(job: JobArgument, address: AddressOption = JOBS_API) -> None:
    """Print what a job has said so far."""
    from orchestrator.submit import Jobs

    print(Jobs(address).logs(job), end="")


@job_app.command()
def stop(job: JobArgument, address: AddressOption = JOBS_API) -> None:
    """Have a job end in order."""
    from orchestrator.submit import Jobs

    print(f"{job}: {'stopping' if Jobs(address).stop(job) else 'had ended before'}")


@job_app.command("list")
def list_jobs(address: AddressOption = JOBS_API) -> None:
    """List the jobs of a cluster, the newest first."""
    from orchestrator.submit import Jobs

    for job, state, command in Jobs(address).list():
        print(f"{job}  {state.lower():<9}  {command}")


def _follow(jobs: Jobs, job: str) -> None:
    from orchestrator.submit import how_to_return

    try:
        code = jobs.follow(job)
    except KeyboardInterrupt:
        print(f"\n{how_to_return(job, jobs.address)}", flush=True)
        code = 0
    raise typer.Exit(code)
