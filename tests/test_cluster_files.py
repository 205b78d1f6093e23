"""The cluster files, through Ray's own preparation and schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[1] / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_accepts(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_says_what_forgetting_costs_and_how_to_stop(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any("ray down" in line for line in header)
    assert any("Forgotten" in line for line in header)
