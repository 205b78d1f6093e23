"""A node's leave, with a metadata server of our own and a stand-in for Ray's command."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from codetr.config import ConfigError
from orchestrator import clusters, drain
from orchestrator.cli import app


class Metadata(BaseHTTPRequestHandler):
    """Both clouds' pages; the third question is the first to be told of an end. Google's answer to
    the first is an error, or none that HTTP knows."""

    questions = 0
    speaks_http = True

    def do_PUT(self):
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a-token")

    def do_GET(self):
        type(self).questions += 1
        taken = self.questions > 2
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer(200 if taken else 404, '{"action": "terminate"}' if taken else "")
        elif self.questions == 1 and self.speaks_http:
            self.answer(503, "")
        elif self.questions == 1:
            self.wfile.write(b"nonsense\r\n\r\n")
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, "TRUE" if taken else "FALSE")

    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Metadata.questions = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """Writes down how it is called, and with which mode of authentication; fails as often as the
    file ``failures`` says."""
    program, failures = tmp_path / "ray", tmp_path / "failures"
    failures.write_text("0")
    program.write_text(
        f'#!/bin/sh\necho "$RAY_AUTH_MODE $@" >> {tmp_path}/calls\n'
        f"test $(wc -l < {tmp_path}/calls) -gt $(cat {failures})\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(clusters.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path / "calls"


class Clock:
    """Time passes where one sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(drain, "time", clock)
    return clock


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("gcp", 30)])
def test_a_spot_machine_leaves_when_it_is_told(cloud, seconds, server, ray, monkeypatch):
    monkeypatch.setattr(drain, f"_{cloud.upper()}", server)
    code = app(["cluster", "drain", "--after-notice", cloud], standalone_mode=False)
    assert code == 0
    assert Metadata.questions == 3
    assert ray.read_text() == (
        "token drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message="
        f"{cloud} takes the machine away --deadline-remaining-seconds={seconds}\n"
    )


@pytest.mark.usefixtures("clock")
def test_an_answer_that_is_no_http_ends_no_watch(server, monkeypatch):
    monkeypatch.setattr(Metadata, "speaks_http", False)
    monkeypatch.setattr(drain, "_GCP", server)
    assert drain.wait_for_notice("gcp") == 30
    assert Metadata.questions == 3


def test_a_pod_stays_until_its_trials_have_saved(ray, clock):
    assert app(["cluster", "drain", "--within", "100"], standalone_mode=False) == 0
    assert clock.slept == [100]
    assert "--deadline-remaining-seconds=100" in ray.read_text()


def seconds_told(ray):
    return [int(found) for found in re.findall(r"remaining-seconds=(\d+)", ray.read_text())]


def test_a_busy_ray_is_told_again(ray, clock):
    """Its call fails; the notice would be lost, and with it the epoch under way."""
    (ray.parent / "failures").write_text("2")
    assert app(["cluster", "drain", "--within", "100"], standalone_mode=False) == 0
    assert seconds_told(ray) == [100, 98, 96]
    assert clock.now == 100


def test_until_the_time_is_up(ray, clock):
    (ray.parent / "failures").write_text("99")
    assert app(["cluster", "drain", "--within", "5"], standalone_mode=False) == 1
    assert seconds_told(ray) == [5, 3, 1]
    assert clock.now == 4


def test_another_cloud():
    with pytest.raises(ConfigError, match="--after-notice azure: give one of aws, gcp"):
        drain.wait_for_notice("azure")
