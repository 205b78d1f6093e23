import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import codetr
from orchestrator import cli

IMPORTED = """
import sys
sys.argv = ["codetr", *sys.argv[1:]]
from orchestrator.cli import main
try:
    main()
finally:
    heavy = ("torch", "ray", "mlflow", "numpy", "matplotlib", "sklearn")
    print([m for m in heavy if m in sys.modules], file=sys.stderr)
"""


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["codetr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return run


def test_version_and_help(command):
    assert command("--version") == (0, f"codetr {codetr.__version__}\n", "")
    code, out, _ = command()
    assert code == 0
    for name in ("run", "experiments", "ui", "data", "eval", "predict"):
        assert f" {name} " in out


def test_experiments_has_a_line_for_each(command):
    code, out, _ = command("experiments")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert {"ablation-k", "digits-two-stage"} < set(names)
    assert len(names) == len(set(names))


def test_dry_run_prints_the_plan_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        "run", "ablation-k", "--dry-run", "--seeds", "0,1", "--set", "epochs=2"
    )
    assert (code, err) == (0, "")
    assert out.startswith("Profile laptop (")
    assert "--profile paper" in out.splitlines()[0]
    assert "2 epochs × 250 steps" in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "ablation-k", "--dry-run"]])
def test_help_and_plan_import_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], check=True, capture_output=True, text=True
    )
    allowed = [] if arguments == ["--help"] else ["numpy"]
    assert done.stderr.strip() in (str([]), str(allowed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "ablation-q"], "did you mean 'ablation-k'"),
        (["run", "ablation-k", "--set", "lambda_9=1"], "--set lambda_9"),
        (["run", "ablation-k", "--set", "lambda_1=-1"], "lambda_1: Input should be greater"),
        (["run", "ablation-k", "--profile", "desktop"], "'desktop'"),
        (["run", "ablation-k", "--seeds", "one"], "--seeds"),
        (["run", "ablation-k", "--workers", "0"], "--workers"),
        (["run", "ablation-k", "--data", "/nowhere"], "/nowhere"),
        (["run", "ablation-k", "--profile", "paper"], "--data DIR"),
        (["run"], "experiment"),
        (["--bogus"], "--bogus"),
        (["fly"], "fly"),
        (["ui", "--output", "/nowhere"], "/nowhere/mlflow.db"),
        (["eval", "/nowhere.pt", "--data", "digits"], "/nowhere.pt"),
        (["predict", "/nowhere.pt", "a.png"], "/nowhere.pt"),
        (["data", "digits", "/"], "not empty"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(command, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("codetr: ")
    assert err.count("\n") == 1
    assert message in err
    assert not any(tmp_path.iterdir())


def test_a_bug_is_not_taken_for_a_mistake(command, monkeypatch):
    def broken(name: str) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("orchestrator.experiment.load_experiment", broken)
    monkeypatch.setattr(sys, "argv", ["codetr", "run", "ablation-k"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_data_is_made_and_checked(command, tmp_path):
    folder = tmp_path / "digits"
    code, _, _ = command("data", "digits", folder, "--train-images", 6, "--val-images", 2)
    assert code == 0
    code, out, _ = command("data", "check", folder)
    assert code == 0
    assert "train: 6 images" in out
    assert "No problem found." in out

    annotations = folder / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] = 0
    annotations.write_text(json.dumps(content))
    code, out, _ = command("data", "check", folder)
    assert code == 1
    assert f"annotation {content['annotations'][0]['id']}" in out
    assert "1 problem" in out


def test_shell_completion_is_offered():
    environment = {**os.environ, "_CODETR_COMPLETE": "complete_bash", "COMP_WORDS": "codetr ex"}
    environment["COMP_CWORD"] = "1"
    program = "import sys; sys.argv = ['codetr']; from orchestrator.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "experiments"


def test_the_command_that_is_recommended_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/codetr", "run"])
    monkeypatch.setattr(cli.shutil, "which", {}.get)
    assert cli._this_command() == ".venv/bin/codetr"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/codetr", "run"])
    monkeypatch.setattr(cli.shutil, "which", {"codetr": "/usr/bin/codetr"}.get)
    assert cli._this_command() == "codetr"
    assert cli._output_option(Path("runs").absolute()) == ""
    assert cli._output_option(Path("/x")) == " --output /x"


def test_a_mask_head_without_masks_starts_no_trial(command, coco_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(coco_folder, bare)
    annotations = bare / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    annotations.write_text(json.dumps(content))
    settings = ("--set", "heads=[mask_rcnn]", "--set", "batch_size=4", "--seeds", "0")
    output = tmp_path / "runs"
    code, _, error = command(
        "run", "ablation-lambda", "--data", bare, "--output", output, *settings
    )
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"codetr: {annotations}: no object has a 'segmentation'")
    assert "take the head out of 'heads'" in last
    assert not output.exists()
