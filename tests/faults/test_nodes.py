"""Whole nodes of a Ray cluster are lost while their workers train."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess

import pytest
from fault_laboratory import EPOCHS, FaultLaboratory
from laboratory import finish, read_until
from ray_nodes import Place, RayNodes, apart, on_loopback

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

MANY = 40
FIRST, SECOND, LATER = (on_loopback(number) for number in (2, 3, 4))


@pytest.fixture
def nodes():
    nodes = RayNodes()
    try:
        nodes.add(FIRST)
        nodes.add(SECOND)
        yield nodes
    finally:
        nodes.stop()


@pytest.fixture(scope="module")
def undisturbed_pair(folder):
    """The same with two workers for each trial."""
    laboratory = FaultLaboratory(folder, folder / "undisturbed-pair")
    try:
        code, out = laboratory.run("--workers", "2")
        assert code == 0, out
        return laboratory
    finally:
        laboratory.clean()


def start(laboratory, nodes, *more, **how):
    laboratory.environment = nodes.environment
    return laboratory.start("--address", nodes.address, *more, **how)


def notes(laboratory) -> str:
    _, runs = laboratory.runs()
    return "\n".join(run.data.tags.get("notes", "") for run in runs)


def test_a_lost_node_changes_nothing(laboratory, undisturbed, nodes):
    """The trial that was there goes on once the other one has left its node."""
    process = start(laboratory, nodes)
    before = read_until(process, r"epoch 2/")
    nodes.kill(SECOND)
    code, out = finish(process)
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
    laboratory.require_gone_on(before)


def test_workers_on_two_nodes_wait_for_another(laboratory, undisturbed_pair, nodes):
    """One of a trial's two workers is lost; the trial goes on when a new node has come."""
    process = start(laboratory, nodes, "--workers", "2")
    before = read_until(process, r"epoch 2/")
    nodes.kill(SECOND)
    nodes.add(LATER)
    code, out = finish(process)
    assert code == 0, out
    assert laboratory.outcome() == undisturbed_pair.outcome()
    laboratory.require_each_epoch_once()
    laboratory.require_gone_on(before)


def test_a_range_of_workers_shrinks_and_grows(laboratory, undisturbed_pair, nodes):
    """What is computed stays the same but for rounding, as the first epochs show. There are enough
    of them that the trial is still at work when the new node has come."""
    process = start(laboratory, nodes, "--workers", "1-2", "--set", f"epochs={MANY}")
    read_until(process, r"epoch 2/")
    nodes.kill(SECOND)
    laboratory.wait_for("K=1", " 1 worker(s)\n")
    nodes.add(LATER)
    code, out = finish(process)
    assert code == 0, out
    laboratory.require_each_epoch_once(epochs=MANY)
    told = notes(laboratory)
    assert re.search(r"1 of 2 workers, in 2 part\(s\) of their shares", told), told
    sizes = [int(n) for n in re.findall(r" (\d) worker\(s\)\n", laboratory.log("K=1"))]
    assert sizes == [2, 1, 2], "it shrinks, and takes the new node"
    losses, expected = (each.losses() for each in (laboratory, undisturbed_pair))
    for arm, of_arm in expected.items():
        assert losses[arm][:EPOCHS] == pytest.approx(of_arm, rel=1e-2), arm


@pytest.fixture
def drained():
    """A place that can be told by our command that it goes."""
    place = apart(3)
    try:
        subprocess.run([*place.enter, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the kernel allows no namespace of processes here: {error}")
    return place


def test_before_a_node_is_taken_away_its_trial_saves(
    long_folder, undisturbed_long, drained, tmp_path
):
    laboratory, nodes = FaultLaboratory(long_folder, tmp_path / "runs"), RayNodes()
    try:
        nodes.add(FIRST)
        nodes.add(drained)
        process = start(laboratory, nodes, experiment="long.yaml")
        for arm in ("K=0", "K=1"):
            laboratory.wait_for(arm, " 1 worker(s)\n", "long")
        nodes.drain(drained, seconds=20)
        code, out = finish(process)
        assert code == 0, out
        assert laboratory.outcome("long") == undisturbed_long
        logs = [laboratory.log(arm, "long") for arm in ("K=0", "K=1")]
        # In the middle of an epoch, and nothing was trained again.
        saved = [re.search(r"saved before epoch \d, step (\d+),", log) for log in logs]
        assert any(found and int(found[1]) > 1 for found in saved), logs
        for log in logs:
            assert [log.count(f"epoch {n}/2, step") for n in (1, 2)] == [1, 1], log
    finally:
        laboratory.clean()
        nodes.stop()


# ------------------------------------------------------------------------------- network namespaces


def run_ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def namespaces():
    """Two network namespaces with addresses of their own, and a bridge that joins them."""
    tag = secrets.token_hex(2)
    bridge, ends = f"cdbr{tag}", {number: f"cd{tag}n{number}" for number in (2, 3)}
    if shutil.which("ip") is None:
        pytest.skip("there is no 'ip' command")
    try:
        run_ip("link", "add", bridge, "type", "bridge")
    except OSError as error:
        pytest.skip(f"the kernel allows no bridge here: {error}")
    try:
        run_ip("address", "add", "10.213.47.1/24", "dev", bridge)
        run_ip("link", "set", bridge, "up")
        for number, name in ends.items():
            run_ip("netns", "add", name)
            run_ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            run_ip("link", "set", name, "master", bridge, "up")
            for words in (
                ("address", "add", f"10.213.47.{number}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                run_ip("-n", name, *words)
        yield [
            Place(f"10.213.47.{number}", ("ip", "netns", "exec", name))
            for number, name in ends.items()
        ]
    except OSError as error:
        pytest.skip(f"the kernel allows no network namespaces here: {error}")
    finally:
        for name in ends.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)


def test_a_lost_machine_changes_nothing(laboratory, undisturbed, namespaces):
    """As above, with a network between: each node has nothing of the other but its address."""
    nodes = RayNodes(head=Place("10.213.47.1"))
    first, second = namespaces
    try:
        nodes.add(first)
        nodes.add(second)
        process = start(laboratory, nodes)
        before = read_until(process, r"epoch 2/")
        nodes.kill(second)
        code, out = finish(process)
        assert code == 0, out
        assert laboratory.outcome() == undisturbed
        laboratory.require_each_epoch_once()
        laboratory.require_gone_on(before)
    finally:
        nodes.stop()
