"""transformers' Deformable DETR beside ours: one architecture, and its weights under our names.

Both descend from Deformable DETR's code, so position encoding (offset -0.5), ranking of tokens (the
logit of class 0), layout of learned queries (position first) and losses agree.

What theirs cannot be, ours must not be: learned content of selected queries (``mixed_selection``),
gradients to the layer before (``look_forward_twice``), auxiliary heads; the losses of the encoder's
proposals it lacks. What ours cannot be: a neck whose convolutions have biases; a fresh model of
theirs has zeros there. Theirs has 32 groups in every group norm, and one classifier for all layers
unless it is two-stage. Its defaults are a dropout of 0.1, no losses but the last layer's, and a
class weight of 1 in the matching: :func:`peer_config` sets the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from codetr.boxes import normalise
from codetr.config import DetectorConfig, PositionEncodingConfig
from codetr.detector import CoDETR
from codetr.structures import ImageBatch, Targets

GROUPS = 32
"""Of transformers' group norms."""


def expressible(config: DetectorConfig) -> DetectorConfig:
    """The detector with the same sizes that transformers' can be: no heads, DINO's options off."""
    return config.model_copy(
        update={
            "heads": (),
            "queries": config.queries.model_copy(
                update={"mixed_selection": False, "look_forward_twice": False}
            ),
        }
    )


def peer_config(config: DetectorConfig) -> DeformableDetrConfig:
    """transformers' configuration of the same detector.

    Raises:
        ValueError: transformers has no such detector; names the key.
    """
    sizes, queries, backbone = config.transformer, config.queries, config.backbone
    cost = config.matching_cost
    beyond = {
        "heads": bool(config.heads),
        "queries.mixed_selection": queries.two_stage and queries.mixed_selection,
        "queries.look_forward_twice": queries.box_refinement and queries.look_forward_twice,
        "transformer.group_norm_groups": sizes.group_norm_groups != GROUPS,
        "transformer.position_encoding": sizes.position_encoding != PositionEncodingConfig(),
        "backbone.name": backbone.name == "tiny",
        "backbone.width": backbone.width != 64,
        "backbone.frozen_stages": backbone.frozen_stages != 1,
        "backbone.frozen_norm": not backbone.frozen_norm,
        # transformers takes integers alone
        "matching_cost": any(weight % 1 for weight in (cost.cls, cost.l1, cost.giou)),
    }
    if wrong := [key for key, is_beyond in beyond.items() if is_beyond]:
        raise ValueError(f"transformers' Deformable DETR has no such {', '.join(wrong)}")
    return DeformableDetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": backbone.name,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": list(backbone.stages),
        },
        num_labels=config.num_classes,
        num_queries=queries.count,
        two_stage_num_proposals=queries.count,
        two_stage=queries.two_stage,
        with_box_refine=queries.box_refinement,
        d_model=sizes.embed_dim,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_ffn_dim=sizes.ffn_dim,
        decoder_ffn_dim=sizes.ffn_dim,
        encoder_attention_heads=sizes.attention_heads,
        decoder_attention_heads=sizes.attention_heads,
        num_feature_levels=sizes.levels,
        encoder_n_points=sizes.sampling_points,
        decoder_n_points=sizes.sampling_points,
        dropout=0.0,
        auxiliary_loss=True,
        class_cost=int(cost.cls),
        bbox_cost=int(cost.l1),
        giou_cost=int(cost.giou),
    )


def build_peer(config: DetectorConfig) -> DeformableDetrForObjectDetection:
    """transformers' detector with the weights it starts from; see :func:`peer_config`.

    Stem and first stage are frozen here: transformers means to, but looks for "resnet" in the name
    of the backbone's kind, which is "timm_backbone".
    """
    peer = DeformableDetrForObjectDetection(peer_config(config))
    for name, parameter in peer.model.backbone.model.named_parameters():
        if not name.startswith(("layer2.", "layer3.", "layer4.")):
            parameter.requires_grad_(False)
    return peer


@torch.no_grad()
def randomise(peer: nn.Module, seed: int = 0) -> None:
    """Move the weights away from their start, at which offsets, box changes and biases are zeros
    and a mistake in the mapping would not show. Biases of the neck stay zero. In the
    backbone the norms change, of which each block's last one starts at zero."""
    draw = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=draw).to(tensor)

    for name, parameter in peer.named_parameters():
        neck_bias = "input_proj" in name and name.endswith(".0.bias")
        if not neck_bias and "backbone" not in name:
            # As much as keeps the scale of what passes through, in matrices of any width.
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * noise(parameter))
    for name, buffer in peer.named_buffers():
        if name.endswith(("running_mean", "bias")):
            buffer.copy_(0.1 * noise(buffer))
        elif name.endswith(("running_var", "weight")):
            buffer.copy_((0.1 * noise(buffer)).exp())


def load_peer_weights(model: CoDETR, peer: DeformableDetrForObjectDetection) -> None:
    """Give ``model`` the peer's weights.

    Raises:
        ValueError: the two are different detectors, or the neck's convolutions have biases.
    """
    state = dict(_renamed(peer.state_dict(), model.config))
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"no weights for {missing}; no place for {unexpected}")


def _renamed(state: dict[str, Tensor], config: DetectorConfig) -> Iterator[tuple[str, Tensor]]:
    yield "encoder.level_embedding", state["model.level_embed"]
    yield from _moved(state, "model.backbone.model.", "backbone.body.")
    yield from _neck(state, config)
    for layer in range(config.transformer.encoder_layers):
        old, new = f"model.encoder.layers.{layer}.", f"encoder.layers.{layer}."
        yield from _moved(state, f"{old}self_attn.", f"{new}attention.")
        yield from _moved(state, f"{old}self_attn_layer_norm.", f"{new}norms.0.")
        yield from _moved(state, f"{old}final_layer_norm.", f"{new}norms.1.")
        yield from _feed_forward(state, old, new)
    for layer in range(config.transformer.decoder_layers):
        old, new = f"model.decoder.layers.{layer}.", f"decoder.layers.{layer}."
        yield from _self_attention(state, f"{old}self_attn.", f"{new}self_attention.")
        yield from _moved(state, f"{old}encoder_attn.", f"{new}cross_attention.")
        norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
        for number, norm in enumerate(norms):
            yield from _moved(state, f"{old}{norm}.", f"{new}norms.{number}.")
        yield from _feed_forward(state, old, new)
    for branch in range(config.transformer.decoder_layers if config.queries.box_refinement else 1):
        yield from _branch(state, branch, f"decoder.classify.{branch}", f"decoder.regress.{branch}")
    yield from _queries(state, config)


def _neck(state: dict[str, Tensor], config: DetectorConfig) -> Iterator[tuple[str, Tensor]]:
    laterals = len(config.backbone.stages)
    for level in range(config.transformer.levels):
        old = f"model.input_proj.{level}."
        new = f"neck.lateral.{level}." if level < laterals else f"neck.extra.{level - laterals}."
        if state[f"{old}0.bias"].any():
            raise ValueError(f"{old}0.bias is not zero: our neck's convolutions have no bias")
        yield f"{new}0.weight", state[f"{old}0.weight"]
        yield from _moved(state, f"{old}1.", f"{new}1.")


def _self_attention(state: dict[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        parts = [state[f"{old}{part}_proj.{kind}"] for part in "qkv"]
        yield f"{new}in_proj_{kind}", torch.cat(parts)
    yield from _moved(state, f"{old}o_proj.", f"{new}out_proj.")


def _feed_forward(state: dict[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield from _moved(state, f"{old}mlp.fc1.", f"{new}ffn.0.")
    yield from _moved(state, f"{old}mlp.fc2.", f"{new}ffn.2.")


def _branch(
    state: dict[str, Tensor], number: int, classify: str, regress: str
) -> Iterator[tuple[str, Tensor]]:
    yield from _moved(state, f"class_embed.{number}.", f"{classify}.")
    for layer in range(3):
        yield from _moved(state, f"bbox_embed.{number}.layers.{layer}.", f"{regress}.{2 * layer}.")


def _queries(state: dict[str, Tensor], config: DetectorConfig) -> Iterator[tuple[str, Tensor]]:
    if config.queries.two_stage:
        last = config.transformer.decoder_layers
        yield from _branch(state, last, "queries.classify", "queries.regress")
        yield from _moved(state, "model.enc_output.", "queries.project.")
        yield from _moved(state, "model.enc_output_norm.", "queries.project_norm.")
        yield from _moved(state, "model.pos_trans.", "queries.position.")
        yield from _moved(state, "model.pos_trans_norm.", "queries.position_norm.")
    else:
        position, content = state["model.query_position_embeddings.weight"].chunk(2, dim=1)
        yield "queries.position.weight", position
        yield "queries.content.weight", content
        yield from _moved(state, "model.reference_points.", "queries.reference_points.")


def _moved(state: dict[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.startswith(old):
            yield new + name.removeprefix(old), value


# ------------------------------------------------------------------------------ what both compute


@dataclass
class Computed:
    """What a detector computes for a batch, in the order of the tokens that became queries.

    Attributes:
        logits: (L, B, Q, classes).
        boxes: (L, B, Q, 4) normalised cxcywh.
        losses: unweighted scalars by the names of ours, ``query/LAYER/TERM``.
    """

    logits: Tensor
    boxes: Tensor
    losses: dict[str, Tensor]


def compute_ours(model: CoDETR, batch: ImageBatch, targets: list[Targets]) -> Computed:
    memory = model.encode(batch)
    selection = model.queries(memory)
    prediction = model.decoder([selection.group], memory)[selection.group.name]
    losses = model.losses(batch, targets).losses
    logits, boxes = _in_order(prediction.logits, prediction.boxes, selection.tokens)
    return Computed(logits, boxes, {k: v for k, v in losses.items() if k.startswith("query/")})


def compute_theirs(
    peer: DeformableDetrForObjectDetection, batch: ImageBatch, targets: list[Targets]
) -> Computed:
    output = peer(**peer_inputs(batch, targets))
    layers = [*output.auxiliary_outputs, {"logits": output.logits, "pred_boxes": output.pred_boxes}]
    logits, boxes = (
        torch.stack([layer[key] for layer in layers]) for key in ("logits", "pred_boxes")
    )
    scores = output.enc_outputs_class
    tokens = None if scores is None else scores[..., 0].topk(logits.shape[2], dim=1).indices
    terms = {"loss_ce": "cls", "loss_bbox": "l1", "loss_giou": "giou"}
    losses = {}
    for layer in range(len(layers)):
        suffix = "" if layer == len(layers) - 1 else f"_{layer}"
        for theirs, ours in terms.items():
            losses[f"query/{layer}/{ours}"] = output.loss_dict[theirs + suffix]
    return Computed(*_in_order(logits, boxes, tokens), losses)


def peer_inputs(batch: ImageBatch, targets: list[Targets]) -> dict[str, Any]:
    """The same images and objects as transformers takes them."""
    return {
        "pixel_values": batch.pixels,
        "pixel_mask": (~batch.padding_mask()).long(),
        "labels": [
            {"class_labels": t.labels, "boxes": normalise(t.boxes, size)}
            for t, size in zip(targets, batch.sizes, strict=True)
        ],
    }


def _in_order(logits: Tensor, boxes: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries sorted by token: scores that differ in the last bit only may rank either way."""
    if tokens is None:
        return logits, boxes
    order = tokens.argsort(dim=1)[None, :, :, None]
    return tuple(  # type: ignore[return-value]
        values.gather(2, order.expand(len(values), -1, -1, values.shape[-1]))
        for values in (logits, boxes)
    )
