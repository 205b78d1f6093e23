"""``codetr sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from orchestrator.options import (
    AddressOption,
    DataOption,
    DetachOption,
    DryRunOption,
    GpusPerWorkerOption,
    GraceOption,
    NameOption,
    OutputOption,
    ProfileOption,
    SkipBadOption,
    StorageOption,
    TrackingOption,
    WorkersOption,
)
from orchestrator.remote_cli import submit_command, submits

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.invocation import Outcome
    from orchestrator.sweep import Sweep


def sweep(
    name: Annotated[
        str | None,
        typer.Argument(help="Sweep (experiments/sweeps/*.yaml), experiment, or YAML file."),
    ] = None,
    *,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES", help="A dimension: lambda_1=0.5,1,2 or lambda_1=0.25..4:log."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Suggestions, or members for pbt; a grid takes every combination."
        ),
    ] = None,
    searcher: Annotated[
        Literal["optuna", "grid", "random"] | None,
        typer.Option(help="Default: optuna; pbt draws at random."),
    ] = None,
    scheduler: Annotated[
        Literal["asha", "none", "pbt"] | None,
        typer.Option(
            help="asha stops early what looks bad; pbt has the worst go on from the best with "
            "other settings. Default: asha."
        ),
    ] = None,
    interval: Annotated[
        int | None,
        typer.Option(min=1, help="pbt: epochs between exchanges. Default: a quarter of them."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="To maximise. Default: AP.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time. Default: as many as fit.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of every trial and of what is drawn.")
    ] = None,
    profile: ProfileOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all trials, as epochs=4."),
    ] = None,
    skip_bad: SkipBadOption = False,
    dry_run: DryRunOption = False,
    name_option: NameOption = None,
    output: OutputOption = Path("runs"),
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    grace: GraceOption = 30.0,
    detach: DetachOption = False,
) -> None:
    """Search settings with Ray Tune, and rank what was tried.

    The same command again goes on where it stopped.
    """
    from orchestrator.plan import Options
    from orchestrator.sweep import SweepOptions, plan_sweep, read_sweep

    common = Options(
        profile=profile,
        data=data,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        concurrency=max_concurrent,
        settings=tuple(set_ or ()),
        skip_bad=skip_bad,
        name=name_option,
        output=output,
        tracking_uri=tracking_uri,
        address=address or None,
        storage=storage,
        grace=grace,
    )
    given = SweepOptions(
        over=tuple(over or ()),
        samples=samples,
        searcher=searcher,
        scheduler=scheduler,
        metric=metric,
        interval=interval,
        seed=seed,
        common=common,
    )
    experiment, search = read_sweep(name, given)
    if submits(common.address, detach=detach):
        submit_command(name, common, detach=detach, dry_run=dry_run)
        return
    run_and_show(plan_sweep(experiment, search, common), dry_run=dry_run)


def run_and_show(planned: Sweep, *, dry_run: bool = False) -> NoReturn:
    """Print the sweep, run it, print what came of it, and leave with its exit code."""
    from rich.console import Console

    from orchestrator.console import view_for
    from orchestrator.interrupt import Interrupted
    from orchestrator.sweep_run import run_sweep

    console = Console(soft_wrap=True, highlight=False)
    _show_sweep(console, planned)
    if dry_run:
        raise typer.Exit
    try:
        with view_for(Console()) as view:
            outcome = run_sweep(planned, view)
    except Interrupted as signal:
        raise typer.Exit(signal.exit_code) from None
    _show_outcome(console, planned, outcome)
    raise typer.Exit(outcome.exit_code)


def _show_sweep(console: Console, planned: Sweep) -> None:
    from orchestrator.console import detector_text
    from orchestrator.wording import without_secrets

    plan, search = planned.plan, planned.search
    trial = plan.trials[0]
    console.print(plan.why, markup=False)
    console.print(f"{plan.name}: {planned.experiment.question}", markup=False)
    width = max(len("training"), *(len(d.name) for d in search.space.dimensions))
    for dimension in search.space.dimensions:
        console.print(f"  {dimension.name:<{width}}  {dimension}", markup=False)
    trials = f"{planned.count} suggestions"
    scheduler = f"scheduler {search.scheduler}"
    if planned.is_population:
        trials = f"a population of {planned.count}"
        scheduler += f", an exchange every {planned.interval} of {planned.epochs} epochs"
    if search.searcher == "grid":
        trials += f", {len(plan.trials)} different trials"
    facts = {
        "search": f"{search.searcher}, {trials}, {scheduler}, maximise "
        f"{search.metric}, seed {search.seed}",
        "detector": detector_text(trial.detector),
        "training": f"{trial.training.epochs} epochs × {trial.steps_per_epoch} steps, global "
        f"batch {trial.training.batch_size}",
        "output": str(plan.folder),
        "tracking": without_secrets(plan.tracking_uri),
    }
    for key, value in facts.items():
        console.print(f"  {key:<{width}}  {value}", markup=False)


def _show_outcome(console: Console, planned: Sweep, outcome: Outcome) -> None:
    from orchestrator.console import ended_text

    for result in outcome.results[:1]:
        console.print(f"Best: {ended_text(result)}", markup=False)
    for file in outcome.files:
        console.print(f"  {file}", markup=False)
    best = planned.folder / "best.yaml"
    if best in outcome.files:
        console.print(f"Run the best: codetr run {best}", markup=False)
    if outcome.logs is not None:
        console.print(f"  {outcome.logs}  (logs of the failed)", markup=False)
