"""``codetr run --address http://...`` against a real Ray head with its Jobs API and a token."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from test_run import CODETR, EXPERIMENT, PATIENCE, descendants, listening, read_until

from codetr.data.digits import make_digits

pytestmark = pytest.mark.e2e

TOKEN = "a-token-of-this-test-alone-0123456789"


@dataclass
class Elsewhere:
    """A Ray cluster, and a folder from which runs are sent to it."""

    head: subprocess.Popen
    address: str
    folder: Path

    def start(self, *words: str, token: str | None = TOKEN) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"PYTHONUNBUFFERED": "1", "RAY_ADDRESS": self.address}
        environment |= {"HOME": str(self.folder.parent)} | (
            {"RAY_AUTH_TOKEN": token} if token else {}
        )
        return subprocess.Popen(
            [*CODETR, *words], cwd=self.folder, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def call(self, *words: str, token: str | None = TOKEN) -> tuple[int, str]:
        process = self.start(*words, token=token)
        out, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, out

    def words(self, command: str = "run", epochs: int = 1) -> list[str]:
        """The command, as its user types it."""
        return [
            command, "tiny.yaml", "--data", str(self.folder / "digits"),
            "--set", f"epochs={epochs}", "--output", str(self.folder.parent / "shared"),
        ]  # fmt: skip


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "tree"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(EXPERIMENT.replace('  "K=0"', '  # "K=0"'))
    make_digits(folder / "digits", train_images=24, val_images=6, size=64)
    dashboard, agent, client = free_ports(3)
    programs = Path(sys.executable).parent
    head = subprocess.Popen(
        [
            programs / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            "--port=0", "--num-cpus=2", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", "--object-store-memory=134217728",
        ],
        env={
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        read_until(head, "Ray runtime started")
        yield Elsewhere(head, f"http://127.0.0.1:{dashboard}", folder)
    finally:
        ours = [*descendants(head), psutil.Process(head.pid)]
        head.terminate()
        _, alive = psutil.wait_procs(ours, timeout=20)
        for process in alive:
            process.kill()


def job_of(text: str) -> str:
    return re.search(r"submitted (\S+):", text)[1]


def test_streamed_left_stopped_then_detached_and_seen_to_its_end(elsewhere):
    process = elsewhere.start(*elsewhere.words(epochs=1000))
    lines = read_until(process, r"training 1 trial")
    job = job_of("".join(lines))
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert f"codetr job attach {job} --address {elsewhere.address}" in out
    assert f"codetr job stop {job} --address {elsewhere.address}" in out
    assert f"{job}  running" in elsewhere.call("job", "list")[1]

    assert elsewhere.call("job", "stop", job) == (0, f"{job}: stopping\n")
    code, out = elsewhere.call("job", "attach", job)
    assert code != 0
    assert "training 1 trial" in out
    assert f"job {job}: stopped" in out
    assert elsewhere.call("job", "stop", job) == (0, f"{job}: had ended before\n")
    output = elsewhere.folder.parent / "shared"
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    # Stopped in order: nothing is left as running.
    assert {run.info.status for run in client.search_runs([experiment])} == {"KILLED"}

    code, out = elsewhere.call(*elsewhere.words(), "--detach")
    assert code == 0, out
    job = job_of(out)
    assert [line.split()[0] for line in out.splitlines()] == ["submitted", job, "Stop"]
    code, out = elsewhere.call("job", "attach", job)
    assert code == 0, out
    assert "K=2, seed 0: epoch 1/1" in out
    assert out == elsewhere.call("job", "logs", job)[1]
    assert "finished" in (output / "tiny" / "results.csv").read_text()


def test_a_sweep_goes_there_too(elsewhere):
    how = ("--name", "swept", "--searcher", "grid", "--scheduler", "none", "--detach")
    over = ("--over", "lambda_1=0.5,1", "--over", "heads=[atss]")
    code, out = elsewhere.call(*elsewhere.words("sweep"), *over, *how)
    assert code == 0, out
    code, out = elsewhere.call("job", "attach", job_of(out))
    assert code == 0, out
    assert "searching 2 suggestions" in out
    results = elsewhere.folder.parent / "shared" / "swept" / "results.csv"
    assert results.read_text().count("finished") == 2


def test_a_job_that_fails_gives_its_exit_code(elsewhere):
    code, out = elsewhere.call(*elsewhere.words()[:-1], "/dev/null/nowhere")
    assert code == 2, out
    assert "cannot write" in out


def test_all_ports_are_loopback_and_want_the_token(elsewhere):
    everyone = [psutil.Process(elsewhere.head.pid), *descendants(elsewhere.head)]
    assert {a.removeprefix("::ffff:") for a in listening(everyone)} == {"127.0.0.1"}
    code, out = elsewhere.call("job", "list", token=None)
    assert (code, out.count("\n")) == (2, 1)
    assert "wants its token" in out
    code, out = elsewhere.call("job", "list", token="b" + TOKEN[1:])
    assert (code, out.count("\n")) == (2, 1)
    code, out = elsewhere.call("job", "attach", "nothing")
    assert (code, out.count("\n")) == (2, 1)
    assert "no job 'nothing'" in out
