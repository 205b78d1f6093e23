"""What training computes, pinned: a change of it is a change of every trial's identity.

On purpose? Raise ``orchestrator.plan.IDENTITY_VERSION``, and pin the new numbers, from the
repository's root: ``PYTHONPATH=.:tests python tests/orchestrator/test_identity_version.py``
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tiny_training import FASTER_RCNN, start, tiny_detector, tiny_training

from codetr.config import DataConfig
from codetr.data import build_loader, open_dataset
from codetr.data.digits import make_digits
from codetr.training import train_epoch
from orchestrator.plan import IDENTITY_VERSION

PINNED = Path(__file__).with_suffix(".json")
TOLERANCE = 2e-3
"""Relative: other machines sum in another order, and may read a pixel as one more or less."""


def short_training(folder: Path) -> dict[str, float]:
    """Every loss of two steps of a detector with two heads, from images that are cropped, mirrored
    and resized as by default, means over the steps; and how far the weights have gone."""
    make_digits(folder, train_images=8, val_images=1, size=64)
    dataset = open_dataset(DataConfig(path=folder, short_sides=(48, 64)), "train", seed=7)
    training = tiny_training(learning_rate=1e-3)
    state = start(tiny_detector("atss", FASTER_RCNN, num_classes=10), training, steps=2)
    loader = build_loader(dataset, 4, training=True, seed=7, epoch=1)
    before = [weight.detach().clone() for weight in state.model.parameters()]
    report = train_epoch(state, loader)
    after = [weight.detach() for weight in state.model.parameters()]
    moved = sum(float((b - a).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
    whole = {"total": report.total, "gradient_norm": report.gradient_norm, "moved": moved}
    return {**whole, **report.losses}


def test_the_same_configuration_trains_as_it_did_under_this_identity_version(tmp_path):
    pinned = json.loads(PINNED.read_text())
    measured = short_training(tmp_path)
    told = (
        "training computes other numbers than those pinned for identity version "
        f"{pinned['version']}: results on disk would count as those of trials that are now "
        f"trained differently. If that is on purpose: {__doc__.partition('?')[2].strip()}"
    )
    assert measured == pytest.approx(pinned["losses"], rel=TOLERANCE), told
    assert pinned["version"] == IDENTITY_VERSION, "raised without any change of the numbers?"


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        found = {name: round(value, 6) for name, value in short_training(Path(place)).items()}
    PINNED.write_text(json.dumps({"version": IDENTITY_VERSION, "losses": found}, indent=1) + "\n")
