"""The command line: parse, call, print. Imports that take time stay inside the commands."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from orchestrator import analyze_cli, control_cli, sweep_cli, zoo_cli
from orchestrator.options import (
    AddressOption,
    AnalyzeOption,
    DataOption,
    DetachOption,
    DryRunOption,
    GpusPerWorkerOption,
    GraceOption,
    NameOption,
    NeededDataOption,
    OutputOption,
    ProfileOption,
    SkipBadOption,
    StorageOption,
    TrackingOption,
    WorkersOption,
)
from orchestrator.remote_cli import cluster_app, job_app, submit_command, submits

if TYPE_CHECKING:
    from orchestrator.experiment import Experiment
    from orchestrator.invocation import Outcome
    from orchestrator.plan import Options, Plan

app = typer.Typer(
    help="Co-DETR and the laboratory around it: run an experiment, look at data, use a detector.",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make the embedded data set; check any.")
app.add_typer(data_app, name="data")
app.command()(sweep_cli.sweep)
app.command()(analyze_cli.analyze)
app.add_typer(cluster_app, name="cluster")
app.add_typer(job_app, name="job")


def main() -> NoReturn:
    """Run a command; the user's mistakes are one line and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        code = _complain(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except ValueError as error:
        if not isinstance(error, _user_errors()):
            raise
        code = _complain(str(error), 2)
    sys.exit(code or 0)


def _complain(message: str, code: int) -> int:
    print(f"codetr: {message}", file=sys.stderr)
    return code


def _user_errors() -> tuple[type[ValueError], ...]:
    from codetr.config import ConfigError
    from codetr.data.errors import DataError

    # Importing it would import torch; what was not imported was not raised.
    checkpoint = sys.modules.get("codetr.checkpoint")
    return (ConfigError, DataError, *([checkpoint.CheckpointError] if checkpoint else []))


def _print_version(wanted: bool) -> None:
    if wanted:
        import codetr

        print(f"codetr {codetr.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


# --------------------------------------------------------------------------------------------- run


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="Name ('codetr experiments') or YAML file.")],
    *,
    profile: ProfileOption = None,
    data: DataOption = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of every arm, as 0,1,2.")] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time. Default: as many as fit.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as lambda_1=0.5."),
    ] = None,
    skip_bad: SkipBadOption = False,
    dry_run: DryRunOption = False,
    name: NameOption = None,
    output: OutputOption = Path("runs"),
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
    rerun: Annotated[
        Literal["failed", "all", "none"],
        typer.Option(help="Of what was started before: go on with the failed, all anew, none."),
    ] = "failed",
    storage: StorageOption = None,
    grace: GraceOption = 30.0,
    analyze: AnalyzeOption = None,
    detach: DetachOption = False,
) -> None:
    """Run an experiment: train every arm with every seed, and compare.

    The same command again goes on where it stopped, and trains nothing twice.
    """
    from orchestrator.experiment import load_experiment
    from orchestrator.plan import Options

    options = Options(
        profile=profile,
        data=data,
        seeds=_seeds(seeds),
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        concurrency=concurrency,
        settings=tuple(set_ or ()),
        skip_bad=skip_bad,
        name=name,
        output=output,
        tracking_uri=tracking_uri,
        address=address or None,
        rerun=rerun,
        storage=storage,
        grace=grace,
        analyze=analyze,
    )
    asked = load_experiment(experiment)
    if submits(options.address, detach=detach):
        submit_command(experiment, options, detach=detach, dry_run=dry_run)
        return
    _run(asked, options, dry_run=dry_run)


def _run(experiment: Experiment, options: Options, *, dry_run: bool = False) -> NoReturn:
    """Print the plan, run it, print what came of it, and leave with its exit code."""
    from rich.console import Console

    from orchestrator.console import show_plan, view_for
    from orchestrator.plan import make_plan

    plan = make_plan(experiment, options)
    console = Console()
    console.print(plan.why, markup=False, highlight=False, soft_wrap=True)
    show_plan(console, plan)
    if dry_run:
        raise typer.Exit
    from orchestrator.interrupt import Interrupted
    from orchestrator.runner import run_plan

    try:
        with view_for(console) as view:
            outcome = run_plan(plan, view)
    except Interrupted as signal:
        raise typer.Exit(signal.exit_code) from None
    _print_outcome(plan, outcome)
    raise typer.Exit(outcome.exit_code)


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="Of the run: see 'codetr status'.")],
    output: OutputOption = Path("runs"),
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or database, if it has changed.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Go on with the last run or sweep of that name, with the options it was started with.

    Secrets in --tracking-uri and --storage were not kept: give the addresses again."""
    from orchestrator.control import invocation_to_resume

    last = invocation_to_resume(output.expanduser().absolute(), name, tracking_uri, storage)
    if last.search is None:
        _run(last.experiment, last.options)
    from codetr.config import parse
    from orchestrator.sweep import Search, plan_sweep

    search = parse(Search, last.search, str(last.folder))
    sweep_cli.run_and_show(plan_sweep(last.experiment, search, last.options))


for _command in (control_cli.status, control_cli.logs, control_cli.stop, control_cli.compare):
    app.command()(_command)


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not as 0,1,2", param_hint="--seeds") from None


def _print_outcome(plan: Plan, outcome: Outcome) -> None:
    from rich.console import Console

    from orchestrator.console import show_results
    from orchestrator.wording import without_secrets

    console = Console(soft_wrap=True, highlight=False)
    show_results(console, outcome.results)
    for file in outcome.files:
        console.print(f"  {file}", markup=False)
    for result in outcome.results:
        if result.weights is not None:
            console.print(f"  {result.weights}  [dim]best checkpoint of {result.trial.arm}, "
                          f"seed {result.trial.seed}[/]")  # fmt: skip
    if outcome.logs is not None:
        console.print(f"  {outcome.logs}  [dim]logs of the failed[/]")
    if plan.tracking_uri.startswith(("http://", "https://")):
        console.print(f"MLflow: {without_secrets(plan.tracking_uri)}", markup=False)
    else:
        console.print(f"MLflow: {_this_command()} ui{_output_option(plan.output)}", markup=False)


def _this_command() -> str:
    """How the user called this program: by its path where it is not on PATH."""
    called = Path(sys.argv[0])
    return called.name if shutil.which(called.name) == str(called.absolute()) else str(called)


def _output_option(output: Path) -> str:
    return "" if output == Path("runs").absolute() else f" --output {output}"


@app.command()
def experiments() -> None:
    """List what can be run."""
    from orchestrator.experiment import experiment_files, load_experiment

    files = experiment_files()
    for name in files:
        found = load_experiment(name)
        arms = f"{len(found.arms)} arm{'s' * (len(found.arms) > 1)}"
        sizes = f"{arms}; {', '.join(found.profiles)}"
        print(f"{name:<{max(map(len, files))}}  {found.question} ({sizes})")


@app.command()
def ui(
    output: OutputOption = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI of the runs below OUTPUT, on 127.0.0.1."""
    from codetr.config import ConfigError

    store = output.expanduser().absolute() / "mlflow.db"
    if not store.exists():
        raise ConfigError(f"{store}: no such file: run an experiment first, or give --output")
    print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    arguments = {
        "--backend-store-uri": f"sqlite:///{store}",
        "--artifacts-destination": str(store.parent / "artifacts"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
    }
    flat = [word for pair in arguments.items() for word in pair]
    # Without it the server starts seven more processes, for features that nobody here uses.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "server", *flat], environment)


# -------------------------------------------------------------------------------------------- data


@data_app.command("digits")
def data_digits(
    directory: Annotated[Path, typer.Argument(help="New or empty folder.")],
    *,
    lvis: Annotated[bool, typer.Option("--lvis", help="Long-tailed, LVIS annotations.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train_images: Annotated[int, typer.Option(min=1)] = 2000,
    val_images: Annotated[int, typer.Option(min=1)] = 200,
    size: Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")] = 96,
) -> None:
    """Write the embedded data set: handwritten digits on photographs, in COCO layout."""
    from rich.progress import Progress

    from codetr.data.digits import make_digits

    with Progress(transient=True) as bar:
        task = bar.add_task("making images", total=train_images + val_images)
        make_digits(
            directory,
            lvis=lvis,
            seed=seed,
            train_images=train_images,
            val_images=val_images,
            size=size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{directory}: {train_images} training and {val_images} validation images")


@data_app.command("check")
def data_check(
    directory: Annotated[Path, typer.Argument(help="Folder in COCO layout.")],
    decode: Annotated[bool, typer.Option(help="Also decode every image.")] = True,
) -> None:
    """Count what is in a data set, and list everything that is wrong with it."""
    from rich.console import Console

    from codetr.data.check import check_dataset
    from orchestrator.console import show_dataset

    report = check_dataset(directory, decode=decode)
    show_dataset(Console(highlight=False), report)
    raise typer.Exit(int(bool(report.problems)))


# --------------------------------------------------------------------------------- using a detector

CheckpointArgument = Annotated[
    str, typer.Argument(help="File of 'codetr convert', or a training's checkpoint; or its URL.")
]
BranchOption = Annotated[
    str, typer.Option(help="query, or the name of an auxiliary head to look at it alone.")
]
PrecisionOption = Annotated[
    Literal["fp32", "bf16"], typer.Option(help="bf16: faster on a GPU, and less exact.")
]


@app.command("eval")
def evaluate(
    checkpoint: CheckpointArgument,
    *,
    data: NeededDataOption,
    branch: BranchOption = "query",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at a time, where they have one size.")
    ] = 8,
    precision: PrecisionOption = "fp32",
    engine: Annotated[Literal["hotcoco", "pycocotools"], typer.Option()] = "hotcoco",
    tta: Annotated[
        bool, typer.Option("--tta", help="Merge what is found in several sizes, and mirrored.")
    ] = False,
    scales: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Sizes of --tta. Default: 0.75,1,1.25."),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option(help="Mirror with --tta. Default: if training did.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the metrics to this file.")
    ] = None,
) -> None:
    """Measure a checkpoint on the validation images of a data set."""
    from rich.console import Console

    from orchestrator.console import show_metrics
    from orchestrator.use import augmentation, evaluate_checkpoint

    metrics = evaluate_checkpoint(
        checkpoint,
        data,
        branch=branch,
        batch_size=batch_size,
        precision=precision,
        engine=engine,
        tta=augmentation(tta, scales, flip),
        json_file=json_file,
    )
    show_metrics(Console(highlight=False), metrics)


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or folders of them, as a video's frames.")
    ],
    *,
    output: Annotated[Path, typer.Option(help="Folder for pictures and JSON.")] = Path(
        "predictions"
    ),
    min_score: Annotated[
        float, typer.Option(min=0, max=1, help="Pictures show no detection below it.")
    ] = 0.3,
    branch: BranchOption = "query",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at a time, where they have one size.")
    ] = 1,
    precision: PrecisionOption = "fp32",
) -> None:
    """Detect objects: a picture with boxes for each image, and all detections as COCO JSON."""
    from rich.console import Console

    from orchestrator.use import predict_images
    from orchestrator.zoo_console import image_progress

    with image_progress(Console(stderr=True)) as progress:
        written = predict_images(
            checkpoint,
            images,
            output,
            min_score=min_score,
            branch=branch,
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
    for path in written:
        print(path)


app.command()(zoo_cli.models)
app.command()(zoo_cli.convert)
