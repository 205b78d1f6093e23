import json
import os
import re
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


EXPERIMENT = """
question: Does it start?
extends: ablation-k
paper: {{table: table11_every_branch, row: {{branch: query}}}}
arms:
  only: {arm}
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # an unknown head or key
        ("{detector: {heads: [atsss]}}", "unknown head 'atsss'; did you mean 'atss'?"),
        (("{}", "heads=[fcoss]"), "unknown head 'fcoss'; did you mean 'fcos'?"),
        (("{}", "heads=[{kind: atss}]"), "a head without 'type'"),
        (("{}", "heads=[2]"), "unknown head '2'; valid: atss, "),
        (("{}", "heads=2"), "heads must be a list, for example [atss, faster_rcnn]"),
        (("{}", "heads=[{type: atss, topkk: 3}]"), "heads.0: unknown key 'topkk'; did you mean"),
        (("{}", "heads=[atss]", "atss.topkk=3"), "did you mean 'heads.atss.topk'?"),
        ("{heads: {atsss: {topk: 3}}}", "heads: no head 'atsss'; did you mean 'atss'?"),
        ("{heads: {gfl: {binss: 3}}}", "heads.gfl: unknown key 'binss'; did you mean 'bins'?"),
        ("{detector: {headss: [atss]}}", "unknown key 'headss'; did you mean 'heads'?"),
        ("{training: {epoch: 3}}", "training: unknown key 'epoch'; did you mean 'epochs'?"),
        ("{detectors: {heads: [atss]}}", "unknown key 'detectors'; did you mean 'detector'?"),
        # weights that are none
        ("{detector: {lambda_1: -1}}", "lambda_1: Input should be greater than or equal to 0"),
        (("{}", "lambda_2=-0.1"), "lambda_2: Input should be greater than or equal to 0"),
        (("{}", "lambda_1=.nan"), "lambda_1: Input should be a finite number"),
        (("{}", "lambda_2=.inf"), "lambda_2: Input should be a finite number"),
        (("{}", "atss.giou_weight=-1"), "giou_weight: Input should be greater than or equal to 0"),
        # strides and levels
        (("{}", "levels=2"), "transformer.levels=2 is fewer than the 3 backbone.stages"),
        (("{}", "backbone.stages=[3, 2]"), "stages must be increasing numbers of 1 to 4"),
        (("{}", "backbone.stages=[4, 5]"), "stages must be increasing numbers of 1 to 4"),
        (("{}", "attention=conditional"), "set transformer.levels=1 and backbone.stages=[4]"),
        (
            "{detector: {heads: [atss], backbone: {stages: [1]}, "
            "transformer: {attention: conditional, levels: 1}}}",
            "the heads' pyramid has strides 8, 16, 32, 64, 128",
        ),
        # K beside another number of heads
        ("{detector: {k: 2, heads: [atss]}}", "k=2 disagrees with 'heads', of which there are"),
        ("{detector: {k: 1}}", "k=1 disagrees with 'heads', of which there are 0"),
        (("{detector: {k: 1, heads: [atss]}}", "heads=[]"), "k=1 disagrees with 'heads'"),
        ("{detector: {heads: [atss]}, paper: {k: 2}}", "paper.k=2 disagrees"),
        (("{}", "k=2"), "K is the number of heads: set heads, as heads=[atss]"),
        (("{}", "detector.K=2"), "K is the number of heads: set heads, as heads=[atss]"),
    ],
)
def test_a_bad_configuration_starts_no_trial(command, given, message, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.runner.run_plan", lambda *_: pytest.fail("it started"))
    arm, *settings = [given] if isinstance(given, str) else given
    file = tmp_path / "mine.yaml"
    file.write_text(EXPERIMENT.format(arm=arm))
    monkeypatch.chdir(tmp_path)
    code, _, err = command("run", file, *(word for s in settings for word in ("--set", s)))
    assert code == 2
    assert err.startswith("codetr: ")
    assert err.count("\n") == 1
    assert message in err
    assert [*tmp_path.iterdir()] == [file]


def test_k_may_stand_beside_as_many_heads(command, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(EXPERIMENT.format(arm="{detector: {k: 1, heads: [atss]}, paper: {k: 1}}"))
    code, out, _ = command("run", file, "--dry-run")
    assert code == 0
    assert re.search(r"only +1 +atss", out)


@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["run", "plan"])
@pytest.mark.parametrize(
    "needing",
    [
        ("heads=[mask_rcnn]",),
        ("jitter.enabled=true", "jitter.canvas=64", "copy_paste.enabled=true"),
    ],
    ids=["head", "copy-paste"],
)
def test_what_needs_masks_starts_no_trial_without_them(
    command, coco_folder, tmp_path, needing, option
):
    bare = tmp_path / "bare"
    shutil.copytree(coco_folder, bare)
    annotations = bare / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    annotations.write_text(json.dumps(content))
    settings = [part for setting in (*needing, "batch_size=4") for part in ("--set", setting)]
    output = tmp_path / "runs"
    code, _, error = command(
        "run", "ablation-lambda", "--data", bare, "--output", output, *settings, *option
    )
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"codetr: {annotations}: no object has a 'segmentation'")
    assert "take the head out of 'heads'" in last
    assert not output.exists()
