"""Two invocations at once, and a signal that comes late, on real runs."""

import re
import subprocess

import pytest
from test_run import CODETR, EXPERIMENT, PATIENCE, Laboratory, read_until

from codetr.data.digits import make_digits

pytestmark = pytest.mark.e2e

SIGNALLED = """
import signal
from orchestrator.cluster import Cluster
from orchestrator.experiment import load_experiment
from orchestrator.interrupt import Interrupts
from orchestrator.plan import Options, make_plan
cluster = Cluster(make_plan(load_experiment("tiny.yaml"), Options(data="digits")))
with Interrupts() as interrupts:
    cluster.start()
    interrupts.install()
    with interrupts.shield():
        cluster.stop(keep_logs=False)
        signal.raise_signal(signal.SIGTERM)
        print(interrupts.received)
        interrupts.received = None
"""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    make_digits(folder / "digits", train_images=24, val_images=6, size=64)
    laboratory = Laboratory(folder)
    yield laboratory
    laboratory.clean()


def test_two_invocations_at_once_train_no_trial_twice(laboratory):
    """Of different names, so that only the leases keep them apart."""
    first = laboratory.start("--name", "first")
    read_until(first, "training 2 trials")
    second = laboratory.start("--name", "second")
    begun = read_until(second, "trains it")
    code, out = laboratory.run("--name", "first")
    assert (code, "another 'codetr run' is at work" in out) == (2, True)
    outs = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
    outs[1] = "".join(begun) + outs[1]
    assert (first.returncode, second.returncode) == (0, 0), outs
    epochs = [re.findall(r"^(K=\d), seed 0: epoch (\d)/3", out, re.MULTILINE) for out in outs]
    assert sorted(epochs[0] + epochs[1]) == [(k, n) for k in ("K=0", "K=2") for n in "123"]
    assert "copied from" in outs[1]
    rows = [laboratory.rows(name) for name in ("first", "second")]
    assert [row["AP"] for row in rows[0]] == [row["AP"] for row in rows[1]]
    assert not list((laboratory.output / ".leases").glob("[0-9a-f]*"))
    for name in ("first", "second"):
        _, children = laboratory.runs(name)
        assert [run.info.status for run in children] == ["FINISHED"] * 2


def test_a_signal_after_ray_has_ended_is_not_lost(laboratory):
    """Ray's end puts the default action in the place of every handler of SIGTERM."""
    done = subprocess.run(
        [CODETR[0], "-c", SIGNALLED],
        cwd=laboratory.folder, check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr
