import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from orchestrator.files import write_whole
from orchestrator.lease import LAPSE_SECONDS, Lease, Leases, has_lapsed, holder
from orchestrator.owner import Owner

RACE = """
import sys
from pathlib import Path
from orchestrator.lease import Leases
leases = Leases(Path(sys.argv[1]), "race")
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(50) if leases.acquire(f"trial{n}") is None]
print(*won, flush=True)
sys.stdin.readline()
"""
HOLD = """
import sys, time
from pathlib import Path
from orchestrator.lease import Leases
with Leases(Path(sys.argv[1]), "first", heartbeat=0.1) as leases:
    assert leases.acquire("trial") is None
    print("held", flush=True)
    time.sleep(60)
"""


def start(program, folder):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=-1, stdout=-1, text=True
    )


def test_of_two_processes_exactly_one_gets_each_lease(tmp_path):
    processes = [start(RACE, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [process.stdout.readline().split() for process in processes]
    for process in processes:
        process.communicate("end\n", timeout=30)
    assert sorted(won[0] + won[1], key=int) == [str(n) for n in range(50)]


def test_a_lease_is_held_while_its_process_lives_and_lapses_when_it_is_killed(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    second = Leases(tmp_path, "second")
    against = second.acquire("trial")
    assert (against.name, against.owner.pid) == ("first", process.pid)
    process.kill()
    process.wait()
    assert holder(tmp_path, "trial") is None
    assert second.acquire("trial") is None
    assert holder(tmp_path, "trial").owner == Owner.this()
    second.release("trial")
    assert holder(tmp_path, "trial") is None


def test_only_what_the_killed_have_left_is_cleared(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    lease, second = tmp_path / ".leases" / "trial", Leases(tmp_path, "second")
    second.clear(["trial", "never-taken"])
    assert lease.exists()
    process.kill()
    process.wait()
    second.clear(["another"])
    assert lease.exists()
    second.clear(["trial"])
    assert not lease.exists()


def test_the_heartbeat_touches_the_lease_and_the_end_gives_it_back(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    path = tmp_path / ".leases" / "trial"
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 30
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.stat().st_mtime > 0
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert not path.exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lease of another machine."""
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        Leases(tmp_path, "first").acquire("trial")
    return tmp_path / ".leases" / "trial"


def test_another_machines_lease_lapses_with_its_heartbeat(elsewhere, tmp_path):
    assert not has_lapsed(elsewhere)
    assert Leases(tmp_path, "second").acquire("trial").owner.host == "elsewhere"
    old = time.time() - LAPSE_SECONDS - 5
    os.utime(elsewhere, (old, old))
    assert Leases(tmp_path, "second").acquire("trial") is None


def test_a_lease_taken_away_stops_its_former_owner(tmp_path, monkeypatch):
    signals = []
    monkeypatch.setattr("os.kill", lambda *signal: signals.append(signal))
    with Leases(tmp_path, "first", heartbeat=0.05) as leases:
        taken = take_away(leases, "trial")
        wait_until(lambda: leases.lost)
    assert leases.lost["trial"].owner.pid == 1
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert (tmp_path / ".leases" / "trial").read_text() == taken  # not given back: it is another's


def take_away(leases, trial):
    """Have another process own the lease, at once; returns its file's text."""
    leases.acquire(trial)
    path = leases.folder / trial
    taken = path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1')
    write_whole(path, taken)
    return taken


def test_a_lease_that_is_gone_is_taken_again(tmp_path):
    """Another had it while this process slept, and has given it back: a third one must not join."""
    lost = []
    with Leases(tmp_path, "first", heartbeat=0.05, on_loss=lambda: lost.append(1)) as leases:
        leases.acquire("trial")
        path = leases.folder / "trial"
        path.unlink()
        wait_until(path.exists)
        wait_until(lambda: Lease.read(path))
        assert Leases(tmp_path, "third").acquire("trial").name == "first"
    assert not path.exists()
    assert (lost, leases.lost) == ([], {})


def test_a_lease_that_another_takes_just_then_is_lost(tmp_path):
    """Its file is gone until the other one has written its own."""
    told = []
    with Leases(tmp_path, "first", heartbeat=0.02, on_loss=lambda: told.append(1)) as leases:
        leases.acquire("trial")
        path = leases.folder / "trial"
        taken = path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1')
        with FileLock(leases.folder / ".lock"):
            path.unlink()
            time.sleep(0.2)
            write_whole(path, taken)
        wait_until(lambda: leases.lost)
    assert told == [1]
    assert path.read_text() == taken


def test_what_is_given_back_or_cannot_be_reached_is_not_taken_again(tmp_path):
    leases = Leases(tmp_path / "there", "first")
    leases.acquire("trial")
    path = leases.folder / "trial"
    leases.release("trial")
    leases._beat("trial")
    assert not path.exists()
    leases.acquire("trial")
    leases.folder.parent.rename(tmp_path / "away")  # as where nothing is mounted
    leases._beat("trial")
    assert not leases.folder.parent.exists()
    (tmp_path / "away").rename(leases.folder.parent)
    path.write_text('{"owner"')  # somebody is at it
    leases._beat("trial")
    assert path.read_text() == '{"owner"'


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_several_leases_taken_away_one_tells(tmp_path):
    """A second signal would end the process at once, and nothing would be saved."""
    told = []
    with Leases(tmp_path, "first", heartbeat=0.05, on_loss=lambda: told.append(1)) as leases:
        for trial in ("a", "b", "c"):
            take_away(leases, trial)
        wait_until(lambda: len(leases.lost) == 3)
    assert told == [1]


def test_to_tell_of_a_loss_is_tried_again(tmp_path):
    told = []

    def stop():
        told.append(1)
        if len(told) == 1:
            raise OSError(errno.EIO, "the file server is away")

    with Leases(tmp_path, "first", heartbeat=0.05, on_loss=stop) as leases:
        take_away(leases, "trial")
        wait_until(lambda: leases.lost)
    assert told == [1, 1]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_file_server_that_is_away_takes_no_lease(tmp_path, monkeypatch, code):
    """Whatever fails, reading or touching it: it is kept alive afterwards."""
    asked = []

    def away(path, *_arguments, **_options):
        asked.append(path)
        raise OSError(code, os.strerror(code))

    lost = []
    with Leases(tmp_path, "first", heartbeat=0.02, on_loss=lambda: lost.append(1)) as leases:
        leases.acquire("trial")
        path = tmp_path / ".leases" / "trial"
        with monkeypatch.context() as patch:
            for name in ("read_text", "exists", "stat"):
                patch.setattr(Path, name, away)
            wait_until(lambda: len(asked) > 3)
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", away)
            leases.release("trial")  # it lapses by itself
    assert (lost, leases.lost) == ([], {})


def test_a_full_disk_leaves_no_half_of_a_lease(tmp_path, monkeypatch):
    leases = Leases(tmp_path, "first")
    monkeypatch.setattr("json.dumps", lambda _: "\udc80")  # which no file takes
    with pytest.raises(UnicodeEncodeError):
        leases.acquire("trial")
    monkeypatch.undo()
    assert not (tmp_path / ".leases" / "trial").exists()
    assert leases.acquire("trial") is None


def test_an_unreadable_lease_stands_until_it_is_old(tmp_path):
    leases = Leases(tmp_path, "second")
    (tmp_path / ".leases").mkdir()
    path = tmp_path / ".leases" / "trial"
    path.touch()
    assert Lease.read(path) is None
    assert leases.acquire("trial").name == "unknown"
    os.utime(path, (0, 0))
    assert leases.acquire("trial") is None
