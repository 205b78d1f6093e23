"""An MLflow server that is away for a while, or for good."""

from __future__ import annotations

import time

import psutil
import pytest
from fault_laboratory import EPOCHS
from laboratory import PATIENCE, TrackingServer, descendants, finish, read_until

pytestmark = pytest.mark.faults

AWAY = 25.0
"""Seconds; longer than a client's own patience with a server."""


@pytest.fixture
def server(tmp_path):
    server = TrackingServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def test_away_for_a_while_it_gets_everything_once(laboratory, undisturbed, server):
    process = laboratory.start("--tracking-uri", server.uri)
    read_until(process, r"epoch 1/")
    server.kill()
    # Training does not wait for it:
    ended = read_until(process, rf"K=.*finished, {EPOCHS}/{EPOCHS} epochs")
    time.sleep(AWAY)
    server.start()
    code, out = finish(process)
    assert code == 0, out
    assert "trying again" in "".join(ended) + out
    assert "has not taken" not in out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once(server.uri)
    assert not [*laboratory.output.glob("tiny/.outbox/*.jsonl")]


def test_away_for_good_the_next_run_delivers(laboratory, undisturbed, server):
    process = laboratory.start("--tracking-uri", server.uri)
    read_until(process, r"epoch 1/")
    server.kill()
    code, out = finish(process)
    assert code == 0, out
    assert "which wait in" in out
    assert laboratory.outcome() == undisturbed
    assert [*laboratory.output.glob("tiny/.outbox/*.jsonl")]

    server.start()
    code, out = laboratory.run("--tracking-uri", server.uri)
    assert code == 0, out
    assert "operation(s) of an earlier run wait: delivering them" in out
    assert f"epoch {EPOCHS}/{EPOCHS}" not in out, "nothing is trained again"
    laboratory.require_each_epoch_once(server.uri)
    parents, _ = laboratory.runs(uri=server.uri)
    assert [parent.info.status for parent in parents] == ["FINISHED"] * 2
    assert not [*laboratory.output.glob("tiny/.outbox/*.jsonl")]


def test_away_when_a_killed_driver_is_gone_on_with(laboratory, undisturbed, server):
    """Server and driver die; the run goes on without the server, which then gets everything."""
    process = laboratory.start("--tracking-uri", server.uri)
    read_until(process, r"epoch 1/")
    server.kill()
    read_until(process, r"epoch 2/")
    started = descendants(process)
    process.kill()
    finish(process)
    _, left = psutil.wait_procs(started, timeout=PATIENCE)
    assert not left

    code, out = finish(laboratory.command("resume", "tiny", "--output", str(laboratory.output)))
    assert code == 0, out
    assert "cannot be used" in out
    assert "going on" in out
    assert laboratory.outcome() == undisturbed

    server.start()
    code, out = laboratory.run("--tracking-uri", server.uri)
    assert code == 0, out
    laboratory.require_each_epoch_once(server.uri)
    parents, _ = laboratory.runs(uri=server.uri)
    assert [parent.info.status for parent in parents] == ["FINISHED", "FINISHED", "KILLED"]
    assert not [*laboratory.output.glob("tiny/.outbox/*.jsonl")]
