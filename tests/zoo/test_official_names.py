"""Names of official checkpoints at full size."""

from __future__ import annotations

from pathlib import Path

import torch

from codetr.config import DetectorConfig, parse
from codetr.detector import CoDETR
from codetr.zoo.official import from_official_names, to_official_names

KEYS = Path(__file__).parents[1] / "golden" / "keys_full_co_deformable_r50.txt"


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the official Co-Deformable-DETR R50 checkpoint."""
    shapes = {}
    for line in KEYS.read_text().splitlines():
        name, shape, *_ = line.split("\t")
        shapes[name] = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    return shapes


def test_full_size_co_deformable_r50_has_the_official_tensors() -> None:
    """Every name and shape, none left over, in both directions; frozen parameters too."""
    settings = {
        "backbone": {"pretrained": False},
        "heads": ["faster_rcnn", "atss"],
        "positive_queries": {"official_defects": True},
    }
    with torch.device("meta"):
        model = CoDETR(parse(DetectorConfig, settings, "test"))
    ours, official = model.state_dict(), official_shapes()
    assert {n: tuple(v.shape) for n, v in to_official_names(ours, model.config).items()} == official

    empty = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    renamed = from_official_names(empty, model.config)
    assert {n: v.shape for n, v in renamed.items()} == {n: v.shape for n, v in ours.items()}

    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    listed = {line.split("\t")[0] for line in KEYS.read_text().splitlines() if "frozen" in line}
    assert set(to_official_names(frozen, model.config)) == listed
