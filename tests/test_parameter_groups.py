"""Learning rates and weight decay of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_backbones import RESNET, VIT
from torch import nn

from codetr.config import ConfigError, DetectorConfig, TrainingConfig, parse
from codetr.detector import CoDETR
from codetr.parameter_groups import layers_above, parameter_groups
from codetr.training import build_optimizer, build_schedule

RECORD = {
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "backbone_multiplier": 1.0,
    "offsets_multiplier": 1.0,
    "layer_decay": 0.8,
    "decay_norms": False,
}
"""The original's settings for its ViT-L."""


def detector(backbone: dict[str, Any]) -> CoDETR:
    settings = {
        "backbone": backbone,
        "transformer": {"embed_dim": 32, "ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1},
        "heads": ["atss"],
    }
    return CoDETR(parse(DetectorConfig, settings, "test"))


def learning(model: nn.Module, **training: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every trained parameter; each is in one group."""
    config = TrainingConfig.model_validate(training)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config)
    rates = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in groups
        for p in group["params"]
    ]
    assert len({group["name"] for group in groups}) == len(groups)
    assert sorted(n for n, _ in rates) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )
    return dict(rates)


# The original counts layers from 0 (embeddings) over 1 .. 24 (blocks) to 25 (all the rest), and
# multiplies by 0.8 ** (25 - layer). By hand, for the 24 blocks of the record model:
BY_HAND = {
    "backbone.body.pos_embed": 0.003777893186295719,
    "backbone.body.patch_embed.proj.weight": 0.003777893186295719,
    "backbone.body.patch_embed.proj.bias": 0.003777893186295719,
    "backbone.body.blocks.0.norm1.weight": 0.004722366482869649,
    "backbone.body.blocks.1.attn.q_proj.bias": 0.005902958103587061,
    "backbone.body.blocks.11.mlp.fc1_g.weight": 0.05497558138880004,
    "backbone.body.blocks.20.mlp.fc2.weight": 0.4096,
    "backbone.body.blocks.21.attn.proj.weight": 0.512,
    "backbone.body.blocks.22.norm2.bias": 0.64,
    "backbone.body.blocks.23.norm1.weight": 0.8,
    "backbone.body.norm.weight": 1.0,
    "neck.levels.0.1.weight": 1.0,
    "encoder.layers.0.attention.sampling_offsets.weight": 1.0,
    "decoder.layers.5.norms.0.weight": 1.0,
    "heads.0.cls.weight": 1.0,
}


def test_the_originals_multipliers_at_full_size() -> None:
    for name, multiplier in BY_HAND.items():
        assert 0.8 ** layers_above(name, 24) == pytest.approx(multiplier, rel=1e-9), name


def test_full_size_model_has_the_names_of_the_table() -> None:
    with torch.device("meta"):
        model = CoDETR(
            parse(
                DetectorConfig,
                {"backbone": {"name": "eva02_large", "pretrained": False}, "heads": ["atss"]},
                "test",
            )
        )
    rates = learning(model, **RECORD)
    for name, multiplier in BY_HAND.items():
        assert rates[name][0] == pytest.approx(5e-5 * multiplier), name


def test_layer_decay_of_a_small_vit() -> None:
    """Three blocks: embeddings 0.8 ** 4, blocks 0.8 ** 3 to 0.8, all else 1."""
    rates = learning(detector(VIT), **RECORD)
    for name, (rate, _) in rates.items():
        expected = 1.0
        for beginning, multiplier in (
            ("patch_embed", 0.4096),
            ("pos_embed", 0.4096),
            ("blocks.0.", 0.512),
            ("blocks.1.", 0.64),
            ("blocks.2.", 0.8),
        ):
            if name.startswith(f"backbone.body.{beginning}"):
                expected = multiplier
        assert rate == pytest.approx(5e-5 * expected), name


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("backbone.body.pos_embed", 0.01),  # the original's rule spares vectors only
        ("encoder.level_embedding", 0.01),
        ("backbone.body.patch_embed.proj.weight", 0.01),
        ("backbone.body.blocks.1.mlp.fc2.weight", 0.01),
        ("backbone.body.blocks.0.norm1.weight", 0),
        ("backbone.body.blocks.0.attn.q_proj.bias", 0),
        ("backbone.body.norm.weight", 0),
        ("neck.levels.0.1.weight", 0.01),
        ("neck.levels.0.2.weight", 0),
        ("decoder.layers.0.self_attention.in_proj_weight", 0.01),
        ("decoder.layers.0.self_attention.in_proj_bias", 0),
        ("heads.0.cls.bias", 0),
    ],
)
def test_what_decays_in_the_record_model(name: str, decay: float) -> None:
    assert learning(detector(VIT), **RECORD)[name][1] == decay
    assert learning(detector(VIT), **{**RECORD, "decay_norms": True})[name][1] == 0.01


def test_layer_decay_multiplies_the_backbones_rate() -> None:
    rates = learning(detector(VIT), **{**RECORD, "backbone_multiplier": 0.1})
    assert rates["backbone.body.blocks.2.norm1.weight"][0] == pytest.approx(5e-6 * 0.8)
    assert rates["backbone.body.norm.weight"][0] == pytest.approx(5e-6)


def test_layer_decay_needs_a_vit() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay=0\.8 .*set training\.layer_decay=1"):
        learning(detector(RESNET), layer_decay=0.8)


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_the_first_group_learns_at_the_reported_rate(backbone: dict[str, Any]) -> None:
    model = detector(backbone)
    config = TrainingConfig.model_validate(
        RECORD if backbone is VIT else {"learning_rate": 5e-5, "decay_norms": False}
    )
    optimizer = build_optimizer(model, config)
    assert build_schedule(optimizer, config, 4).get_last_lr()[0] == pytest.approx(5e-5)
    assert {type(p["weight_decay"]) for p in optimizer.param_groups} == {float}
