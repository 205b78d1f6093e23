"""Backbone and neck of official checkpoints at full size, and of the recorded small ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_backbones import read

from codetr.backbones import Swin, Vit
from codetr.config import DetectorConfig, parse
from codetr.detector import CoDETR
from codetr.zoo.backbone_names import (
    PREFIXES,
    backbone_from_official,
    backbone_names,
    backbone_to_official,
    derived_buffers,
)

GOLDEN = Path(__file__).parents[1] / "golden"

MODELS = {
    "co_deformable_r50": {"backbone": {"name": "resnet50"}},
    "co_dino_swin_l": {
        "backbone": {"name": "swin_large", "stages": [1, 2, 3, 4]},
        "transformer": {"levels": 5},
    },
    "co_dino_vit_l": {"backbone": {"name": "eva02_large"}, "transformer": {"levels": 5}},
}


def config_of(model: str) -> DetectorConfig:
    settings = MODELS[model]
    backbone = {**settings["backbone"], "pretrained": False}
    return parse(DetectorConfig, {**settings, "backbone": backbone}, "test")


def official_shapes(model: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of backbone and neck in the official checkpoint."""
    shapes = {}
    for line in (GOLDEN / f"keys_full_{model}.txt").read_text().splitlines():
        name, shape, dtype, *_ = line.split("\t")
        if name.startswith(PREFIXES):
            sizes = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
            shapes[name] = (sizes, dtype)
    return shapes


@pytest.mark.parametrize("model", MODELS)
def test_every_official_name_and_shape_both_ways(model: str) -> None:
    config, official = config_of(model), official_shapes(model)
    assert len(official) > 150
    with torch.device("meta"):
        state = CoDETR(config).state_dict()
    ours = {name: value for name, value in state.items() if name.startswith(PREFIXES)}

    exported = backbone_to_official(ours, config) | derived_buffers(config)
    kinds = {n: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for n, v in exported.items()}
    assert kinds == official

    empty = {name: torch.empty(shape, device="meta") for name, (shape, _) in official.items()}
    imported = backbone_from_official(empty, config)
    assert {n: v.shape for n, v in imported.items()} == {n: v.shape for n, v in ours.items()}


@pytest.mark.parametrize("model", MODELS)
def test_no_two_names_are_one(model: str) -> None:
    names = backbone_names(config_of(model))
    assert len(set(names.values())) == len(names) > 10


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_small_network_round_trips_to_the_bit(kind: str) -> None:
    golden = read(kind)
    sizes = golden["config"]
    if kind == "swin":
        backbone = {"name": "swin_tiny", "stages": [1, 2, 3, 4], "depths": sizes["depths"]}
    else:
        backbone = {
            "name": "eva02_large",
            "depth": sizes["depth"],
            "global_every": sizes["depth"],
            "position_grid": 4,
        }
    backbone |= {"width": sizes["embed_dim"], "window": sizes["window_size"], "pretrained": False}
    settings = {
        "backbone": backbone,
        "transformer": {"levels": 5, "embed_dim": 32},
    }
    config = parse(DetectorConfig, settings, "test")
    official = {f"backbone.{name}": value for name, value in golden["state_dict"].items()}
    official |= {f"neck.{n}": value for n, value in golden.get("neck_state_dict", {}).items()}
    official |= derived_buffers(config)

    ours = backbone_from_official(official, config)
    body = (Swin if kind == "swin" else Vit)(config.backbone)
    body.load_state_dict(
        {n.removeprefix("backbone."): v for n, v in ours.items() if n.startswith("backbone.")}
    )
    state = {f"backbone.{name}": value for name, value in body.state_dict().items()}
    state |= {name: value for name, value in ours.items() if name.startswith("neck.")}
    again = backbone_to_official(state, config) | derived_buffers(config)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], official[name]) for name in official)


def test_derived_buffers_are_the_recorded_ones() -> None:
    """To the bit: an export of them is the file that was imported."""
    swin = {"name": "swin_tiny", "window": 5, "pretrained": False}
    index = derived_buffers(parse(DetectorConfig, {"backbone": swin}, "test"))
    recorded = read("swin")["index"]
    assert len(index) == 2 + 2 + 6 + 2
    assert all(torch.equal(value, recorded) for value in index.values())
    assert all(value.dtype == recorded.dtype for value in index.values())

    vit = {"name": "eva02_large", "window": 3, "pretrained": False}
    rope = derived_buffers(parse(DetectorConfig, {"backbone": vit}, "test"))
    recorded = read("vit")["rope"]
    for name, value in rope.items():
        assert torch.equal(value, recorded[name[-3:]]), name
    rope_of_blocks = {name.split(".")[2] for name in rope if ".blocks." in name}
    assert rope_of_blocks == {str(n) for n in range(24) if n % 4 != 3}


def test_rotations_of_a_whole_canvas_are_dropped() -> None:
    """Those of the LVIS model, for images of 1536 pixels, are those of our global blocks."""
    vit = {"name": "eva02_large", "window": 16, "global_every": 3, "pretrained": False}
    config = parse(DetectorConfig, {"backbone": vit}, "test")
    owners = ["rope_glb", *(f"blocks.{n}.attn.rope" for n in range(2, 24, 3))]
    canvas = {
        f"backbone.{owner}.freqs_{kind}": torch.ones(96 * 96, 64)
        for owner in owners
        for kind in ("cos", "sin")
    }
    assert not canvas.keys() & derived_buffers(config).keys()
    assert backbone_from_official(canvas | derived_buffers(config), config) == {}


@pytest.mark.parametrize("model", ["co_dino_swin_l", "co_dino_vit_l"])
def test_unknown_names_are_listed(model: str) -> None:
    config = config_of(model)
    foreign = {"backbone.layers.9.x": torch.ones(1), "neck.fpn": torch.ones(1)}
    with pytest.raises(KeyError, match=r"2 names .*layers\.9\.x.*neck\.fpn"):
        backbone_from_official(foreign, config)
    with pytest.raises(KeyError, match=r"2 names"):
        backbone_to_official(foreign, config)
