"""Analyses at the end of a run, and ``codetr analyze``; Ray is a stand-in here."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from tiny_training import FASTER_RCNN, start, tiny_detector, tiny_training
from trial_samples import sample_plan, sample_results

from codetr.analysis import CATALOGUE
from codetr.analysis.frame import Measurement
from codetr.checkpoint import load_checkpoint, save_checkpoint
from codetr.config import ConfigError
from codetr.data import open_dataset
from codetr.zoo.files import convert
from orchestrator import analyses, cli
from orchestrator.analyses import Analyses, Look, courses, measure_trial, possible_looks
from orchestrator.analysis_overview import (
    Point,
    Quantity,
    _join,
    chain,
    draw_by_k,
    points_of,
    quantities,
)
from orchestrator.analyze import _open
from orchestrator.experiment import load_experiment
from orchestrator.interrupt import Interrupts
from orchestrator.plan import Options, make_plan
from orchestrator.storage import Storage

ONE_PASS = ("discriminability", "iof-iob", "conflicts", "queries")


class Heard:
    """A view and a recorder that only remember."""

    def __init__(self):
        self.said, self.measured, self.attached = [], [], []

    def say(self, text):
        self.said.append(text)

    def stage(self, text, detail=""):
        pass

    def measure(self, trial, values, step):
        self.measured.append((trial.arm, values, step))

    def attach(self, trial, files):  # noqa: ARG002
        self.attached += files


class Reference:
    """To what a task on its way will give."""

    def __init__(self, function, arguments):
        self.value = self.error = None
        try:
            self.value = function(*arguments)
        except Exception as error:
            self.error = error

    def get(self):
        if self.error is not None:
            raise self.error
        return self.value


NO_RAY = SimpleNamespace(
    remote=lambda **_: (
        lambda function: SimpleNamespace(remote=lambda *arguments: Reference(function, arguments))
    ),
    wait=lambda references, **_: (references[:1], references[1:]),
    get=Reference.get,
)
"""Runs a task where it is."""


def fake_measurement(look, cpus=1):
    """Numbers and arrays enough for the overview alone."""
    numbers = {"conflicts": {"conflict": 0.5}, "iof-iob": {"encoder_area": 0.8}}
    facts = {"checkpoint": look.checkpoint, "k": look.trial.detector.k, "epoch": 4}
    return Measurement(
        look.analysis,
        f"{look.trial.arm}, seed {look.trial.seed}",
        look.trial.arm,
        facts,
        numbers.get(look.analysis, {}),
        {},
    )


@pytest.fixture
def plan(tmp_path):
    plan = sample_plan(tmp_path, seeds=(0, 1))
    for trial in plan.trials:
        for epoch in (3, 4):
            (plan.store / trial.name / f"epoch-000{epoch}-step-00000{epoch}00-x").mkdir(
                parents=True
            )
    return plan


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", NO_RAY)


def analysed(plan, results, heard):
    return Analyses(plan, heard, Interrupts(), {r.trial.id: r for r in results})


# ---------------------------------------------------------------------------------------- the plan


def test_what_is_asked_for(tmp_path):
    ablation = sample_plan(tmp_path)
    assert ablation.analyses == tuple(CATALOGUE)
    asked = {
        given: sample_plan(tmp_path, analyze=given).analyses
        for given in ("all", "none", "queries, conflicts,queries")
    }
    assert [*asked.values()] == [tuple(CATALOGUE), (), ("queries", "conflicts")]
    experiment = ablation.experiment.model_copy(update={"analyze": "none"})
    assert make_plan(experiment, ablation.options).analyses == ()
    with pytest.raises(ConfigError, match=r"--analyze: no analysis 'conflict'; did you mean 'conf"):
        sample_plan(tmp_path, analyze="conflict")
    experiment = ablation.experiment.model_copy(update={"analyze": "x"})
    with pytest.raises(ConfigError, match=r"ablation-k\.yaml: analyze: no analysis 'x'"):
        make_plan(experiment, ablation.options)
    assert [t.id for t in ablation.trials] == [
        t.id for t in sample_plan(tmp_path, analyze="none").trials
    ]


def test_looks_are_of_the_last_checkpoint_where_there_are_heads(plan):
    results = sample_results(plan)
    results[-1] = replace(results[-1], state="interrupted")
    looks = possible_looks(plan, results, must_not_fail)
    assert [look.analysis for look in looks] == [
        *ONE_PASS[:2], *ONE_PASS[:2], *ONE_PASS, *ONE_PASS, *ONE_PASS
    ]  # fmt: skip
    assert all("epoch-0004-step" in look.checkpoint for look in looks)
    assert possible_looks(replace(plan, analyses=()), results, must_not_fail) == []


def must_not_fail(what, error):
    raise AssertionError(what) from error


# --------------------------------------------------------------------------------- the end of a run


def test_a_failure_is_told_and_only_what_is_missing_is_looked_for_again(plan, ray, monkeypatch):
    def fails_for_one(look, cpus):
        if look.analysis == "conflicts" and look.trial.detector.k == 1 and look.trial.seed == 0:
            raise RuntimeError("out of\nluck")
        return fake_measurement(look)

    monkeypatch.setattr(analyses, "measure_trial", fails_for_one)
    heard, results = Heard(), sample_results(plan)
    first = analysed(plan, results, heard)
    assert len(first.missing(results)) == 2 * (2 + 4 + 4)
    first.look(heard, slots=3)
    assert heard.said == [
        "analysis failed: conflicts of K=1 ATSS, seed 0: RuntimeError: out of luck"
    ]
    assert first.failures == [heard.said[0].removeprefix("analysis failed: ")]
    assert len(heard.measured) == 19
    assert ("K=1 ATSS", {"analysis/iof-iob/encoder_area": 0.8}, 4) in heard.measured
    assert len(heard.attached) == 2 * 19
    assert all(path.exists() for path in heard.attached)

    monkeypatch.setattr(analyses, "measure_trial", fake_measurement)
    again, second = Heard(), analysed(plan, results, Heard())
    (left,) = second.missing(results)
    assert (left.analysis, left.trial.arm, left.trial.seed) == ("conflicts", "K=1 ATSS", 0)
    second.look(again, slots=3)
    assert second.missing(results) == []
    assert len(again.measured) == 20  # the store may lack what was found before
    assert len(again.attached) == 2


def test_another_checkpoint_is_looked_at_anew(plan):
    results = sample_results(plan)[:1]
    heard = analysed(plan, results, Heard())
    for look in heard.missing(results):
        heard._keep(look, fake_measurement(look))
    assert heard.missing(results) == []
    (plan.store / results[0].trial.name / "epoch-0005-step-00000500-y").mkdir()
    assert len(heard.missing(results)) == 2


def test_nothing_that_happens_here_fails_the_run(plan, monkeypatch):
    """Not even a storage that cannot be listed."""

    def broken(*_):
        raise OSError("the network is gone")

    monkeypatch.setattr(analyses, "possible_looks", broken)
    heard = Heard()
    analysed(plan, sample_results(plan), heard).look(heard, slots=1)
    assert heard.said == ["analysis failed: looking at the detectors: OSError: the network is gone"]


@pytest.fixture
def checkpoints_away(monkeypatch):
    """Of one trial, for so many questions."""

    def break_off(trial, times):
        left, checkpoints = [times], Storage.checkpoints

        def broken(storage, name):
            if name == trial.name and left[0]:
                left[0] -= 1
                raise ConnectionResetError("the network is gone")
            return checkpoints(storage, name)

        monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", (0.0,))
        monkeypatch.setattr("orchestrator.storage.Storage.checkpoints", broken)

    return break_off


def test_a_storage_that_answers_the_second_time_is_no_failure(plan, checkpoints_away):
    heard, results = Heard(), sample_results(plan)
    checkpoints_away(plan.trials[0], times=1)
    assert len(analysed(plan, results, heard).missing(results)) == 20
    assert heard.said == []


def test_a_trial_whose_storage_is_away_is_told_once_and_left_out(
    plan, checkpoints_away, ray, monkeypatch
):
    """Before anything is trained, at the detectors, and where the pages are written."""
    monkeypatch.setattr(analyses, "measure_trial", fake_measurement)
    heard, results = Heard(), sample_results(plan)
    at_end = analysed(plan, results, heard)
    checkpoints_away(plan.trials[-1], times=99)
    assert len(at_end.missing(results)) == 16
    at_end.look(heard, slots=3)
    files = at_end.write(plan, results)
    told = "the analyses of K=2 ATSS + Faster R-CNN, seed 1: ConnectionResetError: the network is"
    assert [said for said in heard.said if "network" in said] == [f"analysis failed: {told} gone"]
    assert f"**Failed:** {told}" in files[0].read_text()
    assert len(heard.measured) == 16


def with_changes(results):
    for result in results:
        for epoch in result.history[1:]:
            epoch.values["matching/changed"] = 1 / epoch.epoch
            epoch.values["matching/per_image"] = 2.0
    return results


def test_pages_of_a_run(plan):
    """Numbers without arrays: every page but instability fails, the overview tells."""
    heard, results = Heard(), with_changes(sample_results(plan))
    at_end = analysed(plan, results, heard)
    for look in at_end.missing(results):
        at_end._keep(look, fake_measurement(look))
    files = at_end.write(plan, results)
    names = [path.name for path in files]
    assert names == [
        "analysis.md", "by_k.png", "instability.md", "instability.png", "instability.csv"
    ]  # fmt: skip
    rows = files[-1].read_text().splitlines()
    assert rows[1] == 'K=0,"K=0, seed 0",2,0.5,2.0'
    assert len(rows) == 1 + 6 * 3
    assert len(heard.said) == 4
    overview = files[0].read_text()
    assert "**Failed:** the page of conflicts: KeyError" in overview
    assert "(instability.md)" in overview
    assert "| K=0 | 0 | 10.50 (10.00 to 11.00) | – | 0.8000 (0.8000 to 0.8000) |" in overview
    assert "| K=2 ATSS + Faster R-CNN | 2 | 30.50 (30.00 to 31.00) | 0.5000 (0.5" in overview
    assert "Numbers are means over 2 seeds" in overview
    assert "| 4 | 0.2500 (0.2500 to 0.2500) | 0.2500 (0" in files[2].read_text()
    assert at_end.write(replace(plan, analyses=()), results) == []


def test_courses_begin_with_the_second_evaluation(plan):
    first = courses(with_changes(sample_results(plan)))[0]
    assert first.label == "K=0, seed 0"
    assert [*first.changes] == [2, 3, 4]
    assert first.changes[2].changed == 0.5
    assert courses(sample_results(plan)) == []


def test_against_k(plan, tmp_path):
    results = sample_results(plan)
    ap = points_of(Quantity("AP"), results, [])
    assert ap[2] == Point("K=1 ATSS", 1, 20.0)
    looks = [Look("conflicts", result.trial, "x") for result in results]
    theirs = {"K=2 ATSS + Faster R-CNN": 0.006}
    quantity = Quantity("c", "conflicts", "conflict", theirs, comparable=2)
    found = points_of(quantity, results, [fake_measurement(look) for look in looks])
    assert found[-1] == Point("K=2 ATSS + Faster R-CNN", 2, 0.5)
    twins = [replace(point, arm=f"{point.arm}'") for point in ap]
    shown = {Quantity("AP"): [*ap, *twins], quantity: found}
    arms = dict.fromkeys(point.arm for point in shown[next(iter(shown))])
    path = draw_by_k(shown, [*arms], chain(plan), tmp_path / "k.png")
    assert path.stat().st_size > 1000


def test_the_paper_has_a_value_for_each_arm_of_a_k(tmp_path):
    """Table 7 has two arms of K = 2; a seed more is no arm more."""
    options = Options(output=tmp_path, profile="laptop", seeds=(0, 1))
    ap, conflict, *_ = quantities(make_plan(load_experiment("ablation-k-to-6"), options))
    assert [*ap.paper.values()] == [47.1, 48.7, 49.0, 49.5, 49.5, 48.9]
    assert [*conflict.paper] == ["K=2 ATSS + Faster R-CNN", "K=6 + RetinaNet, FCOS, GFL"]


def test_the_paper_has_no_conflict_of_equal_heads(tmp_path):
    options = Options(output=tmp_path, profile="laptop")
    _, conflict, *_ = quantities(make_plan(load_experiment("ablation-same-heads"), options))
    assert conflict.paper == {}


@pytest.mark.parametrize(
    ("name", "nested"),
    [
        (
            "ablation-k-to-6",
            [
                "K=0",
                "K=1 ATSS",
                "K=2 ATSS + Faster R-CNN",
                "K=3 + PAA",
                "K=6 + RetinaNet, FCOS, GFL",
            ],
        ),
        ("ablation-same-heads", ["1 x ATSS", "2 x ATSS", "6 x ATSS"]),
        ("ablation-heads", []),  # seven arms of one head
    ],
)
def test_a_line_joins_arms_of_which_each_has_the_heads_before_it(tmp_path, name, nested):
    options = Options(output=tmp_path, profile="laptop")
    assert chain(make_plan(load_experiment(name), options)) == nested


def test_a_distance_from_the_query_head_is_in_no_line_of_those_among_heads():
    quantity = Quantity("c", "conflicts", "conflict", comparable=2)
    places = {"a": (1, 0.1), "b": (2, 0.2), "c": (3, 0.3)}
    axes = Figure().subplots()
    _join(axes, quantity, places, ["a", "b", "c"])
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[2, 0.2], [3, 0.3]]


# --------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, coco_folder):
    """K = 0 of two epochs and K = 1, of the data's classes; and as weights without a training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written = {}
    sampling = {**FASTER_RCNN, "rcnn": {**FASTER_RCNN["rcnn"], "samples": 4}}
    kinds = (("k0", (), 1), ("k0-2", (), 2), ("k1", ("atss",), 1), ("sampling", (sampling,), 1))
    for name, heads, epoch in kinds:
        detector = tiny_detector(*heads).model_copy(update={"num_classes": 10})
        state = start(detector, tiny_training(), 1)
        state.data = state.data.model_copy(
            update={"short_sides": (), "crop": False, "path": coco_folder}
        )
        state.classes = open_dataset(state.data, "val").classes
        state.epoch = epoch
        written[name] = folder / f"{name}.pt"
        save_checkpoint(state.checkpoint(), written[name])
    for name in ("k0", "k1"):
        written[f"{name}w"] = folder / f"{name}.safetensors"
        convert(written[name], written[f"{name}w"])
    return written


@pytest.fixture
def command(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["codetr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def analyze(command, checkpoints, coco_folder, tmp_path):
    """``codetr analyze`` of checkpoints by their names here, written to ``out``."""

    def run(name, *words):
        paths = [checkpoints.get(word, tmp_path / word) for word in words]
        where = ("--data", coco_folder, "--output", tmp_path / "out")
        return command("analyze", name, *paths, *where)

    return run


def test_a_trial_is_measured_as_a_task_does(checkpoints, plan, coco_folder):
    trial = plan.trials[0]
    data = trial.data.model_copy(update={"dataset": "coco", "path": coco_folder})
    trial = trial.model_copy(update={"data": data})
    threads = torch.get_num_threads()
    found = measure_trial(Look("discriminability", trial, str(checkpoints["k0"])), cpus=1)
    torch.set_num_threads(threads)
    assert (found.group, found.label) == ("K=0", "K=0, seed 0")
    assert found.facts["checkpoint"] == str(checkpoints["k0"])
    assert found.facts["images"] == 4
    assert analyses.metrics(found).keys() == {
        f"analysis/discriminability/{name}"
        for name in ("foreground", "background", "contrast", "separation")
    }


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("iof-iob", ("k0", "k1")),
        ("discriminability", ("k0w", "k1")),
        ("conflicts", ("k1w",)),
        ("instability", ("k0-2", "k0")),
        ("queries", ("k1",)),
    ],
)
def test_command(analyze, tmp_path, name, given):
    code, out, err = analyze(name, *given)
    assert code == 0, err
    written = out.split()
    assert str(tmp_path / "out" / f"{name}.md") in written
    assert all((tmp_path / "out" / path).exists() for path in written)
    numbers = json.loads((tmp_path / "out" / "1" / f"{name}.json").read_text())
    assert numbers["facts"]["images"] == 4


def test_what_was_found_is_saved_before_it_is_drawn(analyze, tmp_path):
    """Where the page cannot be written."""
    (tmp_path / "out" / "queries.md").mkdir(parents=True)
    code, _, err = analyze("queries", "k1")
    assert (code, err.count("\n")) == (2, 1)
    assert "--output: cannot write" in err
    assert (tmp_path / "out" / "1" / "queries.json").exists()
    assert (tmp_path / "out" / "1" / "queries.npz").exists()


def test_each_detector_opens_the_data_once(analyze, monkeypatch):
    opened = []

    def counting(*arguments):
        opened.append(arguments)
        return _open(*arguments)

    monkeypatch.setattr("orchestrator.analyze._open", counting)
    code, _, err = analyze("discriminability", "k0", "k1")
    assert code == 0, err
    assert len(opened) == 2


def test_weights_tell_what_their_checkpoint_tells(analyze, tmp_path):
    code, _, err = analyze("queries", "k1", "k1w")
    assert code == 0, err
    first, second = (json.loads((tmp_path / "out" / n / "queries.json").read_text()) for n in "12")
    assert first["numbers"] == second["numbers"]
    assert second["label"] == "K=1 atss, k1.safetensors"
    assert "epoch" not in second["facts"]


def test_the_command_draws_what_the_training_draws(analyze, checkpoints, plan, tmp_path):
    """Of the positives that an R-CNN samples, the same as at the end of the run."""
    code, _, err = analyze("queries", "sampling")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "1" / "queries.json").read_text())
    data, numbers = load_checkpoint(checkpoints["sampling"]).data, []
    for seed in (found["facts"]["seed"], 0):
        trial = plan.trials[0].model_copy(update={"data": data, "seed": seed})
        look = Look("queries", trial, str(checkpoints["sampling"]))
        numbers.append(measure_trial(look, cpus=torch.get_num_threads()).numbers)
    own, other = numbers
    assert found["numbers"] == pytest.approx(own)
    assert found["numbers"] != pytest.approx(other)


def test_weights_by_url(command, checkpoints, coco_folder, tmp_path):
    where = ("--data", coco_folder, "--output", tmp_path / "out")
    code, _, err = command("analyze", "discriminability", f"file://{checkpoints['k0w']}", *where)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "1" / "discriminability.json").read_text())
    assert found["facts"]["checkpoint"] == f"file://{checkpoints['k0w']}"


def test_the_block_in_the_docs(checkpoints, capsys):
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {"path": checkpoints["k1"]})
    assert "kl/query/atss" in capsys.readouterr().out


def test_list(command):
    code, out, _ = command("analyze", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [*CATALOGUE]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("conflict", "k1"), "no analysis 'conflict'; did you mean 'conflicts'?"),
        (("conflicts", "k1", "k0"), "k0.pt: has no auxiliary head (K = 0), and 'conflicts'"),
        (("queries", "k0"), "k0.pt: has no auxiliary head"),
        (("queries", "k1w", "k0w"), "k0.safetensors: has no auxiliary head (K = 0)"),
        (("instability", "k0w"), "k0.safetensors: weights without a training, and 'instability'"),
        (("instability", "k0", "k0-2", "k0w"), "k0.safetensors: weights without a training"),
        (("instability", "k0"), "give at least 2 of them"),
        (("instability", "k0", "k1"), "compares epochs of one training"),
        (("iof-iob", "none"), "cannot read"),
    ],
)
def test_bad_input(analyze, tmp_path, arguments, text):
    code, _, err = analyze(*arguments)
    assert code == 2
    assert err.startswith("codetr: ")
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_classes_and_no_objects(command, checkpoints, coco_folder, tmp_path):
    annotations = coco_folder / "annotations" / "instances_val.json"
    cases = (("classes", "k0"), ("objects", "k0"), ("classes", "k0w"))
    for number, (change, given) in enumerate(cases):
        content = json.loads(annotations.read_text())
        if change == "classes":
            content["categories"][0]["name"] = "cow"
        else:
            content["annotations"] = []
        folder = tmp_path / f"{change}-{number}"
        (folder / "annotations").mkdir(parents=True)
        (folder / "val").symlink_to(coco_folder / "val")
        (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
        code, _, err = command(
            "analyze", "discriminability", checkpoints[given], "--data", folder,
            "--output", tmp_path / "out",
        )  # fmt: skip
        assert code == 2
        assert err.count("\n") == 1
        assert ("no object in 4 images" if change == "objects" else "classes differ") in err
        assert not (tmp_path / "out").exists()
