import zipfile
from pathlib import Path

import pytest
import typer

from codetr.config import ConfigError
from orchestrator import remote_cli, tracking
from orchestrator.cli import app
from orchestrator.plan import Options
from orchestrator.submit import BIG_FILE, Jobs, how_to_return, is_jobs_api, make_submission
from orchestrator.tracking import REVISION, git_revision

API = "http://127.0.0.1:8265"
OPTIONS = Options(output=Path("/shared/runs"), data="/shared/coco", address=API)


def submission(tree, words=("run", "ablation-k"), experiment="ablation-k", **changes):
    options = Options(**{**vars(OPTIONS), **changes})
    return make_submission(tree, list(words), experiment, options)


def test_which_addresses_are_a_jobs_api():
    assert is_jobs_api(API)
    assert is_jobs_api("https://ray.example")
    assert not any(is_jobs_api(a) for a in (None, "auto", "127.0.0.1:6379"))


def test_the_command_is_the_same_without_where_and_how(tmp_path):
    words = [
        "run", "ablation-k", "--address", API, "--set", "heads=[atss]", "--detach",
        "--seeds", "0,1", f"--address={API}", "--output", "/shared/runs",
    ]  # fmt: skip
    assert submission(tmp_path, words).command == (
        "codetr", "run", "ablation-k", "--set", "heads=[atss]", "--seeds", "0,1",
        "--output", "/shared/runs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": Path("runs")}, "--output runs: .* absolute"),
        ({"data": "coco"}, "--data coco: .* absolute"),
        ({"tracking_uri": "postgresql://me:hush@host/db"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"tracking_uri": "postgresql://host/db?password=hush"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"tracking_uri": "https://hush@host"}, "MLFLOW_TRACKING_TOKEN"),
        ({"storage": "sftp://me:hush@host/lab"}, "--storage: .* in its environment"),
        ({"words": ("run", "a", "--storage=sftp://me:hush@h/lab")}, r"me:\*\*\*@h/lab: .*leave"),
        ({"settings": ("lambda_3=1",)}, "no such setting"),
        ({"experiment": "../ablation-k.yaml"}, "ablation-k.yaml"),
    ],
)
def test_what_can_never_work_there_is_refused_here(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told) as error:
        submission(tmp_path, **changes)
    assert "hush" not in str(error.value)


def test_a_home_is_not_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="uploaded whole"):
        submission(tmp_path)


def test_what_ray_packs_has_no_secrets_and_no_data(tmp_path):
    """By Ray's own packaging."""
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    wanted = ["mine.yaml", "experiments/a.yaml", "orchestrator/runs.py", "src/build/x.py"]
    left = [
        ".git/config", ".venv/lib/a.py", "runs/a/results.csv", "sub/.env", ".env.local", ".netrc",
        ".aws/config", ".ray/auth_token", "key.pem", "id_rsa", "id_ed25519.pub", "mlflow.db",
        "credentials.json", "weights/r50.pth", "a/__pycache__/b.pyc", "ignored/file",
    ]  # fmt: skip
    for file in (*wanted, *left):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text(file)
    (tree / ".gitignore").write_text("ignored/\n")
    big = tree / "data" / "big [1].bin"
    big.parent.mkdir()
    with big.open("wb") as file:
        file.truncate(BIG_FILE)
    made = submission(tree)
    assert made.big == ("data/big [1].bin",)
    package = tmp_path / "package.zip"
    create_package(str(tree), package, True, excludes=made.runtime_env["excludes"])
    with zipfile.ZipFile(package) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    assert {f.removeprefix("tree/") for f in files} == {*wanted, ".gitignore"}


def test_nothing_of_the_environment_goes_along(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    made = submission(tmp_path)
    assert "hush" not in repr(made.runtime_env)
    assert list(made.runtime_env["env_vars"]) == ["RAY_JOB_STOP_WAIT_TIME_S"]


def test_the_revision_of_an_uploaded_checkout_is_recorded(tmp_path, monkeypatch):
    """As on the cluster: the code without its history, in another place."""
    here = Path(tracking.codetr.__file__).parents[1]
    told = submission(here).runtime_env["env_vars"][REVISION]
    assert told == git_revision()
    (tmp_path / "codetr").mkdir()
    monkeypatch.setattr(tracking.codetr, "__file__", str(tmp_path / "codetr" / "__init__.py"))
    assert git_revision() == f"codetr {tracking.codetr.__version__}"
    monkeypatch.setenv(REVISION, told)
    assert git_revision() == told


def test_nobody_there_is_one_line():
    with pytest.raises(ConfigError, match=r"--address http://127.0.0.1:9: \S") as error:
        Jobs("http://127.0.0.1:9")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="jobs need http://"):
        Jobs("127.0.0.1:6379")


def test_how_to_return():
    assert "codetr job attach x\n" in how_to_return("x", API)
    assert "codetr job stop x --address http://h:1" in how_to_return("x", "http://h:1")


def test_dry_run_says_what_would_be_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "ablation-k", "--address", API, "--output", "/shared/runs", "--dry-run"]
    monkeypatch.setattr(remote_cli.sys, "argv", ["codetr", *words])
    app(words, standalone_mode=False)
    out = capsys.readouterr().out
    assert f"would upload {tmp_path} to {API}" in out
    assert "codetr run ablation-k --output /shared/runs\n" in out


def test_detach_needs_a_jobs_api(monkeypatch):
    with pytest.raises(typer.BadParameter, match="--address"):
        app(["run", "ablation-k", "--detach"], standalone_mode=False)
