"""Checkpoint files: what is written, what is refused, and that no code of theirs runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from official_files import small, write
from tiny_training import start, tiny_detector, tiny_training

from codetr import CoDETR
from codetr.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from codetr.config import ConfigError
from codetr.data import Classes, DataError
from codetr.data.annotations import read_annotations
from codetr.structures import ImageBatch
from codetr.weights import load_weights
from codetr.zoo import from_official
from codetr.zoo.files import coco_classes, convert, export


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The recorded Co-DINO of five classes, as the original saves it in a training."""
    return write(tmp_path / "official.pth", small(), optimizer={"state": {}}, epoch=12)


def test_weights_come_back_with_configuration_and_classes(official: Path, tmp_path: Path) -> None:
    report = convert(official, tmp_path / "model.safetensors")
    assert report.tensors == len(small())
    assert report.dropped == {"optimizer": "state of a training"}
    loaded = load_weights(tmp_path / "model.safetensors")
    assert loaded.detector == report.weights.detector
    assert loaded.data == report.weights.data
    assert loaded.classes == Classes(("a", "b", "c", "d", "e"), (1, 2, 3, 4, 5))
    for name, value in report.weights.model.items():
        assert torch.equal(loaded.model[name], value)
    assert load_weights(tmp_path).source.endswith("model.safetensors")  # the folder will do


def test_the_file_detects_as_the_official_state_dict(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "model.safetensors")
    model = CoDETR.from_checkpoint(tmp_path / "model.safetensors")
    assert model.classes is not None
    assert model.classes.names == ("a", "b", "c", "d", "e")
    batch = ImageBatch(torch.randn(1, 3, 64, 96), [(64, 96)])
    (ours,), (direct,) = model(batch), from_official(small())(batch)
    assert torch.equal(ours.boxes, direct.boxes)
    assert torch.equal(ours.scores, direct.scores)
    assert len(ours) > 0


@pytest.mark.parametrize("detector", ["co_dino", "co_deformable"])
def test_there_and_back_again_to_the_bit(detector: str, tmp_path: Path) -> None:
    convert(write(tmp_path / "official.pth", small(detector)), tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again["meta"]["CLASSES"] == ("a", "b", "c", "d", "e")
    assert again["state_dict"].keys() == small(detector).keys()
    for name, value in small(detector).items():
        assert torch.equal(again["state_dict"][name], value), name


def test_a_training_becomes_weights_without_its_optimizer(tmp_path: Path) -> None:
    state = start(tiny_detector("atss"), tiny_training(), steps=1)
    save_checkpoint(state.checkpoint(), tmp_path / "checkpoint.pt")
    report = convert(tmp_path, tmp_path / "out" / "small.safetensors")
    assert report.weights.classes == load_checkpoint(tmp_path).classes
    model = CoDETR.from_checkpoint(tmp_path / "out" / "small.safetensors")
    for name, value in load_checkpoint(tmp_path).model.items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="the official implementation has no such detector"):
        export(tmp_path, tmp_path / "small.pth")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_bare_state_dict_will_do(wrapped: bool, tmp_path: Path) -> None:
    state = OrderedDict(small())
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"5 classes and does not name them: .*--classes"):
        convert(tmp_path / "bare.pth", tmp_path / "model.safetensors")
    annotations = write_annotations(tmp_path, 5)
    convert(tmp_path / "bare.pth", tmp_path / "model.safetensors", annotations=annotations)
    assert load_weights(tmp_path / "model.safetensors").classes.category_ids == (2, 4, 6, 8, 10)


def write_annotations(folder: Path, classes: int) -> Path:
    path = folder / f"classes-{classes}.json"
    categories = [{"id": 2 * n, "name": f"thing {n}"} for n in range(1, classes + 1)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return path


def test_another_number_of_classes_says_both(official: Path, tmp_path: Path) -> None:
    annotations = write_annotations(tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"official.pth has 5 classes, but .*-6.json has 6"):
        convert(official, tmp_path / "model.safetensors", annotations=annotations)
    short = write(tmp_path / "short.pth", small(), meta={"CLASSES": ("a", "b")})
    with pytest.raises(CheckpointError, match="has 5 classes, but its own list has 2"):
        convert(short, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


STERO, STEREO = "speaker_(stero_equipment)", "speaker_(stereo_equipment)"


def lvis(folder: Path, *names: str) -> Path:
    path = folder / "lvis_v1_val.json"
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return path


def test_lvis_and_the_originals_list_spell_one_class_differently(tmp_path: Path) -> None:
    """``lvis_v1_val.json`` and ``LVISV1Dataset.CLASSES``."""
    annotations = lvis(tmp_path, "log", "lollipop", STERO, "loveseat", "magazine")
    meta = {"CLASSES": ("log", "lollipop", STEREO, "loveseat", "magazine")}
    file = write(tmp_path / "x.pth", small(), meta=meta)
    out = tmp_path / "model.safetensors"
    for given in (None, annotations):
        convert(file, out, annotations=given)
        classes = load_weights(out).classes
        assert classes.names[2] == (STERO if given else STEREO)
        of_file = read_annotations(annotations).classes
        of_file.require_same(classes, "data", "model")
        classes.require_same(of_file, "model", "data")


def test_another_id_another_name_and_one_class_more_differ_still() -> None:
    ours = Classes(("log", STERO, "sofa"), (1, 2, 3))
    for other, said in (
        (
            Classes(("log", STEREO, "sofa"), (1, 2, 4)),
            r"data has 3, .*: 3 'sofa'; model .* 4 'sofa'",
        ),
        (
            Classes(("log", STEREO, "Sofa"), (1, 2, 3)),
            "data has 3, .*: 3 'sofa'; model .* 3 'Sofa'",
        ),
        (
            Classes(("log", "speaker", "sofa"), (1, 2, 3)),
            "2 'speaker_.stero_equipment.'; .*'speaker'",
        ),
        (
            Classes(("log", STEREO), (1, 2)),
            "data has 3, of which only there: 3 'sofa'; model has 2",
        ),
        (Classes(("log", STEREO, "sofa", "x"), (1, 2, 3, 4)), "only there: none; .* 4 'x'"),
    ):
        with pytest.raises(DataError, match=said):
            ours.require_same(other, "data", "model")


def test_an_annotation_file_of_other_classes_does_not_rename_them(tmp_path: Path) -> None:
    """Of as many as the checkpoint has: every label would be wrong, and nothing would tell."""
    annotations = lvis(tmp_path, "a", "b", "d", "c", "e")
    file = write(tmp_path / "x.pth", small())
    with pytest.raises(CheckpointError, match=r"2 of its classes .* the first 'c', .* 3 'd' there"):
        convert(file, tmp_path / "model.safetensors", annotations=annotations)
    assert not (tmp_path / "model.safetensors").exists()
    convert(file, tmp_path / "model.safetensors", annotations=lvis(tmp_path, *"abcde"))


def test_classes_where_mmdetection_3_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", small(), meta={"dataset_meta": {"classes": ("v", *"wxyz")}})
    convert(path, tmp_path / "model.safetensors")
    assert load_weights(tmp_path / "model.safetensors").classes.names == ("v", *"wxyz")


def test_1203_classes_do_not_pass_for_1204() -> None:
    lvis = Classes(tuple(f"n{i}" for i in range(1203)), tuple(range(1, 1204)))
    more = Classes(tuple(f"n{i}" for i in range(1204)), tuple(range(1, 1205)))
    with pytest.raises(DataError, match=r"lvis.json has 1204.*1204 'n1203'.*model has 1203"):
        more.require_same(lvis, "lvis.json", "model")


def test_cocos_classes_have_cocos_ids() -> None:
    classes = coco_classes()
    known = dict(zip(classes.names, classes.category_ids, strict=True))
    assert len(known) == 80
    # From instances_val2017.json: the gaps are at 12, 26, 29, 30, 45, 66, 68, 69, 71, 83.
    some = {"person": 1, "stop sign": 13, "toothbrush": 90, "bottle": 44, "tv": 72, "book": 84}
    assert some.items() <= known.items()
    gaps = {*range(1, 91)} - {*classes.category_ids}
    assert gaps == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


# ------------------------------------------------------------------------------ files that are none


class Malicious:
    """Whoever unpickles it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.check_call, ([sys.executable, "-c", f"open({str(self.mark)!r}, 'w')"],)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_code_of_a_file_runs(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    content = {"state_dict": small(), "hook": Malicious(mark)}
    path = tmp_path / "evil.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "model.safetensors")
    assert ".check_call' beside its tensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert not (tmp_path / "model.safetensors").exists()
    torch.load(path, weights_only=False)  # the file does what it is said to
    assert mark.exists()


def test_a_file_with_a_loggers_object_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "logger.pth", small(), message_hub=Path("x"))
    with pytest.raises(CheckpointError, match=r"'pathlib[.\w]*' beside its tensors.*state_dict"):
        convert(path, tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["f8", "f4", "i8", "b1"])
def test_numbers_of_numpy_are_allowed(kind: str, tmp_path: Path) -> None:
    number = np.ones(1, kind)[0]
    path = write(tmp_path / "numbers.pth", small(), optimizer={"lr": number}, best=number)
    convert(path, tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 40, b"PK\x03\x04half"])
def test_no_checkpoint_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth is damaged, or no checkpoint") as caught:
        convert(tmp_path / "x.pth", tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_a_single_flipped_bit(official: Path, tmp_path: Path) -> None:
    content = bytearray(official.read_bytes())
    content[len(content) // 2] ^= 1
    official.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: checksums differ"):
        convert(official, tmp_path / "model.safetensors")


def test_a_truncated_and_a_missing_file(official: Path, tmp_path: Path) -> None:
    official.write_bytes(official.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(official, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*none.pth: No such file"):
        convert(tmp_path / "none.pth", tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"a": 1}, {"state_dict": [1]}])
def test_content_that_is_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth(:| holds)"):
        convert(tmp_path / "x.pth", tmp_path / "model.safetensors")


def test_damaged_weights(official: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    convert(official, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load_weights(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load_weights(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*gone"):
        load_weights(tmp_path / "gone.safetensors")


def test_safetensors_of_somebody_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="weights without a detector"):
        load_weights(tmp_path / "x.safetensors")


def test_an_official_file_in_the_place_of_ours_points_to_convert(official: Path) -> None:
    with pytest.raises(CheckpointError, match="codetr convert"):
        CoDETR.from_checkpoint(official)


# --------------------------------------------------------------------------------- writing it whole


def test_an_earlier_file_survives_a_failure(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "model.safetensors"
    convert(official, out)
    before = out.read_bytes()

    def full(_tensors: object, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codetr.weights.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert(official, out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_names_of_what_is_written(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name it model\.safetensors"):
        convert(official, tmp_path / "model.pth")
    convert(official, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="the file to convert"):
        convert(tmp_path / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"name it back\.pth"):
        export(tmp_path / "model.safetensors", tmp_path / "back.pt")
