import errno
import re
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from trial_samples import sample_epoch

from codetr.config import ConfigError
from orchestrator.cli import main
from orchestrator.control import invocation_to_resume
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, make_plan
from orchestrator.records import keep_invocation, read_records
from orchestrator.results import TrialResult
from orchestrator.search import (
    Entry,
    Ledger,
    _trainable,
    _tuner,
    grace_epochs,
    read_ledger,
    trial_of,
)
from orchestrator.sweep import (
    Search,
    SweepOptions,
    make_sweep,
    plan_sweep,
    require_same_sweep,
    sweep_files,
)
from orchestrator.sweep_run import SweepOutcome


def sample_sweep(output, name=None, **given):
    settings = given.pop("settings", ())
    common = Options(output=output, settings=settings, workers=1, profile="laptop")
    return make_sweep(name, SweepOptions(common=common, **given))


def test_every_shipped_sweep_can_be_planned(tmp_path):
    assert "k-heads-lambda" in sweep_files()
    for name in sweep_files():
        sweep = sample_sweep(tmp_path, name)
        for suggestion in sweep.search.space.corners():
            sweep.trial(suggestion)


def test_a_suggestion_is_the_trial_that_run_would_train(tmp_path):
    sweep = sample_sweep(tmp_path, over=("lambda_1=0.25,4", "heads=[atss],[]"), searcher="grid")
    trial = sweep.trial({"lambda_1": 4, "heads": "[atss]"})
    options = Options(workers=1, settings=("lambda_1=4", "heads=[atss]"), profile="laptop")
    experiment = load_experiment("ablation-k")
    one_arm = experiment.model_copy(update={"arms": {"K=0": experiment.arms["K=0"]}})
    assert trial.id == make_plan(one_arm, options).trials[0].id
    assert trial.arm == "lambda_1=4 heads=[atss]"


def test_what_the_command_line_says_stands_above_the_file(tmp_path):
    sweep = sample_sweep(tmp_path, "k-heads-lambda")
    assert (sweep.count, sweep.search.searcher, sweep.search.metric) == (20, "optuna", "AP")
    sweep = sample_sweep(
        tmp_path, "k-heads-lambda", samples=3, searcher="random", metric="AP50", seed=7
    )
    assert (sweep.count, sweep.search.searcher, sweep.search.metric) == (3, "random", "AP50")
    assert sweep.trial({"K": 0, "no heads": "[]"}).seed == 7


@pytest.mark.parametrize(
    "given",
    [
        {"name": "k-heads-lambda", "samples": 5},
        {"over": ("lambda_1=0.25..4:log", "heads=[],[atss]", "queries.count=100..300"), "seed": 3},
        {"over": ("lambda_1=1,2,1.0", "heads=[atss],[]"), "searcher": "grid"},
        {"over": ("lambda_1=1,2,4",), "scheduler": "pbt", "samples": 3, "interval": 1},
    ],
)
def test_resume_goes_on_with_the_same_sweep(tmp_path, given):
    sweep = sample_sweep(tmp_path, settings=("batch_size=4",), **given)
    require_same_sweep(sweep)
    keep_invocation(sweep.plan, sweep.search.model_dump(mode="json"))
    last = invocation_to_resume(tmp_path, sweep.plan.name, None)
    again = plan_sweep(last.experiment, Search.model_validate(last.search), last.options)
    require_same_sweep(again)
    assert again.definition() == sweep.definition()
    assert again.search == sweep.search
    assert read_records(sweep.folder) == []


def test_a_relative_data_set_is_found_from_everywhere(tmp_path, monkeypatch, coco_folder):
    """Suggestions are planned in processes of Ray Tune, which are in folders of their own."""
    monkeypatch.chdir(coco_folder.parent)
    common = Options(output=tmp_path, data=coco_folder.name, workers=1)
    sweep = make_sweep(None, SweepOptions(over=("lambda_1=1,2",), common=common))
    monkeypatch.chdir(tmp_path)
    assert sweep.trial({"lambda_1": 1}).id == sweep.plan.trials[0].id


def test_a_grid_knows_its_trials(tmp_path):
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2,1.0",), searcher="grid", samples=99)
    assert sweep.count == 3
    assert len(sweep.plan.trials) == 2  # identical configurations are one trial


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nonsense", {}, "no sweep or experiment 'nonsense'"),
        ("ablation-k", {}, "has no space: give --over"),
        (None, {"over": ("lambda_1=1,2",), "metric": "APX"}, "--metric APX"),
        (None, {"over": ("lambda_1=-1,1",)}, "lambda_1"),
        (None, {"over": ("epochs=2,4",)}, "asha compares"),
        ("k-heads-lambda", {"searcher": "grid"}, "lambda_1 is a range"),
        (
            "k-heads-lambda",
            {"settings": ("lambda_2=1",)},
            "--set lambda_2=1: the sweep itself decides",
        ),
    ],
)
def test_mistakes(tmp_path, name, given, message):
    with pytest.raises(ConfigError, match=message):
        sample_sweep(tmp_path, name, **given)


@pytest.mark.parametrize("heads", ["[[atss, atss]]", "[[atss], []]"])
def test_k_is_the_number_of_heads(tmp_path, heads):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "question: Which?\nextends: ablation-k\nspace:\n"
        "  - {name: K, setting: null, values: [0, 1]}\n"
        f"  - {{name: head, setting: heads, when: {{K: [1]}}, values: {heads}}}\n"
    )
    with pytest.raises(ConfigError, match="K=1 disagrees with the heads, of which"):
        sample_sweep(tmp_path, str(file))


def test_only_the_same_sweep_goes_on_in_a_folder(tmp_path):
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",))
    require_same_sweep(sweep)
    require_same_sweep(sample_sweep(tmp_path, over=("lambda_1=1,2",)))
    with pytest.raises(ConfigError, match=r"other .*space.*--name"):
        require_same_sweep(sample_sweep(tmp_path, over=("lambda_1=1,3",)))
    with pytest.raises(ConfigError, match=r"other .*samples"):
        require_same_sweep(sample_sweep(tmp_path, over=("lambda_1=1,2",), samples=5))
    run = replace(sweep, plan=replace(sweep.plan, name="run"))
    run.folder.mkdir()
    (run.folder / "results.csv").touch()
    with pytest.raises(ConfigError, match="something else than a sweep"):
        require_same_sweep(run)


@pytest.mark.parametrize("content", ['{"search": {"spa', "[]", '{"search": 1}'])
def test_a_damaged_note_is_named(tmp_path, content):
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",))
    require_same_sweep(sweep)
    (sweep.folder / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.json: (damaged|not as).*: .*give --name"):
        require_same_sweep(sweep)


def test_a_full_disk_leaves_no_half_of_a_note(tmp_path, monkeypatch):
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",))

    def fill(path, text):
        with path.open("w") as file:
            file.write(text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fill)
        with pytest.raises(ConfigError, match="No space"):
            require_same_sweep(sweep)
    require_same_sweep(sweep)


def test_a_damaged_ledger_is_named(tmp_path):
    (tmp_path / "suggestions.json").write_text("[{")
    told = r"suggestions\.json: damaged \(.*\): remove it, and tune/ beside it .*; or give --name"
    with pytest.raises(ConfigError, match=told):
        read_ledger(tmp_path)


def test_tune_knows_the_grid_also_when_it_goes_on(tmp_path):
    """Where it cannot read the rest it begins again, and would with a single empty suggestion."""
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",), searcher="grid")
    for _ in range(2):
        tuner = _tuner(sweep, lambda _config: None, "sweep", 1)
        points = tuner._local_tuner.param_space["suggestion"]["grid_search"]
        assert points == [{"lambda_1": 1}, {"lambda_1": 2}]
    assert tuner._local_tuner._is_restored


@pytest.mark.parametrize("searcher", ["grid", "optuna"])
def test_what_tune_cannot_read_is_named_with_what_to_do(tmp_path, searcher):
    """A full disk leaves half of it."""
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",), searcher=searcher)
    folder = sweep.folder / "tune"
    folder.mkdir(parents=True)
    (folder / "tuner.pkl").write_bytes(b"\x80\x05half")
    with pytest.raises(ConfigError, match=r"^\S*/tune: Ray Tune cannot .*: remove the folder: "):
        _tuner(sweep, lambda _config: None, "sweep", 1)


def trains(ledger, tune_id, suggestion, trial):
    return ledger.claim(tune_id, suggestion, trial).tune_id == tune_id


def test_the_ledger_outlives_its_process(tmp_path):
    ledger = Ledger(tmp_path)
    assert trains(ledger, "a", {"lambda_1": 1}, "trial")
    assert not trains(ledger, "b", {"lambda_1": 1.0}, "trial")  # the same configuration
    assert trains(ledger, "c", {"lambda_1": 2}, "other")
    ledger.end("c", "stopped", "asha, after epoch 2")
    again = Ledger(tmp_path)
    assert trains(again, "a", {"lambda_1": 1}, "trial")  # its first suggestion trains it, as before
    assert not trains(again, "b", {"lambda_1": 1.0}, "trial")
    by_id = {entry.tune_id: (entry.number, entry.state) for entry in read_ledger(tmp_path)}
    assert by_id == {"a": (1, "open"), "b": (2, "open"), "c": (3, "stopped")}


def test_nobody_waits_for_a_suggestion_that_tune_has_forgotten(tmp_path):
    Ledger(tmp_path).claim("forgotten", {"lambda_1": 1}, "trial")
    again = Ledger(tmp_path)
    assert trains(again, "new", {"lambda_1": 1}, "trial")
    again.end("new", "finished")
    again.close()
    assert [(entry.tune_id, entry.number) for entry in read_ledger(tmp_path)] == [("new", 2)]


@pytest.mark.parametrize("state", ["open", "interrupted", "failed"])
def test_whoever_is_taken_up_first_trains_what_several_stand_for(tmp_path, state):
    """Not what the first of them came to in an earlier invocation: it will be taken up later."""
    before = Ledger(tmp_path)
    before.claim("a", {"lambda_1": 1}, "trial")
    before.claim("b", {"lambda_1": 1.0}, "trial")
    for key in ("a", "b"):
        before.end(key, state)
    again = Ledger(tmp_path)
    assert trains(again, "b", {"lambda_1": 1.0}, "trial")
    assert not trains(again, "a", {"lambda_1": 1}, "trial")
    again.end("a", "finished")
    again.end("b", "finished")
    again.close({"a", "b"})
    assert {e.tune_id: (e.number, e.state) for e in read_ledger(tmp_path)} == {
        "a": (1, "finished"),
        "b": (2, "finished"),
    }


def test_a_trial_keeps_its_folder_whichever_of_its_suggestions_trains_it(tmp_path):
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,1.0",), searcher="grid")
    one, other = {"lambda_1": 1}, {"lambda_1": 1.0}
    trial = sweep.trial(one)
    assert sweep.trial(other).id == trial.id
    assert sweep.trial(other).name != trial.name  # it bears the suggestion's words
    before = Ledger(tmp_path)
    before.claim("a", one, trial.id)
    before.claim("b", other, trial.id)
    again = Ledger(tmp_path)
    assert trial_of(sweep, again.claim("b", other, trial.id)) == trial
    again.end("b", "finished")
    again.close({"b"})  # Tune has forgotten the one whose name it bears
    (left,) = read_ledger(tmp_path)
    assert (left.tune_id, trial_of(sweep, left)) == ("b", trial)
    # As an older version has written it: each under its own name.
    assert trial_of(sweep, Entry(1, "b", other, trial.id)) == sweep.trial(other)


def test_what_a_population_has_left_behind_stays_in_its_ledger(tmp_path):
    before = Ledger(tmp_path)
    for key in ("failed", "cut off"):
        before.claim(key, {"lambda_1": 1}, key, member=1)
    before.end("failed", "failed", "a NaN")
    again = Ledger(tmp_path)
    again.claim("other", {"lambda_1": 2}, "other", member=1)
    again.close()
    assert {e.tune_id: e.reason for e in read_ledger(tmp_path)} == {"failed": "a NaN", "other": ""}


def test_what_tune_has_forgotten_after_its_end_is_no_suggestion_either(tmp_path):
    """Killed before Tune had written down that it was there; Tune has suggested the same again."""
    before = Ledger(tmp_path)
    before.claim("forgotten", {"lambda_1": 1}, "trial")
    before.end("forgotten", "finished")
    again = Ledger(tmp_path)
    # There is nothing left to train.
    assert not trains(again, "new", {"lambda_1": 1}, "trial")
    again.end("new", "finished")
    again.close({"new"})
    (left,) = read_ledger(tmp_path)
    assert (left.tune_id, left.state) == ("new", "finished")


@pytest.fixture
def in_tune(monkeypatch):
    """As the trial t1 of Ray Tune, with a searcher that keeps only this ledger."""

    def begin(ledger, trial):
        remote = {
            "claim": lambda tune_id, suggestion: ledger.claim(tune_id, suggestion, trial.id),
            "first": ledger.first,
            "failed": lambda tune_id, why: ledger.end(tune_id, "failed", why),
        }
        calls = {name: SimpleNamespace(remote=function) for name, function in remote.items()}
        context = SimpleNamespace(get_trial_id=lambda: "t1")
        monkeypatch.setattr("ray.get_actor", lambda _: SimpleNamespace(**calls))
        monkeypatch.setattr("ray.get", lambda value: value)
        monkeypatch.setattr("ray.tune.get_context", lambda: context)

    return begin


@pytest.mark.parametrize("first", ["t1", "t2"])
@pytest.mark.parametrize("reason", [None, "what it has left cannot be read: TimeoutError: away"])
def test_a_trial_without_its_metric_has_failed_for_its_own_reason(
    tmp_path, monkeypatch, in_tune, first, reason
):
    """And not because Tune has lost its process; whether it has trained, or another for it."""
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",), metric="AP_large")
    suggestion, ledger = {"lambda_1": 1}, Ledger(tmp_path)
    trial = sweep.trial(suggestion)
    in_tune(ledger, trial)
    ledger.claim(first, suggestion, trial.id)
    ledger.end(first, "finished")
    history = [] if reason else [sample_epoch(1, 0.2)]
    result = TrialResult(trial, "finished", history, reason)
    monkeypatch.setattr("orchestrator.search._report_to_tune", lambda *_: None)
    monkeypatch.setattr("orchestrator.search.train_leased", lambda *_, **_more: None)
    monkeypatch.setattr("orchestrator.search.result_on_disk", lambda *_: result)
    told = reason or "AP_large was not measured"
    with pytest.raises(RuntimeError, match=told):
        _trainable(sweep, None, "sweep")({"suggestion": suggestion})
    assert (ledger.entries["t1"].state, ledger.entries["t1"].reason) == ("failed", told)


class Asked(str):
    """A trial's id; while the first entry is compared with it, another thread claims one."""

    __hash__ = str.__hash__

    def __new__(cls, text, claim):
        asked = super().__new__(cls, text)
        asked.thread = threading.Thread(target=claim)
        return asked

    def __eq__(self, other):
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.5)  # as long as it can; where it has to wait, it goes on later
        return str(self) == str(other)


def test_the_first_suggestion_is_found_while_others_are_made(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.claim("a", {"lambda_1": 1}, "one")
    ledger.claim("b", {"lambda_1": 2}, "two")
    asked = Asked("two", lambda: ledger.claim("c", {"lambda_1": 3}, "three"))
    assert ledger.first(asked).tune_id == "b"
    asked.thread.join()
    assert [entry.tune_id for entry in read_ledger(tmp_path)] == ["a", "b", "c"]


def test_grace():
    assert [grace_epochs(epochs) for epochs in (1, 3, 8, 12)] == [1, 1, 2, 3]


def test_the_documented_commands_and_file(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    commands = re.findall(r"^    codetr (sweep .*)$", text, re.MULTILINE)
    (tmp_path / "documented.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    for command in [*commands, "sweep documented.yaml"]:
        profile = ["--profile", "laptop", "--workers", "1", "--dry-run"]
        monkeypatch.setattr("sys.argv", ["codetr", *shlex.split(command), *profile])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, command
        out = capsys.readouterr().out
        assert "suggestions" in out or "a population of 8" in out
    assert len(commands) == 4
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_the_scheduler_stopped_is_no_failure(tmp_path):
    trial = sample_sweep(tmp_path, over=("lambda_1=1,2",)).plan.trials[0]
    stopped = TrialResult(trial, "interrupted", [], reason="asha, after epoch 1")
    outcomes = [
        SweepOutcome([stopped]),
        SweepOutcome([stopped], complete=False),
        SweepOutcome([stopped], interrupted=130),
    ]
    assert [(outcome.exit_code, outcome.status) for outcome in outcomes] == [
        (0, "FINISHED"),
        (1, "FAILED"),
        (130, "KILLED"),
    ]
