import signal
from types import SimpleNamespace

import pytest
import ray
import ray.train
from trial_samples import sample_plan

from codetr.config import ConfigError
from codetr.data import DataError
from orchestrator.cluster import _require_answer
from orchestrator.interrupt import Interrupts
from orchestrator.invocation import Outcome, only_one, prepare_data
from orchestrator.jobs import (
    Fault,
    ForemanLost,
    Halted,
    failure_text,
    fit,
    foreman_needed,
    result_on_disk,
)
from orchestrator.lease import Leases
from orchestrator.records import note
from orchestrator.results import TrialResult
from orchestrator.runner import _Run
from orchestrator.search import train_leased
from orchestrator.share import share
from orchestrator.worker import STOP, train


class Silent:
    """A view that only remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage(self, text: str, detail: str = "") -> None:
        pass


def test_a_folder_is_held_against_a_second_invocation(tmp_path):
    folder = tmp_path / "runs" / "name"
    with only_one(folder), pytest.raises(ConfigError, match="another"), only_one(folder):
        pass
    assert not (tmp_path / "runs").exists()  # nothing was written, so nothing stays
    with only_one(folder):
        (folder / "results.csv").touch()
    assert (folder / "results.csv").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="--output: cannot write"), only_one(file / "x"):
        pass


def test_broken_images_are_refused_or_counted(coco_folder, tmp_path):
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(coco_folder, broken)
    annotations = broken / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"] = [0, 0, 0, 5]
    annotations.write_text(json.dumps(content))
    options = {"data": str(broken), "settings": ("batch_size=4",)}
    with pytest.raises(DataError, match="no area"):
        prepare_data(sample_plan(tmp_path, **options), Silent())
    view = Silent()
    prepare_data(sample_plan(tmp_path, skip_bad=True, **options), view)
    assert view.said == [f"{annotations}: left out 1 broken image(s)"]


def test_train_and_val_must_have_the_same_classes(coco_folder, tmp_path):
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    annotations = other / "annotations" / "instances_val.json"
    content = json.loads(annotations.read_text())
    content["categories"][3]["name"] = "three"
    annotations.write_text(json.dumps(content))
    options = {"data": str(other), "settings": ("batch_size=4",)}
    with pytest.raises(DataError, match="three"):
        prepare_data(sample_plan(tmp_path, **options), Silent())


def test_exit_codes_and_status(tmp_path):
    trial = sample_plan(tmp_path).trials[0]
    finished, failed = (TrialResult(trial, state, []) for state in ("finished", "failed"))
    outcomes = [
        Outcome([finished]),
        Outcome([finished, failed]),
        Outcome([failed], interrupted=130),
    ]
    assert [(o.exit_code, o.status) for o in outcomes] == [
        (0, "FINISHED"),
        (1, "FAILED"),
        (130, "KILLED"),
    ]


def test_what_was_never_begun_has_left_nothing(tmp_path):
    plan = sample_plan(tmp_path)
    assert result_on_disk(plan, plan.trials[0]).state == "not started"
    (plan.store / plan.trials[1].name).mkdir(parents=True)
    assert result_on_disk(plan, plan.trials[1]).state == "interrupted"


class Deaf:
    """Where MLflow would be told."""

    def __getattr__(self, _):
        return lambda *_: None


class Watching(Silent):
    """Also remembers how the trials have ended."""

    def __init__(self):
        super().__init__()
        self.results = []

    def ended(self, result):
        self.results.append(result)

    def progress(self, *_):
        pass


@pytest.fixture
def storage_away(monkeypatch):
    def away(*_):
        raise TimeoutError("the read timed out")

    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", (0.0,))
    monkeypatch.setattr("orchestrator.storage.Storage.result", away)


@pytest.mark.usefixtures("storage_away")
def test_a_storage_that_is_away_fails_a_trial_with_its_reason_and_not_the_run(tmp_path):
    plan = sample_plan(tmp_path)
    run = _Run(plan, view := Watching(), train, Interrupts(), Leases(tmp_path, plan.name))
    run.recorder = Deaf()
    first, second, third = plan.trials
    for trial in (first, second):
        run._write_beginning(trial)
    run.take_stock()
    assert run.done == {}
    run._ended(first, None)
    run._abandon(second)
    (plan.store / third.name).write_text("no folder can be here")
    assert not run._begin(third, None)
    told = [(result.trial, result.state, result.reason) for result in view.results]
    away = "what it has left cannot be read: TimeoutError: the read timed out"
    assert told[:2] == [(first, "failed", away), (second, "failed", away)]
    assert told[2][:2] == (third, "failed")
    assert told[2][2].startswith("cannot begin: ")


@pytest.mark.usefixtures("storage_away")
@pytest.mark.parametrize("fails", ["acquire", "fit"])
def test_nor_the_sweep(tmp_path, monkeypatch, fails):
    plan = sample_plan(tmp_path)
    trial = plan.trials[0]
    note(plan, trial, "running")

    class Acquire:
        @staticmethod
        def remote(_):
            if fails == "acquire":
                raise TimeoutError("the read timed out")
            return True

    monkeypatch.setattr("orchestrator.search.fit", lambda *_, **_more: None)
    searcher = SimpleNamespace(acquire=Acquire)
    reason = train_leased(SimpleNamespace(plan=plan), trial, searcher, train)
    assert isinstance(reason, Fault)
    assert reason.endswith("TimeoutError: the read timed out")


def test_asked_to_stop_on_another_machine_while_a_signal_is_held_back(tmp_path):
    """Both are one request to end in order: a second signal would end all at once."""
    plan = sample_plan(tmp_path)
    plan.folder.mkdir(parents=True)
    (plan.folder / STOP).touch()
    with Interrupts() as interrupts:
        run = _Run(plan, Silent(), train, interrupts, Leases(tmp_path, plan.name))
        with interrupts.shield():
            run.heed_stop_file()
            run.heed_stop_file()
            interrupts.ask()
            interrupts.received, received = None, interrupts.received  # or it would be raised here
    assert received == signal.SIGTERM


def test_the_end_of_the_foreman_is_told_in_one_line():
    with pytest.raises(ForemanLost, match=r"drives the trials has died: .* the same command goes"):
        raise_asking(ray.exceptions.RayActorError())
    with pytest.raises(ForemanLost, match="drives the trials: ValueError: no such metric: "):
        raise_asking(ray.exceptions.RayTaskError("search", "", ValueError("no such metric")))


@pytest.mark.parametrize("kind", [Halted, ConfigError])
def test_what_says_itself_what_to_do_is_told_alone(kind):
    """Of a damaged file the same command makes the same."""
    error = kind("population.json: damaged: remove it")
    with pytest.raises(ForemanLost, match=r"^population\.json: damaged: remove it$"):
        raise_asking(ray.exceptions.RayTaskError("search", "", error))


@pytest.mark.parametrize("own", [True, False])
def test_what_training_has_not_said_itself_is_a_fault(tmp_path, monkeypatch, own):
    def end():
        if own:
            return SimpleNamespace(return_value="loss not finite")
        raise ray.train.TrainingFailedError("a worker died")

    remote = SimpleNamespace(remote=lambda *_: 0)
    board = SimpleNamespace(step=remote, leave_room=remote)
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("orchestrator.jobs._trainer", lambda *_, **_more: SimpleNamespace(fit=end))
    plan = sample_plan(tmp_path)
    reason = fit(plan, plan.trials[0], board, train)
    assert reason.endswith("loss not finite" if own else "a worker died")
    assert isinstance(reason, Fault) != own


def raise_asking(error):
    with foreman_needed():
        raise error


def test_a_failure_is_told_in_one_line():
    assert failure_text(ValueError("line one\n\nthe end\n")) == "ValueError: the end"
    assert failure_text(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":1", "127.0.0.1:9"])
def test_addresses_are_checked_before_ray_tries_for_minutes(address):
    with pytest.raises(ConfigError, match=f"--address {address}"):
        _require_answer(address)


def test_shipped_folders_are_found():
    assert (share("experiments") / "ablation-k.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="nonsense"):
        share("nonsense")
