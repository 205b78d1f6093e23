import csv
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from trial_samples import sample_plan, sample_results

from codetr.config import DetectorConfig
from orchestrator.experiment import load_experiment
from orchestrator.files import as_far_as_possible
from orchestrator.pictures import (
    draw_all,
    draw_ap_by_arm,
    draw_ap_by_epoch,
    draw_curves,
    draw_detections,
)
from orchestrator.plan import Options, make_plan
from orchestrator.records import note
from orchestrator.report import (
    branch_table,
    csv_table,
    markdown,
    summary_table,
    trial_table,
    write_class_table,
    write_tables,
    write_trial_files,
)
from orchestrator.results import TrialResult, reference, row, summarise


@pytest.fixture
def plan(tmp_path):
    return sample_plan(tmp_path, seeds=(0, 1))


def test_a_row_has_what_was_measured_in_percent(plan):
    result = sample_results(plan)[3]
    cells = row(result)
    assert cells["arm"] == "K=1 ATSS"
    assert (cells["k"], cells["heads"], cells["seed"]) == (1, "atss", 1)
    assert cells["AP"] == 21.0
    assert cells["AP_large"] is None  # nothing large in the data
    assert cells["core_hours"] == 0.04
    assert cells["parameters_training"] == 500_000
    assert cells["paper_AP"] == 48.7
    assert (cells["epochs"], cells["status"]) == (4, "finished")


def test_the_table_on_disk_has_a_line_for_every_trial(plan):
    results = sample_results(plan)
    results[-1] = TrialResult(plan.trials[-1], "not started", [])
    paths = write_tables(plan, results)
    assert [path.name for path in paths] == ["results.csv", "results.md"]
    with paths[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [r["AP"] for r in rows] == ["10.0", "11.0", "20.0", "21.0", "30.0", ""]
    assert list(rows[0])[:10] == [
        "arm", "k", "heads", "seed", "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    ]  # fmt: skip
    assert not list(plan.folder.glob(".results*"))


def test_lvis_numbers_have_columns_of_their_own(plan):
    results = sample_results(plan)
    results[0].history[-1].values["val/APr"] = 0.05
    assert "APr" in csv_table(results).splitlines()[0]
    assert row(results[0])["APr"] == 5.0


def branch_results(tmp_path):
    """Of the shipped experiment; a head's AP after the last epoch: 0.2 + 0.1 K + 0.01 its place."""
    plan = make_plan(load_experiment("branches"), Options(output=tmp_path, seeds=(0, 1)))
    results = sample_results(plan)
    for result in results:
        for place, name in enumerate(result.trial.detector.head_names):
            ap = 0.2 + 0.1 * result.trial.detector.k + 0.01 * place
            result.history[-1].values[f"branch/{name}/AP"] = ap
    return plan, results


def test_every_branch_stands_beside_the_papers_table_11(tmp_path):
    plan, results = branch_results(tmp_path)
    first, last, same = "K=1 ATSS", "K=2 ATSS + Faster R-CNN", "(+10.0 to +10.0)"
    assert branch_table(results) == [
        ["branch", "arm", "AP", "gain", "paper's AP", "paper's gain"],
        ["query", "K=0", "10.5 (10.0–11.0)", "–", "47.1", "–"],
        ["query", first, "20.5 (20.0–21.0)", f"+10.0 {same}", "48.7", "+1.6"],
        ["query", last, "30.5 (30.0–31.0)", "+20.0 (+20.0 to +20.0)", "49.5", "+2.4"],
        ["atss", first, "30.0 (30.0–30.0)", "–", "47.4", "–"],
        ["atss", last, "40.0 (40.0–40.0)", f"+10.0 {same}", "48.0", "+0.6"],
        ["faster_rcnn", last, "41.0 (41.0–41.0)", "–", "46.7", "–"],
    ]
    text = markdown(plan, results)
    assert text.count(f"| faster_rcnn | {last} | 41.0") == 1
    assert "| --- | --- | ---: | ---: | ---: | ---: |" in text
    rows = list(csv.DictReader(csv_table(results).splitlines()))
    assert [r["atss_AP"] for r in rows] == ["", "", "30.0", "30.0", "40.0", "40.0"]
    assert (rows[4]["paper_atss_AP"], rows[4]["paper_faster_rcnn_AP"]) == ("48.0", "46.7")
    assert [r["paper_AP"] for r in rows[::2]] == ["47.1", "48.7", "49.5"]


def test_a_branch_that_was_not_reached_has_no_number(tmp_path):
    _, results = branch_results(tmp_path)
    results[4:] = [replace(r, history=r.history[:2], state="interrupted") for r in results[4:]]
    *_, last = branch_table(results)
    assert last == ["faster_rcnn", "K=2 ATSS + Faster R-CNN", "–", "–", "46.7", "–"]


def test_who_does_not_measure_branches_sees_nothing_of_them(plan):
    results = sample_results(plan)
    assert branch_table(results) == []
    assert "Branches" not in markdown(plan, results)
    assert "atss_AP" not in csv_table(results)


def test_gains_are_over_the_first_arm_beside_the_papers(plan):
    first, second, third = summarise(sample_results(plan))
    assert first.ap == pytest.approx(10.5)
    assert first.gain is None
    assert second.gain == pytest.approx(10)
    assert second.gains == pytest.approx((10, 10))
    assert third.paper_gain == pytest.approx(49.5 - 47.1)


def test_gains_are_over_the_arm_that_the_experiment_names(tmp_path):
    """Where it has the results that are compared; a name changes no trial."""
    experiment = load_experiment("ablation-k").model_copy(update={"reference": "K=1 ATSS"})
    options = Options(output=tmp_path, seeds=(0, 1))
    named = make_plan(experiment, options)
    others = make_plan(load_experiment("ablation-k"), options)
    assert [trial.id for trial in named.trials] == [trial.id for trial in others.trials]
    results = sample_results(named)
    first, second, third = summarise(results)
    assert (first.gain, second.gain) == (pytest.approx(-10), None)
    assert third.paper_gain == pytest.approx(49.5 - 48.7)
    assert "Gains are over K=1 ATSS." in markdown(named, results)
    assert reference(results[:2]) == "K=0"


def test_the_reference_of_the_loss_weights_is_the_papers_choice():
    assert load_experiment("ablation-lambda").reference == "λ1=1 λ2=2"


def test_gains_are_those_of_the_same_seed(plan):
    """A seed that the first arm lacks has none."""
    results = sample_results(plan)
    results[0] = TrialResult(results[0].trial, "failed", [], reason="NaN")
    _, second, _ = summarise(results)
    assert (len(second.aps), second.gains) == (2, pytest.approx((10,)))


def test_an_arm_without_a_result_has_no_number(plan):
    results = sample_results(plan)
    results[:2] = [TrialResult(r.trial, "failed", [], reason="NaN") for r in results[:2]]
    first, second, _ = summarise(results)
    assert first.ap is None
    assert (second.gain, second.gains) == (None, ())
    text = markdown(plan, results)
    assert "**K=0, seed 0, failed:** NaN" in text
    assert "| K=0 | – | 47.1 | – |" in text


def test_markdown_shows_the_spread_of_seeds(plan):
    text = markdown(plan, sample_results(plan))
    assert "| K=1 ATSS | 20.5 (20.0–21.0) | +10.0 (+10.0 to +10.0) | 48.7 | +1.6 |" in text
    assert "Gains are over the first arm, K=0." in text
    assert "each over that arm's trial of the same seed" in text
    assert "`table7_number_of_heads`" in text


def test_columns_without_any_number_are_left_out(plan):
    results = sample_results(plan)
    assert "GPU-h" not in trial_table(results)[0]
    assert "large" not in trial_table(results)[0]
    alone = [r for r in results if r.trial.arm == "K=0"]
    assert summary_table(alone)[0] == ["arm", "AP", "paper's AP"]


def test_files_of_a_trial(plan):
    result = sample_results(plan)[2]
    files = write_trial_files(plan, result)
    assert [file.name for file in files] == ["config.yaml", "curves.png"]
    config = yaml.safe_load(files[0].read_text())
    assert DetectorConfig.model_validate(config["detector"]) == result.trial.detector


@pytest.fixture
def best(plan, tmp_path, coco_folder):
    """A trial whose best checkpoint has all that is written beside it, half of it."""
    result = sample_results(plan)[0]
    folder = tmp_path / "epoch-0004"
    folder.mkdir()
    for name in ("per_class.json", "predictions.json"):
        (folder / name).write_text('[{"half": 0.')
    data = result.trial.data.model_copy(update={"dataset": "coco", "path": coco_folder})
    trial = result.trial.model_copy(update={"data": data})
    (plan.store / trial.name).mkdir(parents=True)
    return replace(result, trial=trial, best=folder)


@pytest.mark.parametrize(
    ("write", "of", "missing"),
    [
        (write_class_table, "per_class.json", "no table per class is written"),
        (draw_detections, "predictions.json", "no picture of detections is drawn"),
    ],
)
def test_what_is_made_of_a_damaged_file_is_left_out_and_told(plan, best, write, of, missing):
    said = []
    given = [best] if write is draw_detections else best
    assert as_far_as_possible(said.append, write, plan, given) == []
    (line,) = said
    assert line.startswith(f"{best.best / of}: damaged (")
    assert line.endswith(f"): {missing}")


def test_all_else_of_such_a_trial_is_written(plan, best):
    files = write_trial_files(plan, best) + draw_all(plan, [best])
    assert [file.name for file in files] == [
        "config.yaml", "curves.png", "predictions.json", "ap_by_epoch.png", "ap_by_arm.png"
    ]  # fmt: skip


def test_a_full_disk_leaves_what_a_trial_is(plan, monkeypatch):
    result = sample_results(plan)[2]
    config, _ = note(plan, result.trial, "running")
    before = config.read_text()

    def half(path, text):
        path.write_bytes(text[:20].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_trial_files(plan, result)
    assert config.read_text() == before


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_pictures_show_something(tmp_path, seeds):
    plan = sample_plan(tmp_path, seeds=seeds)
    results = sample_results(plan)
    results[0] = replace(results[0], history=results[0].history[:2])  # interrupted
    pictures = [
        draw_ap_by_epoch(results, tmp_path / "by_epoch.png"),
        draw_ap_by_arm(results, tmp_path / "by_arm.png"),
        draw_curves(results[1], tmp_path / "curves.png"),
    ]
    for path in pictures:
        colours = Image.open(path).convert("RGB").getcolors(1_000_000)
        assert len(colours) > 20, path
