"""A small laboratory, and what comes of its experiment when nothing disturbs it."""

from __future__ import annotations

import shutil

import pytest
from fault_laboratory import EXPERIMENT, LONG, LONG_STEPS, FaultLaboratory, Outcome

from codetr.data.digits import make_digits


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    FaultLaboratory(folder, folder / "runs").prepare(EXPERIMENT)
    return folder


@pytest.fixture(scope="session")
def undisturbed(folder) -> Outcome:
    """The table and the weights that every fault must end with, too."""
    laboratory = FaultLaboratory(folder, folder / "undisturbed")
    try:
        code, out = laboratory.run()
        assert code == 0, out
        return laboratory.outcome()
    finally:
        laboratory.clean()


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.yaml").write_text(LONG)
    make_digits(folder / "digits", train_images=4 * LONG_STEPS, val_images=6, size=64)
    return folder


@pytest.fixture(scope="session")
def undisturbed_long(long_folder) -> Outcome:
    """The same of epochs that are long enough to be left in their middle."""
    laboratory = FaultLaboratory(long_folder, long_folder / "undisturbed")
    try:
        code, out = laboratory.run(experiment="long.yaml")
        assert code == 0, out
        return laboratory.outcome("long")
    finally:
        laboratory.clean()


@pytest.fixture
def laboratory(folder, tmp_path):
    laboratory = FaultLaboratory(folder, tmp_path / "runs")
    yield laboratory
    laboratory.clean()
    shutil.rmtree(laboratory.output, ignore_errors=True)
