"""How fast each parameter learns, and whether it decays: the optimiser's groups."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn

from codetr.config import DetectorConfig, TrainingConfig, VitConfig

_PARTS = ("detector", "backbone", "offsets")
_BLOCK = re.compile(r"backbone\.body\.blocks\.(\d+)\.")


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """All trained parameters, by learning rate and weight decay; the detector's own come first.

    The backbone's rates, and those of sampling offsets and reference points, are multiples of the
    rest's (method.md 63). Where ``layer_decay`` is below 1, those of a ViT's blocks fall from the
    last to the first, as the original sets them for its record model: see :func:`layers_above`.

    Raises:
        ConfigError: ``layer_decay`` is below 1 for another backbone than a ViT.
    """
    multipliers = {
        "detector": 1.0,
        "backbone": config.backbone_multiplier,
        "offsets": config.offsets_multiplier,
    }
    depth = _depth(model, config) if config.layer_decay < 1 else 0
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = _part_of(name)
        above = layers_above(name, depth) if depth else 0
        decays = config.decay_norms or not (parameter.ndim == 1 or name.endswith(".bias"))
        rate = config.learning_rate * multipliers[part] * config.layer_decay**above
        group = groups.setdefault(
            (_PARTS.index(part), above, not decays),
            {
                "name": part + (f"-{above}" if above else "") + ("" if decays else " (no decay)"),
                "params": [],
                "lr": rate,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layers_above(name: str, depth: int) -> int:
    """How often ``layer_decay`` is applied to a parameter's rate: the number of layers from its own
    to the last of a ViT, counting the embeddings as the first layer, below all blocks, and what
    follows the last block, neck and heads included, as the last layer.

    Args:
        name: of the parameter in the detector.
        depth: number of blocks.
    """
    if name.startswith(("backbone.body.patch_embed.", "backbone.body.pos_embed")):
        return depth + 1
    block = _BLOCK.match(name)
    return depth - int(block[1]) if block else 0


def _part_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    if "sampling_offsets" in name or "reference_points" in name:
        return "offsets"
    return "detector"


def _depth(model: nn.Module, config: TrainingConfig) -> int:
    detector: DetectorConfig = model.config  # type: ignore[assignment]
    config.require_fitting(detector)
    return cast("VitConfig", detector.backbone).depth
