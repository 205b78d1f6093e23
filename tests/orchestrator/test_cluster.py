import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private.state import state
from trial_samples import sample_plan

from codetr.config import ConfigError
from orchestrator.cluster import _ENVIRONMENT, _LOCAL_ENVIRONMENT, Cluster, _start_local, show_token
from orchestrator.experiment import Resources


@pytest.fixture
def slots(tmp_path, monkeypatch):
    """How many trials fit on nodes of (CPU, GPU), of which others may come."""
    for key, value in (_ENVIRONMENT | _LOCAL_ENVIRONMENT).items():
        monkeypatch.setenv(key, value)  # taken back afterwards

    def count(*nodes, groups=None, **resources):
        there = [
            {"Alive": True, "Resources": {"CPU": float(cpu)} | ({"GPU": float(gpu)} if gpu else {})}
            for cpu, gpu in nodes
        ]
        lost = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [lost, *there])
        config = groups and SimpleNamespace(
            node_group_configs=[
                SimpleNamespace(resources={"CPU": cpu, "GPU": gpu}, max_count=most)
                for most, cpu, gpu in groups
            ]
        )
        monkeypatch.setattr(state, "get_cluster_config", lambda: config)
        return Cluster(replace(sample_plan(tmp_path), resources=Resources(**resources))).slots()

    return count


def test_trials_fit_on_whole_nodes(slots):
    assert slots((8, 0), workers=2, cpus_per_worker=2) == 2
    assert slots((3, 0), (3, 0), workers=1, cpus_per_worker=2) == 2  # 6 CPUs, but not 3 workers
    assert slots((3, 0), (3, 0), workers=2, cpus_per_worker=2) == 1
    assert slots((96, 8), workers=1, cpus_per_worker=1, gpus_per_worker=0.1) == 80
    assert slots((96, 8), (96, 8), workers=8, cpus_per_worker=8, gpus_per_worker=1) == 2
    assert slots((8, 0), workers=1, cpus_per_worker=1, concurrency=3) == 3


class Slow:
    """A Ray that does not start so often, and leaves a process behind each time."""

    def __init__(self, fails):
        self.fails, self.left = fails, []

    def init(self, **_):
        if len(self.left) < self.fails:
            self.left.append(subprocess.Popen(["sleep", "60"]))
            raise Exception("The current node timed out during startup.")
        return SimpleNamespace(address_info={"session_dir": "/tmp/ray/session_x"})


def test_ray_may_need_two_attempts_on_a_busy_machine(monkeypatch):
    slow = Slow(fails=1)
    monkeypatch.setattr(ray, "init", slow.init)
    other = subprocess.Popen(["sleep", "60"])
    assert _start_local({}) == Path("/tmp/ray/session_x")
    assert not any(psutil.pid_exists(process.pid) for process in slow.left)
    assert other.poll() is None, "what is not Ray's goes on"
    other.kill()
    other.wait()


def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing(monkeypatch):
    slow = Slow(fails=2)
    monkeypatch.setattr(ray, "init", slow.init)
    with pytest.raises(ConfigError, match=r"Ray does not start .* timed out .* try again later"):
        _start_local({})
    assert len(slow.left) == 2
    assert not any(psutil.pid_exists(process.pid) for process in slow.left)


def test_what_does_not_fit_is_told_with_what_is_there(slots):
    with pytest.raises(ConfigError, match=r"2 worker\(s\) of 4 CPUs .* room for 0 \(2 of 3 CPUs"):
        slots((3, 0), (3, 0), workers=2, cpus_per_worker=4)
    with pytest.raises(ConfigError, match=r"8 worker\(s\) of 1 CPUs and 1 GPUs, .* room for 4"):
        slots((64, 4), workers=8, cpus_per_worker=1, gpus_per_worker=1)


def test_nodes_that_an_autoscaler_may_start_count(slots):
    groups = [(0, 0, 0), (4, 96, 8)]  # the head; cluster/aws.yaml's workers
    demand = {"workers": 8, "cpus_per_worker": 8, "gpus_per_worker": 1}
    assert slots((0, 0), groups=groups, **demand) == 4
    assert slots((0, 0), groups=[(-1, 8, 0)], workers=1, cpus_per_worker=8) == 64
    with pytest.raises(ConfigError, match="4 of 96 CPUs, 8 GPUs"):
        slots((0, 0), groups=groups, workers=1, cpus_per_worker=97)


def test_a_range_of_workers_runs_where_the_fewest_have_room(slots):
    assert slots((8, 0), workers="2-8") == 1
    assert slots((3, 0), workers="2-8") == 1
    assert slots((16, 0), (8, 0), workers="2-8") == 3
    with pytest.raises(ConfigError, match=r"needs 2 worker\(s\) of 1 CPUs"):
        slots((1, 0), workers="2-8")


@pytest.fixture
def start_local(tmp_path, monkeypatch):
    """Starts a local cluster, but for Ray itself, in a new home; returns its token's file."""
    for key, value in (_ENVIRONMENT | _LOCAL_ENVIRONMENT).items():
        monkeypatch.setenv(key, value)
    for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    started = SimpleNamespace(address_info={"session_dir": "session"})
    monkeypatch.setattr(ray, "init", lambda **_: started)

    def start():
        Cluster(sample_plan(tmp_path / "runs")).start()
        return tmp_path / ".ray" / "auth_token"

    return start


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_no_other_user_reads_the_token(start_local):
    token = start_local()
    assert mode(token) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    before = token.read_text()
    token.chmod(0o644)  # as Ray makes it
    assert start_local().read_text() == before
    assert mode(token) == 0o600


def test_a_token_of_ones_own_is_left_alone(start_local, tmp_path, monkeypatch):
    given = tmp_path / "given"
    given.write_text("abc")
    before = mode(given)
    for key, value in {"RAY_AUTH_TOKEN_PATH": str(given), "RAY_AUTH_TOKEN": "abc"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            assert not start_local().exists()
    assert mode(given) == before
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not start_local().exists()


def test_a_home_that_takes_no_token(start_local, tmp_path):
    (tmp_path / ".ray").write_text("no folder")
    with pytest.raises(ConfigError, match=r"auth_token: cannot be written: .*RAY_AUTH_TOKEN"):
        start_local()


def test_a_token_that_is_shown_is_hidden_from_others(start_local, monkeypatch):
    token = start_local()
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_MODE")
    show_token()
    assert mode(token) == 0o600
    assert os.environ.pop("RAY_AUTH_MODE") == "token"
