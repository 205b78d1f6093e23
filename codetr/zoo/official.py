"""Parameter names of official Co-DETR checkpoints, to ours and back.

The names differ only in their beginnings, so one list of prefix pairs serves both directions and
neither can drift from the other. Tensors pass through untouched, but for the one parameter that
the original stores for all heads together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from codetr.config import AtssConfig, DetectorConfig, FasterRcnnConfig
from codetr.zoo.backbone_names import (
    PREFIXES,
    backbone_from_official,
    backbone_to_official,
    derived_buffers,
)

State = dict[str, Tensor]
Prefixes = list[tuple[str, str]]

_HEAD_EMBEDDING = "query_head.transformer.head_pos_embed.weight"
_OUR_HEAD_EMBEDDING = "positive_queries.{}.head_embedding"


def from_official_names(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """An official state dict under our names.

    Args:
        state: the official detector's parameters and buffers.
        config: of the same detector; where queries keep their positions (Co-Deformable-DETR),
            ``positive_queries.official_defects`` must be set.

    Raises:
        KeyError: names that this detector does not have, all of them.
    """
    images, rest = _split(state)
    embeddings = rest.pop(_HEAD_EMBEDDING, torch.empty(0, 1))
    renamed = backbone_from_official(images, config) | _rename(rest, prefixes(config))
    for index, embedding in enumerate(embeddings):
        renamed[_OUR_HEAD_EMBEDDING.format(index)] = embedding
    return renamed


def to_official_names(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """The inverse of :func:`from_official_names`, with the buffers that official files hold."""
    images, rest = _split(state)
    ours = [_OUR_HEAD_EMBEDDING.format(index) for index in range(config.k)]
    embeddings = [rest.pop(name) for name in ours if name in rest]
    renamed = _rename(rest, [(our, official) for official, our in prefixes(config)])
    if embeddings:
        renamed[_HEAD_EMBEDDING] = torch.stack(embeddings)
    return backbone_to_official(images, config) | derived_buffers(config) | renamed


def _split(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Backbone and neck, and all else."""
    images = {name: value for name, value in state.items() if name.startswith(PREFIXES)}
    return images, {name: value for name, value in state.items() if name not in images}


def prefixes(config: DetectorConfig) -> Prefixes:
    """(official, ours): how the names of each part behind the neck begin."""
    return [*_query_head(config), *_heads(config)]


def _query_head(config: DetectorConfig) -> Prefixes:
    """What reads the neck's maps: encoder, decoder, queries, and the heads' adapter."""
    layers = config.transformer.decoder_layers
    content = "transformer.query_embed" if config.queries.dynamic_anchors else "query_embedding"
    return [
        *_transformer(config),
        # The branch beyond those of the decoder layers is the encoder's.
        (f"query_head.cls_branches.{layers}.", "queries.classify."),
        (f"query_head.reg_branches.{layers}.", "queries.regress."),
        ("query_head.cls_branches.", "decoder.classify."),
        ("query_head.reg_branches.", "decoder.regress."),
        (f"query_head.{content}.", "queries.content."),
        ("query_head.label_embedding.", "denoising.label_embedding."),
        ("query_head.downsample.", "adapter.downsample."),
    ]


def _transformer(config: DetectorConfig) -> Iterable[tuple[str, str]]:
    root = "query_head.transformer"
    yield f"{root}.level_embeds", "encoder.level_embedding"
    attentions = {
        "encoder": [("attentions.0.", "attention.")],
        "decoder": [
            ("attentions.0.attn.", "self_attention."),
            ("attentions.1.", "cross_attention."),
        ],
    }
    counts = {
        "encoder": config.transformer.encoder_layers,
        "decoder": config.transformer.decoder_layers,
    }
    for part, count in counts.items():
        for layer in range(count):
            for official, ours in (
                *attentions[part],
                ("ffns.0.layers.0.0.", "ffn.0."),
                ("ffns.0.layers.1.", "ffn.2."),
                ("norms.", "norms."),
            ):
                yield f"{root}.{part}.layers.{layer}.{official}", f"{part}.layers.{layer}.{ours}"
    yield f"{root}.decoder.ref_point_head.", "decoder.anchor_position."
    yield f"{root}.decoder.norm.", "decoder.norm."
    yield f"{root}.enc_output.", "queries.project."
    yield f"{root}.enc_output_norm.", "queries.project_norm."
    yield f"{root}.pos_trans.", "queries.position."
    yield f"{root}.pos_trans_norm.", "queries.position_norm."
    for index in range(config.k):
        for official, ours in (
            ("aux_pos_trans", "position"),
            ("aux_pos_trans_norm", "position_norm"),
            ("pos_feats_trans", "feature"),
            ("pos_feats_norm", "feature_norm"),
        ):
            yield f"{root}.{official}.{index}.", f"positive_queries.{index}.{ours}."


def _heads(config: DetectorConfig) -> Iterable[tuple[str, str]]:
    """The original numbers RoI heads and dense heads separately."""
    dense = 0
    for index, head in enumerate(config.heads):
        ours = f"heads.{index}"
        if isinstance(head, FasterRcnnConfig):
            yield from _faster_rcnn(ours)
        elif isinstance(head, AtssConfig):
            yield from _atss(f"bbox_head.{dense}", ours, head, len(config.head_strides))
            dense += 1


def _faster_rcnn(ours: str) -> Prefixes:
    return [
        ("rpn_head.rpn_conv.", f"{ours}.rpn.conv."),
        ("rpn_head.rpn_cls.", f"{ours}.rpn.cls."),
        ("rpn_head.rpn_reg.", f"{ours}.rpn.reg."),
        ("roi_head.0.bbox_head.shared_fcs.0.", f"{ours}.rcnn.fc1."),
        ("roi_head.0.bbox_head.shared_fcs.1.", f"{ours}.rcnn.fc2."),
        ("roi_head.0.bbox_head.fc_cls.", f"{ours}.rcnn.cls."),
        ("roi_head.0.bbox_head.fc_reg.", f"{ours}.rcnn.reg."),
    ]


def _atss(official: str, ours: str, head: AtssConfig, levels: int) -> Iterable[tuple[str, str]]:
    for conv in range(head.convs):
        for branch in ("cls", "reg"):
            yield f"{official}.{branch}_convs.{conv}.conv.", f"{ours}.{branch}_tower.{conv}.conv."
            yield f"{official}.{branch}_convs.{conv}.gn.", f"{ours}.{branch}_tower.{conv}.norm."
    yield f"{official}.atss_cls.", f"{ours}.cls."
    yield f"{official}.atss_reg.", f"{ours}.reg."
    yield f"{official}.atss_centerness.", f"{ours}.quality."
    for level in range(levels):
        yield f"{official}.scales.{level}.scale", f"{ours}.scales.{level}"


def _rename(state: Mapping[str, Tensor], pairs: Prefixes) -> State:
    renamed, unknown = {}, []
    for name, value in state.items():
        for old, new in pairs:
            if name.startswith(old):
                renamed[new + name[len(old) :]] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise KeyError(f"{len(unknown)} names that this detector does not have: {unknown}")
    return renamed
