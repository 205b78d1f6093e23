import json
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from trial_samples import sample_epoch, sample_plan

from codetr.config import ConfigError
from orchestrator.control import (
    compare,
    find_experiment,
    find_trial,
    invocation_to_resume,
    log_file,
    status,
    stop,
)
from orchestrator.jobs import failure_text
from orchestrator.lease import Leases
from orchestrator.plan import make_plan
from orchestrator.records import (
    finished_elsewhere,
    keep_invocation,
    note,
    noted,
    read_invocation,
    run_lease,
    set_aside,
    take_over,
)
from orchestrator.runner import known_result
from orchestrator.storage import Storage
from orchestrator.trial_log import log, trial_log

INVOCATION = """
import signal, sys, time
from pathlib import Path
from orchestrator.lease import Leases
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with Leases(Path(sys.argv[1]), "ablation-k") as leases:
    for name in sys.argv[2:]:
        assert leases.acquire(name) is None
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def plan(tmp_path):
    plan = sample_plan(tmp_path / "runs")
    plan.folder.mkdir(parents=True)
    keep_invocation(plan)
    return plan


def checkpoint(plan, trial, epochs: int, ap: float = 0.1) -> None:
    history = [asdict(sample_epoch(e, ap * e)) for e in range(1, epochs + 1)]
    folder = plan.store / trial.name / f"epoch-{epochs:04d}-x"
    folder.mkdir(parents=True)
    (folder / "history.json").write_text(json.dumps(history))


@pytest.fixture
def at_work(plan):
    """Another process that runs the plan, and trains its second trial."""
    trial = plan.trials[1]
    note(plan, trial, "running")
    process = subprocess.Popen(
        [sys.executable, "-c", INVOCATION, str(plan.output), run_lease(plan.name), trial.id],
        stdout=-1,
        text=True,
    )
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.communicate()


def states(plan) -> list[str]:
    ((_, records),) = status(plan.output, plan.name).items()
    return [record.state for record in records]


def test_every_state_is_told_from_the_disk(plan, at_work):
    first, second, third = plan.trials
    assert states(plan) == ["not started", "running", "not started"]
    checkpoint(plan, second, 2)
    note(plan, first, "failed", "because")
    note(plan, third, "running")
    checkpoint(plan, third, 4)
    ((_, records),) = status(plan.output, None).items()
    assert [r.state for r in records] == ["failed", "running", "finished"]
    assert records[0].reason == "because"
    assert records[1].where.endswith(f"process {at_work.pid}")
    assert records[1].metric("AP") == pytest.approx(20)
    assert abs(records[1].since - time.time()) < 60
    at_work.kill()
    at_work.wait()
    assert states(plan) == ["failed", "interrupted", "finished"]


def test_trials_of_earlier_invocations_are_shown_too(plan):
    other = sample_plan(plan.output, seeds=(7,)).trials[0]
    note(plan, other, "interrupted")
    ((_, records),) = status(plan.output, None).items()
    assert [r.seed for r in records] == [0, 0, 0, 7]


def test_a_damaged_checkpoint_does_not_hide_the_one_before(plan):
    trial = plan.trials[0]
    note(plan, trial, "interrupted")
    checkpoint(plan, trial, 2)
    checkpoint(plan, trial, 3)
    (plan.store / trial.name / "epoch-0003-x" / "history.json").write_text("[{")
    assert len(find_trial(plan.output, trial.id).history) == 2


def test_a_trial_by_id_beginning_or_folder(plan):
    trial = plan.trials[1]
    for text in (trial.id, trial.id[:6], trial.name, f"{plan.name}/{trial.id}"):
        assert find_trial(plan.output, text).name == trial.name
    with pytest.raises(ConfigError, match=f"did you mean '{trial.id}'"):
        find_trial(plan.output, trial.id[:-1] + "!")
    with pytest.raises(ConfigError, match="no trial ''"):
        find_trial(plan.output, "")
    with pytest.raises(ConfigError, match="did you mean 'ablation-k'"):
        find_experiment(plan.output, "ablation-q")


def test_a_trial_of_two_experiments_must_be_told_apart(plan):
    other = replace(plan, name="other")
    trial = plan.trials[0]
    note(other, trial, "interrupted")
    with pytest.raises(ConfigError, match=f"which one: .*other/{trial.name}"):
        find_trial(plan.output, trial.id)
    assert find_trial(plan.output, f"other/{trial.id}").experiment == "other"


def test_what_was_never_run_here(tmp_path):
    with pytest.raises(ConfigError, match="nothing was run there"):
        status(tmp_path, None)


def test_stopping_an_invocation_signals_its_process(plan, at_work):
    assert str(at_work.pid) in stop(plan.output, plan.name)
    assert at_work.wait(30) == 143
    with pytest.raises(ConfigError, match="not running"):
        stop(plan.output, plan.name)


def test_an_invocation_on_another_machine_is_asked_by_a_file(plan, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        Leases(plan.output, plan.name).acquire(run_lease(plan.name))
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("signalled a process of this machine"))
    assert "elsewhere" in stop(plan.output, plan.name)
    assert (plan.folder / "stop").exists()


def test_stopping_a_trial_leaves_it_a_file(plan, at_work):
    first, second, third = plan.trials
    assert "saves and stops" in stop(plan.output, second.id)
    assert (plan.store / second.name / "stop").exists()
    assert "will not begin" in stop(plan.output, third.id)
    note(plan, first, "failed", "because")
    with pytest.raises(ConfigError, match="is failed: nothing to stop"):
        stop(plan.output, first.id)
    assert at_work.poll() is None


def test_resume_plans_the_same_trials(tmp_path, monkeypatch, coco_folder):
    monkeypatch.chdir(coco_folder.parent)
    options = {"seeds": (0, 3), "data": coco_folder.name, "settings": ("batch_size=4",)}
    plan = sample_plan(tmp_path / "runs", rerun="all", **options)
    plan.folder.mkdir(parents=True)
    keep_invocation(plan)
    monkeypatch.chdir(tmp_path)
    last = invocation_to_resume(plan.output, plan.name, None)
    again = make_plan(last.experiment, last.options)
    assert [trial.name for trial in again.trials] == [trial.name for trial in plan.trials]
    assert (last.options.rerun, last.search) == ("failed", None)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://host/db?user=me&password=hunter2",
        "https://hunter2@host",
    ],
)
def test_secrets_in_addresses_are_not_kept(tmp_path, uri):
    storage = "sftp://me:hunter2@host/lab"
    plan = sample_plan(tmp_path, tracking_uri=uri, storage=storage)
    plan.folder.mkdir()
    keep_invocation(plan)
    assert "hunter2" not in (plan.folder / "invocation.yaml").read_text()
    with pytest.raises(ConfigError, match="give --tracking-uri"):
        invocation_to_resume(tmp_path, plan.name)
    with pytest.raises(ConfigError, match="give --storage"):
        invocation_to_resume(tmp_path, plan.name, "sqlite:///x.db")
    last = invocation_to_resume(tmp_path, plan.name, "sqlite:///x.db", storage)
    assert (last.options.tracking_uri, last.options.storage) == ("sqlite:///x.db", storage)


def test_a_storage_that_cannot_be_used_is_told_without_its_secret(tmp_path):
    """Nothing is asked of the network: what SFTP needs is not installed, or nobody listens."""
    plan = sample_plan(tmp_path, storage="sftp://me:hunter2@127.0.0.1:9/lab")
    with pytest.raises(ConfigError, match=r"--storage sftp://me:\*\*\*@127.0.0.1:9/lab") as error:
        Storage.of(plan)
    assert "hunter2" not in str(error.value)


def test_a_failure_is_told_without_a_secret():
    error = OSError("x\ncannot reach sftp://me:hunter2@host/lab")
    assert failure_text(error) == "OSError: cannot reach sftp://me:***@host/lab"


def test_an_invocation_file_of_something_else(plan):
    (plan.folder / "invocation.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"invocation.yaml: not as 'codetr' writes it"):
        read_invocation(plan.folder)


def test_comparing_trials_and_experiments(plan):
    other = sample_plan(plan.output, settings=("lambda_2=1",), name="other")
    for side, ap in ((plan, 0.1), (other, 0.12)):
        for trial in side.trials:
            note(side, trial, "finished")
            checkpoint(side, trial, 4, ap)
    settings, metrics = compare(plan.output, "ablation-k", "other")
    assert settings[1:] == [["detector.lambda_2", "2.0", "1.0"]]
    assert ["K=1 ATSS: AP", "40.00", "48.00", "+8.00"] in metrics
    settings, metrics = compare(plan.output, plan.trials[0].id, other.trials[1].id)
    keys = [row[0] for row in settings[1:]]
    assert keys[0] == "arm"
    assert {"detector.lambda_2", "detector.heads.1.type"} < set(keys)
    assert ["AP", "40", "48", "+8"] in metrics
    with pytest.raises(ConfigError, match="two experiments or two trials"):
        compare(plan.output, "other", plan.trials[0].id)


def test_the_log_has_what_a_worker_says_and_how_it_ended(plan):
    trial = plan.trials[0]
    folder = plan.store / trial.name
    with pytest.raises(ConfigError, match="no log yet"):
        log_file(plan.output, trial.id)

    def work() -> None:
        log.info("epoch 1")
        log.getChild("quiet").debug("nothing")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError), trial_log(folder, 0, 1):
        work()
    with trial_log(folder, 1, 2):
        log.info("rank 1 says the same")
        log.warning("but this is its own")
    text = log_file(plan.output, trial.id).read_text()
    assert "rank 0  epoch 1\n" in text
    assert "RuntimeError: a bug" in text
    assert "nothing" not in text
    assert "says the same" not in text
    assert "rank 1  but this is its own" in text


def test_a_failed_trial_stays_failed_for_the_next_invocation(plan):
    trial = plan.trials[0]
    note(plan, trial, "failed", "not finite")
    result = known_result(plan, trial)
    assert (result.state, result.reason) == ("failed", "not finite")


def test_what_is_set_aside_is_kept(plan):
    trial = plan.trials[0]
    set_aside(plan, trial)
    for number in (1, 2):
        note(plan, trial, "finished")
        set_aside(plan, trial)
        assert (plan.folder / "earlier" / f"{trial.name}.{number}" / "config.yaml").exists()
    assert noted(plan.store / trial.name) == {}


def test_a_result_of_another_experiment_is_taken_over_if_it_is_new(plan):
    other, trial = replace(plan, name="other"), plan.trials[0]
    before = time.time()
    note(other, trial, "interrupted")
    assert finished_elsewhere(plan, trial, before) is None
    note(other, trial, "finished")
    checkpoint(other, trial, 4)
    assert finished_elsewhere(other, trial, before) is None
    assert finished_elsewhere(plan, trial, time.time()) is None
    source = finished_elsewhere(plan, trial, before)
    take_over(plan, trial, source)
    assert find_trial(plan.output, f"{plan.name}/{trial.id}").state == "finished"


def test_half_of_what_is_taken_over_is_nothing(plan, monkeypatch):
    """Killed, or on a full disk: the next invocation finds no folder, and copies again."""
    other, trial = replace(plan, name="other"), plan.trials[0]
    note(other, trial, "finished")
    checkpoint(other, trial, 4)
    source = other.store / trial.name

    def copy_half(source, target, **_options):
        target.mkdir()
        (target / "config.yaml").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", copy_half)
        with pytest.raises(OSError, match="No space left"):
            take_over(plan, trial, source)
    assert not [*plan.folder.rglob("config.yaml")]
    assert known_result(plan, trial).state == "not started"
    take_over(plan, trial, source)
    assert find_trial(plan.output, f"{plan.name}/{trial.id}").state == "finished"


@pytest.mark.parametrize(
    "arguments", [["status"], ["compare", "TRIAL", "TRIAL"], ["stop", "nonsense"]]
)
def test_these_commands_import_nothing_heavy(arguments, plan):
    program = (
        "import sys; from orchestrator.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = ('torch', 'ray', 'mlflow', 'matplotlib')\n"
        "    print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    note(plan, plan.trials[0], "interrupted")
    words = [plan.trials[0].id if word == "TRIAL" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--output", str(plan.output)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (2 if arguments[0] == "stop" else 0), done.stderr
    assert (plan.trials[0].id in done.stdout) == (arguments[0] != "stop")
