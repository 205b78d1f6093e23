"""Every experiment as it is shipped: what it plans, and that its arms train."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codetr.analysis import CATALOGUE
from codetr.config import DataConfig
from codetr.data.digits import make_digits
from codetr.zoo.measure import on_meta
from orchestrator.cli import app
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Plan, Trial, make_plan
from orchestrator.share import share

SHIPPED = sorted(path.stem for path in share("experiments").glob("*.yaml"))
PROFILES = ("laptop", "paper")

TABLES = {
    "ablation-components": "table9_components",
    "ablation-convs": "table12_head_convs",
    "ablation-heads": "table8_single_head",
    "ablation-k": "table7_number_of_heads",
    "ablation-k-to-6": "table7_number_of_heads",
    "ablation-lambda": "table13_loss_weights",
    "ablation-same-heads": "table7_number_of_heads",
    "baselines-plain": "table2_plain_baselines",
    "baselines-strong": "table3_strong_baselines",
    "branches": "table11_every_branch",
    "coco-system": "table5_coco_systems",
    "longer-schedule": "table10_longer_schedule",
    "lvis-system": "table6_lvis_systems",
    "state-of-the-art": "table4_state_of_the_art",
}
PAPER = {
    "ablation-components": [37.1, 41.6, 40.5, 42.3, 43.3, 46.2, 45.3, 46.8],
    "ablation-convs": [41.8, 42.3, 41.9, 42.1, 42.3, 42.0],
    "ablation-heads": [43.3, 46.1, 46.3, 46.5, 46.5, 46.5, 46.5, 46.8],
    "ablation-k-to-6": [48.4, 47.1, 48.7, 49.0, 49.5, 49.5, 48.9],
    "ablation-lambda": [46.2, 46.6, 46.8, 46.1, 46.1, 46.5, 46.3],
    "baselines-plain": [39.4, 41.5, 41.8, 41.2, 43.1, 43.5, 43.3, 46.8, 46.5, 37.1, 42.3, 42.9],
    "baselines-strong": [47.1, 48.7, 49.5, 49.4, 51.0, 51.2, 55.2, 56.4, 56.9, 58.5, 59.3, 59.5],
    "longer-schedule": [46.8, 44.5, 46.0, 45.9],
    "lvis-system": [56.9, 67.9],
}
"""All rows of these tables, as the paper prints them."""


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch):
    monkeypatch.setattr("orchestrator.machine.local_cpus", lambda: 1024)
    monkeypatch.setattr("orchestrator.machine.local_gpus", lambda: 256)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Enough small images, with masks, for the paper's largest batch."""
    return make_digits(tmp_path_factory.mktemp("coco") / "digits", train_images=224, size=24)


def plan(name: str, profile: str, coco: Path, settings: tuple[str, ...] = ()) -> Plan:
    data = str(coco) if profile == "paper" else None
    return make_plan(load_experiment(name), Options(profile=profile, data=data, settings=settings))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_experiment_can_be_planned(name, profile, coco):
    made = plan(name, profile, coco)
    assert made.trials
    for trial in made.trials:
        assert max(trial.training.drop_epochs) < trial.training.epochs
        assert (trial.data.dataset == "coco") == (profile == "paper")
        assert (trial.detector.backbone.name == "tiny") == (profile == "laptop")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_experiment_is_shown_by_a_dry_run(name, profile, coco, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = ["--data", str(coco)] if profile == "paper" else []
    given = ["run", name, "--profile", profile, "--dry-run", "--output", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*given, *data])
    assert done.exit_code == 0, done.output
    for arm in plan(name, profile, coco).arms:
        assert arm in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_runs_in_some_profile(name, coco):
    run = {arm for profile in PROFILES for arm in plan(name, profile, coco).arms}
    assert run == set(load_experiment(name).arms)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("ablation-")])
def test_every_ablation_ends_with_all_analyses(name, profile, coco):
    assert plan(name, profile, coco).analyses == tuple(CATALOGUE)


def test_each_table_from_2_to_13_is_somebodys():
    tables = {name: load_experiment(name).paper for name in SHIPPED}
    assert {name: paper.table for name, paper in tables.items() if paper} == TABLES


@pytest.mark.parametrize("name", PAPER)
def test_all_rows_of_the_table_stand_beside_the_arms(name, coco):
    assert [trial.paper_ap for trial in plan(name, "paper", coco).trials] == PAPER[name]


# ------------------------------------------------------------------------- what arms have in common


def settings_of(trial: Trial, *besides: str) -> str:
    """What a trial trains and with what, but for the order of its heads, which draw and start by
    their names, and for what is evaluated in the end."""
    heads = sorted(head.model_dump_json() for head in trial.detector.heads)
    detector = trial.detector.model_dump(mode="json", exclude={"heads", *besides})
    training = trial.training.model_dump(mode="json", exclude={"evaluate_branches"})
    data = trial.data.model_dump(mode="json")
    return json.dumps(
        [detector, [] if "heads" in besides else heads, training, data], sort_keys=True
    )


BY_K = ("ablation-k", "ablation-k-to-6", "baselines-plain", "baselines-strong", "branches")
"""Their arms are called after a detector, if there are several, and K."""
BY_HEADS = ("ablation-convs", "ablation-heads", "ablation-lambda", "ablation-same-heads")
"""All their arms are of one detector."""


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [*BY_K, *BY_HEADS])
def test_arms_that_ask_about_heads_differ_in_them_alone(name, profile, coco):
    """And in the weights of the new losses: that is what equation 6 adds to a detector."""
    found = defaultdict(set)
    for trial in plan(name, profile, coco).trials:
        family, of_k, _ = trial.arm.partition("K=")
        key = family if of_k or name in BY_K else ""
        found[key].add(settings_of(trial, "heads", "lambda_1", "lambda_2"))
    assert {key for key, settings in found.items() if len(settings) > 1} == set()
    assert len(found) < len(plan(name, profile, coco).trials)


ONE_ROW = [
    {
        "ablation-k": "K=2 ATSS + Faster R-CNN",
        "ablation-k-to-6": "K=2 ATSS + Faster R-CNN",
        "baselines-strong": "Deformable-DETR++, K=2",
        "branches": "K=2 ATSS + Faster R-CNN",
        "state-of-the-art": "Co-Deformable-DETR",
    },
    {
        "ablation-k": "K=1 ATSS",
        "ablation-same-heads": "1 x ATSS",
        "baselines-strong": "Deformable-DETR++, K=1",
    },
    {"baselines-strong": "DINO, K=0", "state-of-the-art": "DINO"},
    {"baselines-strong": "DINO Swin-L, K=0", "state-of-the-art": "DINO Swin-L, 36 epochs"},
    {"ablation-components": "neither", "baselines-plain": "Deformable-DETR, 12 epochs, K=0"},
    {
        "ablation-components": "both",
        "ablation-convs": "1 conv",
        "baselines-plain": "Deformable-DETR, 12 epochs, K=1",
    },
    {
        "ablation-heads": "ATSS",
        "ablation-lambda": "λ1=1 λ2=2",
        "baselines-plain": "Deformable-DETR, K=1",
        "longer-schedule": "K=1, 36 epochs",
    },
]
"""Arms that the paper has one number for, in several tables."""


@pytest.mark.parametrize("row", ONE_ROW, ids=lambda row: next(iter(row.values())))
def test_a_training_of_several_tables_is_one(row, coco):
    trials = [
        trial
        for name, arm in row.items()
        for trial in plan(name, "paper", coco).trials
        if trial.arm == arm
    ]
    assert len(trials) == len(row)
    assert len({trial.paper_ap for trial in trials}) == 1
    assert len({settings_of(trial) for trial in trials}) == 1


def test_a_training_has_one_number_of_the_papers(coco):
    """But for H-Deformable-DETR's, which tables 4 and 7 have twice: their files say so."""
    numbers = defaultdict(set)
    for name in SHIPPED:
        for trial in plan(name, "paper", coco).trials:
            numbers[settings_of(trial)].add(trial.paper_ap)
    several = [of_one - {None} for of_one in numbers.values() if len(of_one - {None}) > 1]
    assert several == [{48.4, 48.7}]
    for name in ("ablation-k-to-6", "state-of-the-art"):
        assert "48.7" in load_experiment(name).file.read_text()


def test_the_schedules_of_the_paper(coco):
    """Epochs, drops, batch and rate, as section 4.1 and supplementary B have them."""

    def schedules(name: str) -> set[tuple]:
        trials = plan(name, "paper", coco).trials
        return {
            (t.training.epochs, *t.training.drop_epochs, t.training.batch_size,
             t.training.learning_rate)
            for t in trials
        }  # fmt: skip

    assert schedules("ablation-components") == {(12, 11, 32, 2e-4), (36, 30, 32, 2e-4)}
    for of_tables_7_and_11 in ("ablation-k", "ablation-k-to-6", "ablation-same-heads", "branches"):
        assert schedules(of_tables_7_and_11) == {(12, 11, 16, 2e-4)}
    assert schedules("ablation-heads") == {(36, 30, 32, 2e-4)}
    assert schedules("baselines-plain") == {(36, 30, 32, 2e-4), (12, 11, 32, 2e-4)}
    assert schedules("baselines-strong") == {(12, 11, 16, 2e-4), (36, 30, 16, 2e-4)}
    assert schedules("coco-system") == {(12, 8, 64, 5e-5)}
    assert schedules("coco-system-pretraining") == {(26, 24, 224, 2.5e-4)}
    assert schedules("lvis-system") == {(36, 30, 16, 2e-4), (16, 9, 15, 64, 5e-5)}
    assert schedules("lvis-system-pretraining") == {(26, 24, 192, 2e-4)}


@pytest.mark.parametrize("profile", PROFILES)
def test_all_of_dino_learns_at_one_rate(profile, coco):
    """But for the backbone; Deformable-DETR's sampling offsets do at a tenth of it."""
    rates = {
        (trial.detector.queries.rank_by, trial.training.offsets_multiplier)
        for name in SHIPPED
        for trial in plan(name, profile, coco).trials
        if trial.detector.transformer.attention == "deformable"
    }
    assert rates == {("best_class", 1), ("objectness", 0.1)}


def test_the_data_of_the_paper(coco):
    """Canvas, copy-paste by the original's 10 and 300 pixels, repeats and federated loss."""

    def canvases(name: str) -> dict[str, int]:
        trials = [t for t in plan(name, "paper", coco).trials if t.data.jitter.enabled]
        for trial in trials:
            jitter, paste = trial.data.jitter, trial.data.copy_paste
            assert (jitter.scale, jitter.fill, jitter.padding_mask) == ((0.1, 2.0), 114, False)
            assert paste.enabled
            assert paste.max_objects == 100
            assert paste.box_tolerance * jitter.canvas / 1024 == pytest.approx(10, rel=0.001)
            assert paste.min_visible * (jitter.canvas / 1024) ** 2 == pytest.approx(300, rel=0.003)
        return {trial.arm: trial.data.jitter.canvas for trial in trials}

    assert canvases("lvis-system") == {"Co-DINO Swin-L": 1280, "Co-DINO ViT-L": 1536}
    assert canvases("lvis-system-pretraining") == {"Co-DINO ViT-L": 1280}
    r50, swin = ("", ", 36 epochs"), (" Swin-L", " Swin-L, 24 epochs", " Swin-L, 36 epochs")
    assert canvases("state-of-the-art") == {
        **{f"Co-DINO++{which}": 1024 for which in r50},
        **{f"Co-DINO++{which}": 1280 for which in swin},
    }
    plus = [t for t in plan("state-of-the-art", "paper", coco).trials if t.data.jitter.enabled]
    assert [trial.paper_ap for trial in plus] == [52.1, 54.8, 59.3, 60.4, 60.7]
    for trial in plan("lvis-system", "paper", coco).trials:
        federated = trial.detector.query_loss.federated
        assert (federated.enabled, federated.classes, federated.power) == (True, 50, 0.5)
        assert trial.data.repeat_threshold == 0.001


def test_weights_are_averaged_where_the_paper_says_so(coco):
    """Supplementary B: when fine-tuning on COCO, and not on LVIS."""

    def averages(name: str) -> set[float | None]:
        return {trial.training.ema for trial in plan(name, "paper", coco).trials}

    assert {name for name in SHIPPED if averages(name) != {None}} == {"coco-system"}
    assert averages("coco-system") == {0.9999}


@pytest.mark.parametrize(
    ("before", "after", "arm"),
    [
        ("coco-system-pretraining", "coco-system", "Co-DINO ViT-L"),
        ("lvis-system-pretraining", "lvis-system", "Co-DINO ViT-L"),
    ],
)
def test_fine_tuning_can_start_from_the_pretraining(before, after, arm, coco):
    import torch

    from codetr.data import Classes
    from codetr.start import new_tensors, shapes
    from codetr.weights import Weights

    pretrained = plan(before, "paper", coco).trials[0].detector
    pretrained = pretrained.model_copy(update={"num_classes": 365})
    names = tuple(map(str, range(365)))
    model = {n: torch.empty(shape, device="meta") for n, shape in shapes(pretrained).items()}
    weights = Weights(model, pretrained, DataConfig(), Classes(names, tuple(range(365))))
    (tuned,) = (trial for trial in plan(after, "paper", coco).trials if trial.arm == arm)
    new = new_tensors(tuned.detector, weights)
    assert "decoder.classify.0.weight" in new
    assert not any(name.startswith(("backbone", "neck", "encoder")) for name in new)
    assert len(new) < len(model) / 20


def test_the_laptop_trains_as_much_longer_as_the_paper(coco):
    laptop, paper = (
        [trial.training.epochs for trial in plan("longer-schedule", profile, coco).trials]
        for profile in PROFILES
    )
    proportions = [epochs / paper[0] for epochs in paper]
    assert [epochs / laptop[0] for epochs in laptop] == pytest.approx(proportions, rel=0.02)


# ---------------------------------------------------------------------------------------- training

REDUCED = (
    "embed_dim=16",
    "ffn_dim=16",
    "attention_heads=2",
    "group_norm_groups=4",
    "encoder_layers=1",
    "decoder_layers=2",
    "queries.count=8",
    "one_to_many.queries=8",
    "denoising.queries=4",
    "positive_queries.max=12",
    "faster_rcnn.rcnn.fc_dim=16",
    "mask_rcnn.rcnn.fc_dim=16",
)


def part_of(parameter: str) -> str:
    """``heads.1`` of ``heads.1.cls.weight``; other parts are not several."""
    first, second, *_ = f"{parameter}..".split(".")
    return f"{first}.{second}" if second.isdigit() else first


def distinct_arms(plans: Iterable[Plan]) -> list[Trial]:
    """One trial for each detector."""
    arms: dict[str, Trial] = {}
    for made in plans:
        for trial in made.trials:
            detector = trial.detector.model_copy(update={"num_classes": 10})
            arms.setdefault(
                detector.model_dump_json(), trial.model_copy(update={"detector": detector})
            )
    return list(arms.values())


def test_every_distinct_arm_of_the_paper_can_be_built(coco):
    """At full size, without memory for its tensors."""
    arms = distinct_arms(plan(name, "paper", coco) for name in SHIPPED)
    assert len(arms) > 50
    for trial in arms:
        heads = on_meta(trial.detector).heads
        assert len(heads) == trial.detector.k, trial.name


def test_every_distinct_arm_takes_two_steps(tmp_path):
    import torch

    from codetr.data import build_loader, open_dataset
    from codetr.training import StepReport, TrainingState, train_epoch

    folder = make_digits(tmp_path / "digits", train_images=4, val_images=1, size=64)
    arms = distinct_arms(plan(name, "laptop", folder, REDUCED) for name in SHIPPED)
    assert len(arms) > 40
    for trial in arms:
        data = DataConfig(path=folder, short_sides=(), crop=False, flip=0)
        images = open_dataset(data, "train", seed=0, masks=trial.detector.needs_masks)
        state = TrainingState.start(
            trial.detector,
            # Without decay, which moves parameters that no loss reaches.
            trial.training.model_copy(update={"warmup_steps": 0, "weight_decay": 0.0}),
            data,
            images.classes,
            seed=0,
            steps_per_epoch=2,
            device=torch.device("cpu"),
            class_images=images.table.class_images().tolist(),
        )
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        reports: list[StepReport] = []
        train_epoch(
            state,
            build_loader(images, 2, training=True, epoch=1),
            on_step=reports.append,
        )
        assert len(reports) == 2, trial.name
        assert all(math.isfinite(report.loss) for report in reports), trial.name
        moved = {
            part_of(name)
            for name, value in state.model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        # Without losses of its head, an arm has the coarsest level for its positives alone, if any.
        idle = set() if trial.detector.head_losses else {"heads.0", "adapter"}
        assert {part_of(name) for name in before} - moved <= idle, trial.name
