"""Which detector an official state dict is, read off its names and shapes.

Shapes say all but a few things: how many attention heads there are (8 in every official
configuration), the units of the second stage's deltas, and what has no parameters, as Soft-NMS.
These come from the parts that the detectors of the zoo are composed of.

Which parts there are is read off the beginnings of names, so that one name that is missing cannot
make another detector of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from codetr.checkpoint import CheckpointError
from codetr.config import ConfigError, DetectorConfig, SwinConfig, parse
from codetr.layers import Settings, merge, with_heads
from codetr.zoo.catalogue import CLASSES, Entry, entries, part

Shapes = Mapping[str, tuple[int, ...]]

ATTENTION_HEADS = 8
_RESNETS: dict[tuple[int, ...], dict[bool, str]] = {
    (2, 2, 2, 2): {False: "resnet18"},
    (3, 4, 6, 3): {False: "resnet34", True: "resnet50"},
    (3, 4, 23, 3): {True: "resnet101"},
}
"""By the blocks of their stages, and whether these are bottlenecks."""
_QUERY_HEAD = "query_head.transformer"
_HEAD_EMBEDDING = f"{_QUERY_HEAD}.head_pos_embed.weight"


def recognise(shapes: Shapes) -> DetectorConfig:
    """The configuration of an official detector with tensors of these names and shapes.

    Raises:
        CheckpointError: it is none that is known here; says what is missing or not known.
    """
    try:
        settings = _settings(shapes)
    except KeyError as error:
        raise CheckpointError(
            f"no official Co-DETR detector: there is no '{error.args[0]}' among its names"
        ) from None
    try:
        return parse(DetectorConfig, settings, "recognised as")
    except ConfigError as error:
        raise CheckpointError(f"no detector that codetr can build: {error}") from None


def fitting(config: DetectorConfig) -> list[Entry]:
    """The detectors of the zoo with parameters of the same shapes, the plainest first: those of as
    many classes, or, where none has as many, those of other numbers of classes."""
    found = [e for e in entries() if not e.unavailable and _shape(e.config) == _shape(config)]
    return [e for e in found if CLASSES[e.data] == config.num_classes] or found


def class_count(shapes: Shapes) -> int:
    """Number of classes.

    Raises:
        KeyError: names what would say it.
    """
    return shapes["query_head.cls_branches.0.weight"][0]


def _shape(config: DetectorConfig) -> Any:
    """What of the configuration decides names and shapes."""
    training = {"pretrained", "weights", "frozen_stages", "frozen_norm", "drop_path"}
    return (
        config.backbone.model_dump(exclude={*training, "checkpoint_blocks"}),
        config.transformer.model_dump(exclude={"checkpoint_encoder"}),
        config.queries,
        config.denoising.enabled,
        config.heads,
        config.positive_queries,
    )


def _settings(shapes: Shapes) -> Settings:
    dino = _any(shapes, f"{_QUERY_HEAD}.query_embed", f"{_QUERY_HEAD}.decoder.ref_point_head")
    content = f"{_QUERY_HEAD}.query_embed" if dino else "query_head.query_embedding"
    levels, channels = shapes[f"{_QUERY_HEAD}.level_embeds"]
    _ = shapes[f"{_QUERY_HEAD}.enc_output.weight"]  # every official detector has two stages
    backbone = _backbone(shapes)
    heads = _heads(shapes, channels)
    parts = ["dino"] if dino else []
    parts += ["vit-l"] if backbone["name"].startswith("eva02") else []
    parts += ["co-dino"] if dino and heads else []
    merged = part(parts[0]).settings if parts else {"detector": {}, "heads": {}}
    for name in parts[1:]:
        merged = merge(merged, part(name).settings)
    measured: Settings = {
        "num_classes": class_count(shapes),
        "backbone": backbone,
        "transformer": _transformer(shapes, levels, channels),
        "queries": {"count": shapes[f"{content}.weight"][0]},
        "heads": heads,
    }
    if heads:
        measured["positive_queries"] = {
            "enabled": _any(shapes, f"{_QUERY_HEAD}.aux_pos_trans"),
            "features": _any(shapes, f"{_QUERY_HEAD}.pos_feats_"),
            # One scalar for each head, where the decoder does not compute positions.
            "official_defects": not dino and shapes.get(_HEAD_EMBEDDING, (0, 1))[1] == 1,
        }
    return with_heads(merge(merged["detector"], measured), merged["heads"], "recognised as")


def _transformer(shapes: Shapes, levels: int, channels: int) -> Settings:
    first = f"{_QUERY_HEAD}.encoder.layers.0"
    weights = shapes[f"{first}.attentions.0.attention_weights.bias"][0]
    return {
        "embed_dim": channels,
        "ffn_dim": shapes[f"{first}.ffns.0.layers.0.0.weight"][0],
        "attention_heads": ATTENTION_HEADS,
        "sampling_points": weights // (ATTENTION_HEADS * levels),
        "encoder_layers": _count(shapes, rf"{_QUERY_HEAD}\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(shapes, rf"{_QUERY_HEAD}\.decoder\.layers\.(\d+)\."),
        "levels": levels,
    }


# ---------------------------------------------------------------------------------------- backbones


def _backbone(shapes: Shapes) -> Settings:
    if _any(shapes, "backbone.pos_embed", "backbone.blocks."):
        return _vit(shapes)
    stages = _count(shapes, r"neck\.convs\.(\d+)\.")
    outputs = list(range(5 - stages, 5))
    if _any(shapes, "backbone.layers."):
        return {**_swin(shapes), "stages": outputs}
    width = shapes["backbone.conv1.weight"][0]
    blocks = tuple(_count(shapes, rf"backbone\.layer{n}\.(\d+)\.") for n in range(1, 5))
    bottleneck = any(re.match(r"backbone\.layer\d+\.\d+\.(conv|bn)3\.", name) for name in shapes)
    name = _RESNETS.get(blocks, {}).get(bottleneck)
    if name is None:
        raise CheckpointError(f"no known ResNet has {blocks} blocks in its stages")
    return {"name": name, "width": width, "stages": outputs}


def _swin(shapes: Shapes) -> Settings:
    width = shapes["backbone.patch_embed.proj.weight"][0]
    depths = [_count(shapes, rf"backbone\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    table = shapes["backbone.layers.0.blocks.0.attn.relative_position_bias_table"][0]
    window = (int(table**0.5) + 1) // 2
    for name in ("swin_tiny", "swin_small", "swin_base", "swin_large"):
        sizes = SwinConfig.model_validate({"name": name})
        if (sizes.width, list(sizes.depths)) == (width, depths):
            return {"name": name, "window": window}
    raise CheckpointError(f"no known Swin has {width} channels and {depths} blocks in its stages")


def _vit(shapes: Shapes) -> Settings:
    _, positions, width = shapes["backbone.pos_embed"]
    depth = _count(shapes, r"backbone\.blocks\.(\d+)\.")
    cells = shapes["backbone.rope_win.freqs_cos"][0]
    return {
        "name": "eva02_large",
        "width": width,
        "depth": depth,
        "window": round(cells**0.5),
        "global_every": _global_every(shapes, depth, cells),
        "position_grid": round((positions - 1) ** 0.5),
    }


def _global_every(shapes: Shapes, depth: int, cells: int) -> int:
    """Every so manieth block attends to the whole map; the others have the rotations of a window's
    cells."""
    whole = {block for block in range(depth) if _rotations(shapes, block) != cells}

    def others(every: int) -> set[int]:
        return whole.symmetric_difference(range(every - 1, depth, every))

    every = min(range(1, depth + 1), key=lambda every: len(others(every)))
    if wrong := others(every):
        raise KeyError(f"backbone.blocks.{min(wrong)}.attn.rope.freqs_cos")
    return every


def _rotations(shapes: Shapes, block: int) -> int | None:
    """Cells that a block's stored rotations are for, if it has any."""
    shape = shapes.get(f"backbone.blocks.{block}.attn.rope.freqs_cos")
    return shape[0] if shape else None


# -------------------------------------------------------------------------------------------- heads


def _heads(shapes: Shapes, channels: int) -> list[Settings]:
    """The original numbers the RoI heads first."""
    heads = []
    if _any(shapes, "rpn_head.", "roi_head."):
        heads.append(_faster_rcnn(shapes, channels))
    for number in range(_count(shapes, r"bbox_head\.(\d+)\.")):
        _ = shapes[f"bbox_head.{number}.atss_cls.weight"]  # the only dense head known
        convs = _count(shapes, rf"bbox_head\.{number}\.cls_convs\.(\d+)\.")
        heads.append({"type": "atss", "convs": convs})
    return heads


def _faster_rcnn(shapes: Shapes, channels: int) -> Settings:
    root = "roi_head.0.bbox_head"
    fc_dim, inputs = shapes[f"{root}.shared_fcs.0.weight"]
    agnostic = shapes[f"{root}.fc_reg.weight"][0] == 4
    plain = {} if agnostic else {"stds": [0.1, 0.1, 0.2, 0.2]}
    return {
        "type": "faster_rcnn",
        "rcnn": {
            "convs": _count(shapes, rf"{re.escape(root)}\.shared_convs\.(\d+)\."),
            "fcs": _count(shapes, rf"{re.escape(root)}\.shared_fcs\.(\d+)\."),
            "fc_dim": fc_dim,
            "roi_size": round((inputs / channels) ** 0.5),
            "class_agnostic": agnostic,
            **plain,
        },
    }


def _any(names: Collection[str] | Shapes, *beginnings: str) -> bool:
    """Does any of the names begin so?"""
    return any(name.startswith(beginnings) for name in names)


def _count(names: Collection[str] | Shapes, pattern: str) -> int:
    """How many numbers from 0 on stand in names of this pattern."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1
