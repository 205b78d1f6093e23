"""Names of backbone and neck in official Co-DETR checkpoints, to ours and back.

Each parameter has exactly one name on either side, and its tensor is the same: Swin's patch
merging reads its four neighbours in the same order as timm's, query, key and value have separate
weights on both sides. Only its owner may differ, as the merging of one stage into the next. What
the official files hold beyond parameters follows from the configuration: :func:`derived_buffers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from timm.layers import RotaryEmbeddingCat
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from codetr.backbones.names import Names, eva_names, swin_names
from codetr.backbones.vit import HEAD_CHANNELS, ROPE_GRID
from codetr.config import DetectorConfig, SwinConfig, VitConfig

State = dict[str, Tensor]

PREFIXES = ("backbone.", "neck.")
"""How all names of these parts begin, on both sides."""

_AFFINE = ("weight", "bias")

# Models trained on one canvas (LVIS) also store the rotations of all its cells. They are those that
# we compute for an image of that size (see canvas_rotations), and are not exported again.
_ROPE = re.compile(r"backbone\.(rope_(win|glb)|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)")


def backbone_names(config: DetectorConfig) -> Names:
    """(official, ours) for every parameter of a Swin or ViT backbone and of any neck.

    A ResNet's parameters keep their names behind ``backbone.body.``.
    """
    backbone = config.backbone
    names: Names = {}
    if isinstance(backbone, SwinConfig):
        names = swin_names(backbone)
    elif isinstance(backbone, VitConfig):
        names = eva_names(backbone)
    neck = _pyramid(config) if isinstance(backbone, VitConfig) else _channel_mapper(config)
    return {f"backbone.{theirs}": f"backbone.body.{ours}" for theirs, ours in names.items()} | neck


def backbone_from_official(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """Backbone and neck of an official state dict under our names, without derived buffers.

    Args:
        state: tensors whose names begin with one of ``PREFIXES``.
        config: of the same detector.

    Raises:
        KeyError: names that this backbone or neck does not have, all of them.
    """
    derived = derived_buffer_names(config)
    parameters = {
        name: value
        for name, value in state.items()
        if name not in derived and not _ROPE.fullmatch(name)
    }
    return _rename(parameters, backbone_names(config), config, "backbone.", "backbone.body.")


def backbone_to_official(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """The inverse of :func:`backbone_from_official`; a whole checkpoint also needs the
    :func:`derived_buffers`.

    Raises:
        KeyError: names that are none of ours, all of them.
    """
    ours = {our: official for official, our in backbone_names(config).items()}
    return _rename(state, ours, config, "backbone.body.", "backbone.")


def derived_buffer_names(config: DetectorConfig) -> dict[str, str]:
    """The official buffers that follow from the configuration, and which of three each is:
    ``index``, ``cos`` or ``sin``."""
    backbone = config.backbone
    if isinstance(backbone, SwinConfig):
        return {
            f"backbone.layers.{stage}.blocks.{block}.attn.relative_position_index": "index"
            for stage in range(backbone.stages[-1])
            for block in range(backbone.depths[stage])
        }
    if isinstance(backbone, VitConfig):
        windowed = [block for block in range(backbone.depth) if backbone.windowed(block)]
        owners = ["backbone.rope_win", *(f"backbone.blocks.{n}.attn.rope" for n in windowed)]
        return {f"{owner}.freqs_{kind}": kind for owner in owners for kind in ("cos", "sin")}
    return {}


def derived_buffers(config: DetectorConfig) -> State:
    """The buffers of an official checkpoint that are none of ours: where in its table Swin's
    attention finds a relative position, and the rotation of every cell of a ViT's window."""
    backbone = config.backbone
    values: State = {}
    if isinstance(backbone, SwinConfig):
        values["index"] = get_relative_position_index(backbone.window, backbone.window)
    elif isinstance(backbone, VitConfig):
        values = _rotations(backbone.window)
    return {name: values[kind].clone() for name, kind in derived_buffer_names(config).items()}


def canvas_rotations(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """What the rotations in a state must be that are none of the :func:`derived_buffers`: those of
    the blocks that attend to the whole of a square canvas, which has as many cells as they."""
    derived = derived_buffer_names(config)
    found = {name: _ROPE.fullmatch(name) for name in state if name not in derived}
    return {
        name: _rotations(round(len(state[name]) ** 0.5))[match[3]]
        for name, match in found.items()
        if match
    }


@cache
def _rotations(side: int) -> State:
    """``cos`` and ``sin`` (side², channels) of every cell of a square."""
    grid = (ROPE_GRID, ROPE_GRID)
    rope = RotaryEmbeddingCat(HEAD_CHANNELS, in_pixels=False, feat_shape=None, ref_feat_shape=grid)
    sin, cos = rope.get_embed((side, side)).chunk(2, dim=-1)
    return {"sin": sin, "cos": cos}


def _channel_mapper(config: DetectorConfig) -> Names:
    stages = len(config.backbone.strides)
    counts = {"convs": stages, "extra_convs": config.transformer.levels - stages}
    return {
        f"neck.{official}.{index}.{theirs}": f"neck.{ours}.{index}.{our}"
        for official, ours in (("convs", "lateral"), ("extra_convs", "extra"))
        for index in range(counts[official])
        for theirs, our in (
            ("conv.weight", "0.weight"),
            ("gn.weight", "1.weight"),
            ("gn.bias", "1.bias"),
        )
    }


_PYRAMID: dict[str, dict[str, tuple[int, ...]]] = {
    "p2": {"conv": (1, 5, 8, 11), "norm": (2, 6, 9, 12)},
    "p3": {"conv": (1, 4, 7), "norm": (2, 5, 8)},
    "p4": {"conv": (0, 3), "norm": (1, 4)},
    "p5": {"conv": (1, 4), "norm": (2, 5)},
    "p6": {"conv": (1, 4, 7), "norm": (2, 5, 8)},
}
"""Positions of what has parameters in the original's levels, which are ours."""


def _pyramid(config: DetectorConfig) -> Names:
    names: Names = {}
    for index, level in enumerate([*_PYRAMID][-config.transformer.levels :]):
        kinds = _PYRAMID[level]
        parts = [f"{position}.weight" for position in kinds["conv"]]
        parts += [f"{position}.{kind}" for position in kinds["norm"] for kind in _AFFINE]
        names |= {f"neck.{level}.{part}": f"neck.levels.{index}.{part}" for part in parts}
    return names


def _rename(
    state: Mapping[str, Tensor], names: Names, config: DetectorConfig, theirs: str, ours: str
) -> State:
    """By the table; a backbone that it does not list, a ResNet, by its prefix."""
    by_prefix = not isinstance(config.backbone, SwinConfig | VitConfig)
    renamed, unknown = {}, []
    for name, value in state.items():
        if name in names:
            renamed[names[name]] = value
        elif by_prefix and name.startswith(theirs):
            renamed[ours + name.removeprefix(theirs)] = value
        else:
            unknown.append(name)
    if unknown:
        raise KeyError(f"{len(unknown)} names that this backbone does not have: {unknown}")
    return renamed
