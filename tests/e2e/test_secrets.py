"""Tokens, keys and passwords stay in the environment: a real run leaves none of them anywhere."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from laboratory import CODETR, PATIENCE, TrackingServer, free_port
from test_run import EXPERIMENT

from codetr.data.digits import make_digits

pytestmark = pytest.mark.e2e

PASSWORD = "planted-password-of-the-tracking-uri"
PLANTED = {
    name: f"planted-{name.lower()}"
    for name in (
        "MLFLOW_TRACKING_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCESS_KEY",
        "HF_TOKEN",
        "RAY_AUTH_TOKEN",
    )
}

FORMS = (
    "http://me:{secret}@127.0.0.1:{port}",
    "http://{secret}@127.0.0.1:{port}",
    "postgresql://127.0.0.1:{port}/db?user=me&password={secret}",
)
"""How the address of a tracking store may hold its secret."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """An MLflow server below ``tmp_path``; its port."""
    server = TrackingServer(tmp_path / "server")
    server.start()
    yield server.port
    server.kill()


def leaks(*places: Path) -> list[str]:
    """Every file and name below these places that holds a secret."""
    secrets = [secret.encode() for secret in (PASSWORD, *PLANTED.values())]
    found = []
    for place in places:
        assert place.is_dir(), place
        for path in place.rglob("*"):
            inside = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            if any(secret in inside or secret in os.fsencode(path) for secret in secrets):
                found.append(str(path))
    return found


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"\0" + PASSWORD.encode())
    assert leaks(tmp_path) == [str(tmp_path / "a" / "b")]


@pytest.mark.timeout(900)
def test_a_run_leaves_no_secret_anywhere(server: int, tmp_path: Path) -> None:
    """One arm that ends well and one that fails, so that errors and Ray's logs are there too."""
    broken = '"K=2": {training: {learning_rate: 1.0e+30}, '
    text = EXPERIMENT.replace('"K=2": {', broken).replace("epochs: 3", "epochs: 1")
    (tmp_path / "tiny.yaml").write_text(text)
    make_digits(tmp_path / "digits", train_images=24, val_images=6, size=64)
    done = subprocess.run(
        [
            *CODETR, "run", "tiny.yaml", "--data", "./digits", "--output", "runs",
            "--tracking-uri", f"http://me:{PASSWORD}@127.0.0.1:{server}",
        ],
        cwd=tmp_path, env={**os.environ, **PLANTED}, capture_output=True, text=True,
        timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 1, out
    assert "K=2, seed 0: failed" in out
    assert "me:***@127.0.0.1" in out
    assert not [secret for secret in (PASSWORD, *PLANTED.values()) if secret in out]
    logs = Path(re.search(r"^\s*(/\S+/logs)\s", out, re.MULTILINE)[1])
    assert list((tmp_path / "runs" / "tiny" / "trials").rglob("checkpoint.pt"))
    assert list((tmp_path / "server" / "artifacts").rglob("config.yaml"))
    assert leaks(tmp_path / "runs", tmp_path / "server", logs) == []


@pytest.mark.timeout(900)
def test_a_sweep_leaves_no_secret_anywhere(server: int, tmp_path: Path) -> None:
    """Ray Tune writes down more than Ray Train does; the user's name is a token, too."""
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.replace("epochs: 3", "epochs: 1"))
    make_digits(tmp_path / "digits", train_images=24, val_images=6, size=64)
    done = subprocess.run(
        [
            *CODETR, "sweep", "tiny.yaml", "--data", "./digits", "--output", "runs",
            "--over", "heads=[]", "--searcher", "grid",
            "--tracking-uri", f"http://{PASSWORD}:@127.0.0.1:{server}",
        ],
        cwd=tmp_path, env={**os.environ, **PLANTED}, capture_output=True, text=True,
        timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert not [secret for secret in (PASSWORD, *PLANTED.values()) if secret in out]
    assert [*(tmp_path / "runs" / "tiny" / "tune").iterdir()]
    assert leaks(tmp_path / "runs", tmp_path / "server") == []


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_is_gone_is_told_without_the_secret(form: str, tmp_path: Path) -> None:
    make_digits(tmp_path / "digits", train_images=24, val_images=6, size=64)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    done = subprocess.run(
        [
            *CODETR, "run", "tiny.yaml", "--data", "./digits", "--output", "runs",
            "--tracking-uri", form.format(secret=PASSWORD, port=free_port()),
        ],
        cwd=tmp_path, env={**os.environ, **PLANTED}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 2, out
    assert "Traceback" not in out
    assert not [secret for secret in (PASSWORD, *PLANTED.values()) if secret in out]
    assert leaks(tmp_path / "runs") == []
