"""Runs that are looked at, stopped, resumed and compared, two at once, and a late signal."""

import re
import signal
import subprocess

import pytest
from laboratory import CODETR, PATIENCE, Laboratory, finish, read_until
from test_run import EXPERIMENT

pytestmark = pytest.mark.e2e

LONG = 20
"""Epochs that a fast machine does not get through while a few commands answer."""

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
    laboratory = Laboratory(folder, folder / "runs").prepare(EXPERIMENT, train_images=160)
    yield laboratory
    laboratory.clean()


def test_two_invocations_at_once_train_no_trial_twice(laboratory):
    """Of different names, so that only the leases keep them apart."""
    first = laboratory.start("--name", "first")
    read_until(first, "training 2 trials")
    second = laboratory.start("--name", "second")
    begun = read_until(second, "trains it")
    code, out = laboratory.run("--name", "first")
    assert (code, "another 'codetr' is at work" in out) == (2, True)
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


def test_what_another_experiment_has_trained_is_not_trained_again(laboratory):
    """After the test before."""
    code, out = laboratory.run("--name", "third")
    assert code == 0, out
    assert (out.count("copied from"), re.findall(r"epoch \d/3", out)) == (2, [])
    assert [r["AP"] for r in laboratory.rows("third")] == [
        r["AP"] for r in laboratory.rows("first")
    ]


def test_all_is_trained_again_where_that_is_wanted(laboratory):
    """After the test before."""
    _, before = laboratory.runs("first")
    code, out = laboratory.run("--name", "first", "--rerun", "all")
    assert code == 0, out
    assert len(re.findall(r"epoch \d/3", out)) == 6
    _, children = laboratory.runs("first")
    assert len(children) == 2, "what was trained before is in MLflow's bin"
    assert not {run.info.run_id for run in before} & {run.info.run_id for run in children}


def ask(laboratory: Laboratory, *words: str) -> str:
    """What a command prints about the laboratory's runs."""
    code, out = finish(laboratory.command(*words, "--output", str(laboratory.output)))
    assert code == 0, out
    return out


@pytest.mark.timeout(900)
def test_one_trial_is_stopped_then_the_run_then_all_is_resumed(laboratory):
    long = ("--name", "long", "--set", f"epochs={LONG}")
    process = laboratory.start(*long)
    read_until(process, f"K=2, seed 0: epoch 1/{LONG}")
    first, second = re.findall(r"^ +(\w{10})  +K=", ask(laboratory, "status", "long"), re.MULTILINE)
    assert "saves and stops" in ask(laboratory, "stop", first)
    read_until(process, "K=0, seed 0: interrupted")
    shown = ask(laboratory, "status", "long")
    assert re.search(rf"{first} .*interrupted", shown), shown
    assert re.search(rf"{second} .*running", shown), shown
    assert "stopped as asked, before epoch" in ask(laboratory, "logs", first)
    ask(laboratory, "stop", "long")
    code, out = finish(process)
    assert code == 128 + signal.SIGTERM, out
    shown = ask(laboratory, "status", "long")
    assert shown.count("interrupted") == 2, shown
    code, out = laboratory.run(*long, "--rerun", "none")
    assert code == 1, out
    assert "starting Ray" not in out
    assert [row["status"] for row in laboratory.rows("long")] == ["interrupted"] * 2

    out = ask(laboratory, "resume", "long")
    assert f"epoch 1/{LONG}" not in out
    assert [row["epochs"] for row in laboratory.rows("long")] == [str(LONG)] * 2
    _, children = laboratory.runs("long")
    for run in children:
        points = laboratory.client().get_metric_history(run.info.run_id, "val/AP")
        assert [point.step for point in points] == [*range(1, LONG + 1)]
    compared = ask(laboratory, "compare", first, second)
    assert re.search(r"detector.heads\S* ", compared), compared


def test_a_signal_after_ray_has_ended_is_not_lost(laboratory):
    """Ray's end puts the default action in the place of every handler of SIGTERM."""
    done = subprocess.run(
        [CODETR[0], "-c", SIGNALLED],
        cwd=laboratory.folder, check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr
