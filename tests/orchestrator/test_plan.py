import os
import subprocess
import sys
from pathlib import Path

import pytest

from codetr.config import ConfigError, DataConfig, DetectorConfig, TrainingConfig
from codetr.data import DataError
from orchestrator.experiment import load_experiment
from orchestrator.facts import DataFacts
from orchestrator.plan import Options, Plan, Trial, make_plan, slug


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr("orchestrator.machine.local_cpus", lambda: 2)
    monkeypatch.setattr("orchestrator.machine.local_gpus", lambda: 0)


def plan(**options) -> Plan:
    return make_plan(load_experiment("ablation-k"), Options(**options))


def ids(**options) -> list[str]:
    return [trial.id for trial in plan(**options).trials]


def test_the_default_is_the_laptop_profile_and_says_why():
    made = plan()
    assert made.profile == "laptop"
    assert "no GPU" in made.why
    assert "--profile paper" in made.why
    assert [trial.detector.k for trial in made.trials] == [0, 1, 2]
    for trial in made.trials:
        assert trial.steps_per_epoch == 2000 // trial.training.batch_size
        assert trial.steps == trial.steps_per_epoch * trial.training.epochs
    assert {trial.detector.num_classes for trial in made.trials} == {10}


def test_a_gpu_and_data_choose_the_paper(coco_folder, monkeypatch):
    monkeypatch.setattr("orchestrator.machine.local_gpus", lambda: 8)
    monkeypatch.setattr("orchestrator.machine.local_cpus", lambda: 64)
    chosen = {"settings": ("batch_size=8",)}
    assert plan(data=str(coco_folder), **chosen).profile == "paper"
    assert plan(**chosen).profile == "laptop"
    assert plan(data=str(coco_folder), profile="laptop", **chosen).profile == "laptop"


@pytest.mark.parametrize(
    ("gpus_and_cpus", "batch", "expected"),
    [
        ((8, 64), 16, (8, 4)),
        ((2, 64), 16, (2, 4)),
        ((6, 12), 16, (4, 3)),
        ((1, 2), 16, (1, 2)),
        ((8, 64), 6, (6, 4)),
    ],
)
def test_workers_are_fitted_to_the_machine(
    gpus_and_cpus, batch, expected, coco_folder, monkeypatch
):
    for name, count in zip(("gpus", "cpus"), gpus_and_cpus, strict=True):
        monkeypatch.setattr(f"orchestrator.machine.local_{name}", lambda count=count: count)
    made = plan(profile="paper", data=str(coco_folder), settings=(f"batch_size={batch}",))
    assert (made.resources.workers, made.resources.cpus_per_worker) == expected


def test_the_paper_profile_does_not_fall_back_to_cpus_unasked(coco_folder):
    options = {"profile": "paper", "data": str(coco_folder), "settings": ("batch_size=4",)}
    with pytest.raises(ConfigError, match="--gpus-per-worker 0"):
        plan(**options)
    assert plan(**options, gpus_per_worker=0).resources.workers == 2


def test_settings_that_came_later_rename_no_trial():
    """What was trained before is found again: this was the identity before there was ``ema``."""

    def identity(**training) -> str:
        return Trial(
            arm="x",
            seed=0,
            detector=DetectorConfig.model_validate({"heads": ["atss", "mask_rcnn"]}),
            training=TrainingConfig.model_validate(training),
            data=DataConfig(),
            facts=DataFacts(classes=10, train_images=2, val_images=1, fingerprint="f"),
        ).id

    assert identity() == identity(ema=False) == "405e1a2dbd"
    assert len({identity(), identity(ema=True), identity(ema=0.9, ema_warmup=7)}) == 3
    assert len({*ids(), *ids(settings=("ema=true",)), *ids(settings=("ema=0.9",))}) == 9


def test_arms_times_seeds():
    made = plan(seeds=(3, 5))
    assert [(t.detector.k, t.seed) for t in made.trials] == [
        (k, seed) for k in (0, 1, 2) for seed in (3, 5)
    ]
    assert len({t.name for t in made.trials}) == len({t.id for t in made.trials}) == 6


def test_identity_is_what_is_learned():
    base = ids()
    assert base == ids(workers=2, name="other", output=Path("/elsewhere"))
    assert base == ids(settings=("loader_workers=3", "engine=pycocotools"))
    for change in ("lambda_1=0.5", "epochs=99", "learning_rate=2e-7", "train_images=100"):
        assert not set(base) & set(ids(settings=(change,))), change
    assert not set(base) & set(ids(seeds=(1,)))


def test_a_trial_keeps_its_identity_from_version_to_version():
    assert ids() == ["5a51eeb655", "1d5ae49750", "caea7aca35"]


def test_identity_tells_whether_heads_are_measured_on_their_own():
    """Or the trial of another experiment, which did not, would be taken for this one's."""
    plain, branches = ids(), ids(settings=("evaluate_branches=true",))
    assert plain == ids(settings=("evaluate_branches=false",))
    assert branches[0] == plain[0]  # K = 0 has none
    assert not set(branches[1:]) & set(plain)


def test_identity_is_the_same_in_another_process():
    code = (
        "from orchestrator.experiment import load_experiment as l\n"
        "from orchestrator.plan import *\n"
        "print(*[t.id for t in make_plan(l('ablation-k'), Options()).trials])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ids(), done.stderr


def test_identity_follows_the_data_not_its_place(coco_folder, tmp_path):
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(coco_folder, copied)
    small = {"settings": ("batch_size=4",)}
    before = ids(data=str(coco_folder), **small)
    assert before == ids(data=str(copied), **small)
    annotations = copied / "annotations" / "instances_train.json"
    annotations.write_text(annotations.read_text() + " ")
    from orchestrator import facts

    facts._coco_facts.cache_clear()
    assert not set(before) & set(ids(data=str(copied), **small))


def test_a_trial_survives_json():
    trial = plan().trials[2]
    assert Trial.model_validate(trial.model_dump(mode="json")) == trial
    assert Trial.model_validate_json(trial.model_dump_json()).id == trial.id


def test_profile_settings_reach_heads_that_arms_only_name():
    rcnn = plan().trials[2].detector.heads[1]
    assert rcnn.rcnn.fc_dim < 1024  # the default
    changed = plan(settings=("faster_rcnn.rcnn.fc_dim=32",)).trials[2].detector.heads[1]
    assert changed.rcnn.fc_dim == 32
    assert changed.rcnn.samples == rcnn.rcnn.samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ("epochs=x",)}, "--set: training: epochs"),
        ({"settings": ("heads=[atsss]",)}, "did you mean 'atss'"),
        ({"settings": ("heads=atss",)}, "heads must be a list"),
        ({"settings": ("heads=[atss]",)}, "are the same trial"),
        ({"settings": ("num_classes=7",)}, "the data has 10 classes"),
        ({"settings": ("levels=2",)}, "fewer than the 3 backbone.stages"),
        ({"settings": ("layer_decay=0.8",)}, "'tiny' is none: set training.layer_decay=1"),
        ({"settings": ("train_images=4",)}, "do not fill one batch"),
        ({"seeds": (1, 1)}, "are the same trial"),
        ({"seeds": (-1,)}, "seeds start at 0"),
        ({"workers": 4}, "this machine has 2"),
        ({"gpus_per_worker": 1}, "this machine has 0"),
        ({"workers": 2, "settings": ("batch_size=5",)}, "cannot be shared evenly"),
        ({"name": "../up"}, "--name ../up"),
        ({"profile": "paper"}, "give --data DIR"),
    ],
)
def test_mistakes_are_one_clear_line(options, message):
    with pytest.raises(ConfigError) as caught:
        plan(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def pretrained(tmp_path):
    """A K = 1 detector of ablation-k's sizes, for other classes."""
    import torch

    from codetr.data import Classes
    from codetr.detector import CoDETR
    from codetr.weights import Weights, save_weights

    config = plan().trials[1].detector.model_copy(update={"num_classes": 4})
    torch.manual_seed(0)
    weights = Weights(
        CoDETR(config).state_dict(), config, DataConfig(), Classes(tuple("abcd"), (1, 2, 3, 4))
    )
    save_weights(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def started(file: Path, *settings: str) -> Trial:
    """The trial of ablation-k's second arm that starts from there."""
    experiment = load_experiment("ablation-k")
    arm = "K=1 ATSS"
    alone = experiment.model_copy(update={"arms": {arm: experiment.arms[arm]}})
    options = Options(settings=(f"start_from={file}", *settings))
    return make_plan(alone, options).trials[0]


def test_weights_to_start_from_are_known_by_their_content(pretrained, tmp_path, monkeypatch):
    trial = started(pretrained)
    assert trial.training.start_from == pretrained
    assert trial.id not in ids()
    assert Trial.model_validate_json(trial.model_dump_json()).id == trial.id
    moved = tmp_path / "elsewhere" / "model.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(pretrained.read_bytes())
    assert started(moved).id == trial.id
    assert started(moved.parent).id == trial.id  # the folder will do
    monkeypatch.chdir(moved.parent)
    relative = started(Path("model.safetensors"))
    assert relative.id == trial.id
    assert relative.training.start_from == moved  # workers run elsewhere
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1  # a bit of the last tensor
    moved.write_bytes(content)
    assert started(moved).id != trial.id


def test_weights_that_do_not_fit_start_nothing(pretrained, tmp_path):
    with pytest.raises(ConfigError, match=r"training.start_from: .*gone: no such file or folder"):
        started(tmp_path / "gone")
    from codetr.checkpoint import CheckpointError

    with pytest.raises(CheckpointError, match=r"2 auxiliary head\(s\) .* has 1 auxiliary head"):
        started(pretrained, "heads=[atss, faster_rcnn]")
    with pytest.raises(CheckpointError, match=r"of another shape: .*ffn"):
        started(pretrained, "ffn_dim=40")
    with pytest.raises(CheckpointError, match=r"has 0 auxiliary head\(s\) \[\], but .* has 1 "):
        started(pretrained, "heads=[]")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"text.safetensors is damaged"):
        started(tmp_path / "text.safetensors")


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        plan(data=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="annotations"):
        plan(data=str(tmp_path / "empty"))


def test_planning_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from orchestrator.experiment import load_experiment\n"
        "from orchestrator.plan import Options, make_plan\n"
        "import orchestrator.console\n"
        "make_plan(load_experiment('ablation-k'), Options())\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "expected"), [("K = 1 (ATSS)", "k-1-atss"), ("a+b", "a-b"), ("-A-", "a")]
)
def test_slugs(text, expected):
    assert slug(text) == expected


def test_settings_that_came_later_leave_identities_alone():
    """The ids of this plan before there were any of them."""
    before = ["5a51eeb655", "1d5ae49750", "caea7aca35"]
    assert ids(seeds=(0,)) == before
    unused = ("jitter.canvas=96", "copy_paste.shapes=boxes")
    assert ids(seeds=(0,), settings=unused) == before
    for used in (
        ("jitter.enabled=true",),
        ("jitter.enabled=true", "jitter.canvas=96"),
        ("jitter.enabled=true", "copy_paste.enabled=true"),
        ("repeat_threshold=0.01",),
        ("federated.enabled=true",),
        ("federated.enabled=true", "federated.classes=7"),
    ):
        before += ids(seeds=(0,), settings=used)
    assert len(set(before)) == 3 * 7
