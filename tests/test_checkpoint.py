"""What a checkpoint keeps, and how it fails."""

from __future__ import annotations

import re
import resource
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_training import CLASSES, start, tiny_batch, tiny_detector, tiny_training

from codetr.checkpoint import (
    FILE_NAME,
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from codetr.config import ConfigError, ResNetConfig
from codetr.cost import Cost
from codetr.data import Classes
from codetr.training import train_epoch


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """After one step, so that the optimiser has a state."""
    state = start(tiny_detector("atss", two_stage=True), tiny_training(), steps=1)
    train_epoch(state, [tiny_batch([1, 2], [2, 1])])
    state.metrics = {"AP": np.float64(0.25), "AP_large": float("nan")}
    return state.checkpoint()


@pytest.fixture
def path(tmp_path, checkpoint):
    save_checkpoint(checkpoint, tmp_path / FILE_NAME)
    return tmp_path / FILE_NAME


def assert_equal(one, other):
    """Nested dictionaries and lists, down to the bits of tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_everything_comes_back(path, checkpoint):
    loaded = load_checkpoint(path)
    for name in ("optimizer", "schedule"):
        assert_equal(getattr(loaded, name), getattr(checkpoint, name))
    assert_equal(dict(loaded.model), dict(checkpoint.model))
    for name in ("epoch", "step", "seed", "detector", "training", "data", "classes", "cost"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    assert loaded.metrics == pytest.approx({"AP": 0.25, "AP_large": float("nan")}, nan_ok=True)
    assert loaded.cost.seconds > 0
    assert loaded.source == str(path)
    assert load_checkpoint(path.parent).source == str(path)  # the folder will do


def test_lvis_frequencies_come_back(tmp_path, checkpoint):
    classes = replace(CLASSES, frequency=("r", "c", "f"))
    save_checkpoint(replace(checkpoint, classes=classes), tmp_path / "lvis.pt")
    assert load_checkpoint(tmp_path / "lvis.pt").classes == classes


def test_the_model_detects_as_before(path, checkpoint):
    model = build_model(load_checkpoint(path))
    batch, _ = tiny_batch([5], [0])
    original = build_model(checkpoint)
    assert not model.training
    assert_equal([asdict(d) for d in model(batch)], [asdict(d) for d in original(batch)])


def test_a_model_is_built_without_its_pretrained_backbone(checkpoint):
    backbone = ResNetConfig.model_validate(
        checkpoint.detector.backbone.model_dump() | {"pretrained": "/gone/backbone.pth"}
    )
    detector = checkpoint.detector.model_copy(update={"backbone": backbone})
    build_model(replace(checkpoint, detector=detector))


def test_weights_of_another_detector(checkpoint):
    other = replace(checkpoint, detector=tiny_detector("atss"), source="some.pt")
    with pytest.raises(CheckpointError, match=r"some.pt: .*Unexpected key"):
        build_model(other)


# ----------------------------------------------------------------------------------- unusable files


def message(path):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing(tmp_path):
    path = tmp_path / "none.pt"
    assert message(path) == f"cannot read {path}: No such file or directory"
    assert f"{tmp_path}/{FILE_NAME}" in message(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert message(path).startswith(f"{path} is truncated")


def test_a_single_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert message(path) == f"{path} is damaged: checksums differ; use an earlier checkpoint"


@pytest.mark.parametrize("content", [b"", b"epoch: 3\n", bytes(range(256)) * 40])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    text = f"{tmp_path}/file.pt is damaged, or not a checkpoint of codetr"
    assert message(tmp_path / "file.pt") == text


class Foreign:
    """A class of somebody else, whose code must not run."""

    def __reduce__(self):
        return pytest.fail, ("code of a checkpoint ran",)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], Foreign(), {"format": "x"}])
def test_somebody_elses_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert re.search(r"other.pt is .*not a checkpoint", message(tmp_path / "other.pt"))


def test_a_setting_of_another_version_is_named(path):
    content = torch.load(path, weights_only=True)
    content["training"]["swa"] = 0.9
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"checkpoint.pt: training: unknown key 'swa'"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------ writing fails


def test_a_full_disk_leaves_the_previous_checkpoint(path, checkpoint):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(replace(checkpoint, epoch=2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]
    assert load_checkpoint(path).epoch == 1


def test_a_folder_that_cannot_be_made(tmp_path, checkpoint):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(checkpoint, tmp_path / "file" / "checkpoint.pt")


def test_an_interrupted_write_leaves_the_previous_checkpoint(path, checkpoint, monkeypatch):
    def interrupted(_content, file):
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(replace(checkpoint, epoch=2), path)
    assert load_checkpoint(path).epoch == 1
    assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]


def test_costs_add_up():
    total = Cost(10, 20, 0, 500) + Cost(1, 2, 3, 400)
    assert total == Cost(11, 22, 3, 500)


def test_other_classes_are_refused_by_both_names(checkpoint):
    with pytest.raises(ValueError, match=r"'fish'.*'bird'"):
        checkpoint.classes.require_same(
            Classes(("cat", "dog", "bird"), (1, 2, 8)), checkpoint.source, "val.json"
        )
