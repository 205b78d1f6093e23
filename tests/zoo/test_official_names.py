"""Names of official checkpoints at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import codetr.zoo
from codetr.config import DetectorConfig, parse, read_yaml
from codetr.detector import CoDETR
from codetr.zoo.official import from_official_names, to_official_names

GOLDEN = Path(__file__).parents[1] / "golden"
CO_DINO_R50 = Path(codetr.zoo.__file__).parent / "co-dino-5scale-r50.yaml"

CO_DEFORMABLE: dict[str, Any] = {
    "heads": ["faster_rcnn", "atss"],
    "positive_queries": {"official_defects": True},
}


def official_shapes(keys: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in an official checkpoint."""
    shapes = {}
    for line in keys.read_text().splitlines():
        name, shape, *_ = line.split("\t")
        shapes[name] = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    return shapes


def full_size(settings: dict[str, Any]) -> CoDETR:
    config = parse(DetectorConfig, settings, "test")
    backbone = config.backbone.model_copy(update={"pretrained": False})
    with torch.device("meta"):
        return CoDETR(config.model_copy(update={"backbone": backbone}))


@pytest.mark.parametrize(
    ("settings", "keys", "millions"),
    [
        (CO_DEFORMABLE, "keys_full_co_deformable_r50.txt", 65.13),
        (read_yaml(CO_DINO_R50), "keys_full_co_dino_r50.txt", 65.20),
    ],
    ids=["co-deformable-r50", "co-dino-r50"],
)
def test_full_size_detector_has_the_official_tensors(
    settings: dict[str, Any], keys: str, millions: float
) -> None:
    """Every name and shape, none left over, in both directions; frozen parameters too."""
    model = full_size(settings)
    ours, official = model.state_dict(), official_shapes(GOLDEN / keys)
    assert {n: tuple(v.shape) for n, v in to_official_names(ours, model.config).items()} == official

    empty = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    renamed = from_official_names(empty, model.config)
    assert {n: v.shape for n, v in renamed.items()} == {n: v.shape for n, v in ours.items()}

    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    lines = (GOLDEN / keys).read_text().splitlines()
    listed = {line.split("\t")[0] for line in lines if "frozen" in line}
    assert set(to_official_names(frozen, model.config)) == listed
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_round_trip_keeps_every_value() -> None:
    """Distinct values for distinct tensors come back to their own names."""
    config = full_size(read_yaml(CO_DINO_R50)).config
    names = official_shapes(GOLDEN / "keys_full_co_dino_r50.txt")
    state = {name: torch.tensor(number) for number, name in enumerate(names)}
    assert to_official_names(from_official_names(state, config), config) == state


def test_denoising_is_no_part_of_inference() -> None:
    model = full_size(read_yaml(CO_DINO_R50))
    inference = {id(p) for p in model.inference_parameters()}
    training_only = {n for n, p in model.named_parameters() if id(p) not in inference}
    parts = {name.split(".")[0] for name in training_only}
    assert parts == {"denoising", "adapter", "heads", "positive_queries"}
