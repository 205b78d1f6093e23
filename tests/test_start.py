"""Starting from a whole detector's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import CLASSES, FASTER_RCNN, KINDS, MASK_RCNN, start, tiny_batch, tiny_detector
from tiny_training import tiny_training as settings

from codetr.checkpoint import FILE_NAME, CheckpointError, load_checkpoint, save_checkpoint
from codetr.config import DetectorConfig
from codetr.data import Classes
from codetr.start import Start, load_start, new_tensors, shapes
from codetr.training import TrainingState, train_epoch
from codetr.weights import Weights, save_weights

K2 = ("atss", FASTER_RCNN)
FIVE = Classes(tuple("abcde"), (1, 2, 3, 4, 5))


def weights_of(detector: DetectorConfig, classes: Classes = CLASSES) -> Weights:
    """As if trained: each a little different from where the trainings here would begin."""
    state = start(detector, settings(), 1)
    draw = torch.Generator().manual_seed(5)
    model = {
        name: value + 0.01 * torch.rand(value.shape, generator=draw)
        if value.is_floating_point()
        else value
        for name, value in state.model.state_dict().items()
    }
    return Weights(model, detector, state.data, classes, "pretrained")


def with_classes(detector: DetectorConfig, count: int) -> DetectorConfig:
    return detector.model_copy(update={"num_classes": count})


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_detector_has_all_the_weights(kind, tmp_path):
    detector = tiny_detector(*K2, kind=kind)
    weights = weights_of(detector)
    save_weights(weights, tmp_path / "model.safetensors")
    state = start(detector, settings(start_from=tmp_path / "model.safetensors"), 1)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, weights.model[name]), name
    assert state.started == Start(
        str(tmp_path / "model.safetensors"), len(weights.model), (), (3, 3)
    )


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("one-stage", ()),
        ("two-stage", ("retinanet", "fcos", "paa", "gfl", MASK_RCNN)),
        ("dino", K2),
        ("dab", K2),
        ("hybrid", ()),
    ],
)
def test_layers_for_other_classes_are_new_and_nothing_else(kind, heads, tmp_path):
    """Expected names by hand: what classifies, and the embeddings of labels."""
    here = tiny_detector(*heads, kind=kind)
    weights = weights_of(with_classes(here, 5), FIVE)
    save_weights(weights, tmp_path / "model.safetensors")
    state = start(here, settings(start_from=tmp_path / "model.safetensors"), 1)
    untouched = start(here, settings(), 1).model.state_dict()
    assert state.started is not None
    new = set(state.started.new)
    for name, value in state.model.state_dict().items():
        expected = untouched[name] if name in new else weights.model[name]
        assert torch.equal(value, expected), name
    expected_parts = {"decoder.classify"}
    expected_parts |= {"queries.classify"} if here.queries.two_stage else set()
    expected_parts |= {"denoising.label_embedding"} if here.denoising.enabled else set()
    for number, head in enumerate(here.heads):
        rcnn = head.type in ("faster_rcnn", "mask_rcnn")
        names = ["rcnn.cls", "rcnn.reg"] if rcnn else ["cls"]
        names += ["mask.logits"] if head.type == "mask_rcnn" else []
        expected_parts |= {f"heads.{number}.{name}" for name in names}
    assert {_part(name, expected_parts) for name in new} == expected_parts
    assert state.started.classes == (5, 3)
    text = str(state.started)
    assert f"{len(new)} are new" in text
    assert "(5 there, 3 here): decoder.classify.0.weight, decoder.classify.0.bias" in text


def _part(name: str, parts: set[str]) -> str:
    return next((part for part in parts if name.startswith(part)), name)


def test_new_layers_are_those_of_the_seed_and_training_goes_on_from_there(tmp_path):
    """And a resumed training does not need the file."""
    here = tiny_detector(*K2)
    file = tmp_path / "model.safetensors"
    save_weights(weights_of(with_classes(here, 5), FIVE), file)
    training = settings(start_from=file, learning_rate=1e-4, ema=0.9)
    batches = [[tiny_batch([8 * e + 4 * s + i for i in range(4)], [1, 2, 0, 3]) for s in range(2)]
               for e in range(2)]  # fmt: skip
    whole = start(here, training, 2)
    average = whole.evaluated.state_dict()
    for name, value in whole.model.state_dict().items():  # the average begins there, too
        assert torch.equal(value, average[name]), name
    for epoch in batches:
        train_epoch(whole, epoch)
    state = start(here, training, 2)
    train_epoch(state, batches[0])
    save_checkpoint(state.checkpoint(), tmp_path / FILE_NAME)
    file.unlink()
    resumed = start(here, training.model_copy(update={"start_from": None}), 2)
    resumed.restore(load_checkpoint(tmp_path))
    train_epoch(resumed, batches[1])
    for one, other in ((whole.model, resumed.model), (whole.evaluated, resumed.evaluated)):
        values = other.state_dict()
        for name, value in one.state_dict().items():
            assert torch.equal(value, values[name]), name


def test_a_trainings_checkpoint_serves_and_its_average_is_taken(tmp_path):
    here = tiny_detector("atss")
    before = start(here, settings(ema=0.9, learning_rate=1e-3), 2)
    train_epoch(before, [tiny_batch([4 * s + i for i in range(4)], [1, 2, 0, 3]) for s in (0, 1)])
    save_checkpoint(before.checkpoint(), tmp_path / FILE_NAME)
    after: TrainingState = start(here, settings(start_from=tmp_path), 1)
    average, weights = before.evaluated.state_dict(), before.model.state_dict()
    for name, value in after.model.state_dict().items():
        assert torch.equal(value, average[name]), name
    assert any(not torch.equal(value, weights[name]) for name, value in average.items())
    assert after.step == after.epoch == 0


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            tiny_detector("atss"),
            tiny_detector(*K2),
            r"the detector has 2 auxiliary head\(s\) \[atss, faster_rcnn\], but pretrained has 1 "
            r"auxiliary head\(s\): take the same heads, detector.heads=\[atss\]",
        ),
        (tiny_detector(), tiny_detector("atss"), r"has 1 .*but pretrained has 0 auxiliary head"),
        (
            tiny_detector("atss", positive_queries={"enabled": False}),
            tiny_detector("atss"),
            r"has 1 auxiliary head\(s\) \[atss\], but pretrained has 0 transform\(s\) of positive",
        ),
        (tiny_detector(*K2), tiny_detector("atss"), r"has 1 .*but pretrained has 2 auxiliary head"),
        (tiny_detector(kind="dino"), tiny_detector(), r"\d+ unknown: \w+\..*, … and \d+ more"),
        (tiny_detector(*K2), tiny_detector(FASTER_RCNN, "atss"), r"missing: .*unknown: "),
        (
            tiny_detector(),
            tiny_detector(queries={"count": 13}),
            r"of another shape: queries\.\w+\S* \(\(12, \d+\) there, \(13, \d+\) here\)",
        ),
        (tiny_detector(), tiny_detector(kind="dino"), r"missing: "),
        (
            # Not for the number of classes, which is another one besides.
            with_classes(tiny_detector(), 5),
            tiny_detector(transformer={"ffn_dim": 96}),
            r"of another shape: encoder\.\S+ \(\(64, 32\) there, \(96, 32\) here\)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(there, here, message, tmp_path):
    weights = weights_of(there, FIVE if there.num_classes == 5 else CLASSES)
    state = start(here, settings(), 1)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_start(state.model, weights)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("training.start_from: ")
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_shape_that_depends_on_classes_must_fit_where_they_are_as_many():
    detector = tiny_detector("atss")
    weights = weights_of(detector)
    broken = {**weights.model, "decoder.classify.0.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"decoder.classify.0.bias \(\(4,\) there, \(3,\)"):
        new_tensors(detector, replace(weights, model=broken))


def test_shapes_are_those_of_the_detector():
    for kind in KINDS:
        detector = tiny_detector(*K2, kind=kind)
        built = start(detector, settings(), 1).model.state_dict()
        assert shapes(detector) == {name: value.shape for name, value in built.items()}


def test_no_such_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot read .*gone"):
        start(tiny_detector(), settings(start_from=tmp_path / "gone.safetensors"), 1)
