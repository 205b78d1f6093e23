"""transformers' Conditional DETR and DAB-DETR beside ours: one architecture, its weights under our
names.

Both read the last map of a ResNet alone, with positions of offset 0. With ``auxiliary_loss``
transformers' Conditional DETR normalises the state that the next layer reads; its paper's code, as
ours, normalises only what the branches read, and so do they without that option. The states of all
layers are therefore read by hooks here, and the outputs of the last layer are transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
)

from codetr.config import DetectorConfig
from codetr.structures import ImageBatch

Peer = ConditionalDetrForObjectDetection | DabDetrForObjectDetection

SIZES: dict[str, Any] = {
    "num_classes": 7,
    "backbone": {"name": "resnet18", "pretrained": False, "stages": [4]},
    "transformer": {
        "attention": "conditional",
        "levels": 1,
        "embed_dim": 64,
        "ffn_dim": 96,
        "attention_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
    },
    "queries": {"count": 20, "two_stage": False, "learned_content": False, "norm_states": True},
}

CONDITIONAL = DetectorConfig.model_validate(
    SIZES
    | {
        "transformer": SIZES["transformer"] | {"position_encoding": {"offset": 0.0}},
        "queries": SIZES["queries"] | {"box_refinement": False},
    }
)
DAB = DetectorConfig.model_validate(
    SIZES
    | {
        "transformer": SIZES["transformer"]
        | {
            "position_encoding": {"offset": 0.0, "temperature": 20},
            "activation": "prelu",
            "scale_positions": True,
        },
        "queries": SIZES["queries"]
        | {"dynamic_anchors": True, "shared_branches": True, "size_modulation": True},
    }
)
DAB_DC5 = DAB.model_copy(
    update={
        "backbone": DAB.backbone.model_copy(update={"dilated": True}),
        "queries": DAB.queries.model_copy(update={"patterns": 3}),
    }
)


def build_peer(config: DetectorConfig) -> Peer:
    """transformers' detector of the same sizes, with the weights it starts from."""
    sizes = config.transformer
    common: dict[str, Any] = {
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": config.backbone.name,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [*config.backbone.stages],
            "output_stride": 16 if config.backbone.dilated else 32,
        },
        "num_labels": config.num_classes,
        "num_queries": config.queries.count,
        "encoder_layers": sizes.encoder_layers,
        "decoder_layers": sizes.decoder_layers,
        "encoder_ffn_dim": sizes.ffn_dim,
        "decoder_ffn_dim": sizes.ffn_dim,
        "encoder_attention_heads": sizes.attention_heads,
        "decoder_attention_heads": sizes.attention_heads,
        "dropout": 0.0,
    }
    if config.queries.dynamic_anchors:
        common["num_patterns"] = config.queries.patterns or 0
        return DabDetrForObjectDetection(DabDetrConfig(hidden_size=sizes.embed_dim, **common))
    return ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(d_model=sizes.embed_dim, **common)
    )


@torch.no_grad()
def randomise(peer: Peer, seed: int = 0) -> None:
    """Move the weights away from their start, at which box changes and biases are zeros and a
    mistake in the mapping would not show."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in peer.named_parameters():
        if "backbone" not in name:
            # As much as keeps the scale of what passes through, in matrices of any width.
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    for name, buffer in peer.named_buffers():
        if "backbone" in name:
            noise = 0.1 * torch.randn(buffer.shape, generator=draw)
            buffer.copy_(noise if name.endswith(("running_mean", "bias")) else noise.exp())
    if isinstance(peer, DabDetrForObjectDetection):  # one module under two names
        peer.model.decoder.bbox_embed.load_state_dict(peer.bbox_predictor.state_dict())


# From transformers' names, which differ between the two detectors, to ours.
NAMES = [
    (r"model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone.body."),
    (r"model\.input_projection\.", "neck.conv."),
    (r"model\.query_position_embeddings\.", "queries.position."),
    (r"model\.query_refpoint_embeddings\.", "queries.anchors."),
    (r"model\.patterns\.", "queries.patterns."),
    (r"class_(labels_classifier|embed)\.", "decoder.classify.0."),
    (r"bbox_predictor\.layers\.0\.", "decoder.regress.0.0."),
    (r"bbox_predictor\.layers\.1\.", "decoder.regress.0.2."),
    (r"bbox_predictor\.layers\.2\.", "decoder.regress.0.4."),
    (r"model\.encoder\.query_scale\.layers\.0\.", "encoder.scale.0."),
    (r"model\.encoder\.query_scale\.layers\.1\.", "encoder.scale.2."),
    (r"model\.decoder\.query_scale\.layers\.0\.", "decoder.spatial.transform.0."),
    (r"model\.decoder\.query_scale\.layers\.1\.", "decoder.spatial.transform.2."),
    (r"model\.decoder\.ref_anchor_head\.layers\.0\.", "decoder.spatial.size.0."),
    (r"model\.decoder\.ref_anchor_head\.layers\.1\.", "decoder.spatial.size.2."),
    (r"model\.decoder\.layernorm\.", "decoder.norm."),
    (r"model\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.layers.\2."),
]
IN_LAYERS = [
    (r"\.(mlp\.)?fc1\.", ".ffn.0."),
    (r"\.(mlp\.)?activation_fn\.", ".ffn.1."),
    (r"\.(mlp\.)?fc2\.", ".ffn.2."),
]
IN_ENCODER_LAYERS = [
    (r"\.self_attn_layer_norm\.", ".norms.0."),
    (r"\.final_layer_norm\.", ".norms.1."),
    (r"\.self_attn\.o(ut)?_proj\.", ".attention.out_proj."),
]
IN_DECODER_LAYERS = [
    (r"\.(self_attn\.)?self_attn_layer_norm\.", ".norms.0."),
    (r"\.(cross_attn\.cross|encoder)_attn_layer_norm\.", ".norms.1."),
    (r"\.(mlp\.)?final_layer_norm\.", ".norms.2."),
    (r"\.(self_attn\.self|cross_attn\.cross)_attn\.output_proj\.", r".\1.output."),
    (r"\.(self_attn\.self|cross_attn\.cross)_attn_", r".\1."),
    (r"\.self_attn\.(self\.)?", ".self_attention."),
    (r"\.(encoder_attn|cross_attn\.cross)\.", ".cross_attention."),
    (r"\.o_proj\.", ".output."),
    (r"\.v(alue)?_proj\.", ".value."),
    (r"\.q(uery)?_pos_sine_proj\.", ".query_place."),
    (r"\.q(uery)?_(content|pos)_proj\.", r".query_\2."),
    (r"\.k(ey)?_(content|pos)_proj\.", r".key_\2."),
    (r"_pos\.", "_position."),
]


def our_names(tensors: dict[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """The peer's parameters, or their gradients, under our names.

    The perceptron ``ref_point_head`` makes points of positions in Conditional DETR, which ours
    keeps with the queries, and positions of boxes in DAB-DETR.
    """
    head = (
        "decoder.anchor_position" if config.queries.dynamic_anchors else "queries.reference_points"
    )
    heads = [
        (r"model\.decoder\.ref_point_head\.layers\.0\.", f"{head}.0."),
        (r"model\.decoder\.ref_point_head\.layers\.1\.", f"{head}.2."),
    ]
    return dict(_renamed(tensors, [*heads, *NAMES]))


def _renamed(
    tensors: dict[str, Tensor], names: list[tuple[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if re.search(r"decoder\.bbox_embed|encoder\..*self_attn\.[kv]_proj", name):
            continue  # a second name, or taken along with the query's projection
        for pattern, replacement in names:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise KeyError(f"no name for {name}")
        if renamed.startswith(("encoder.layers", "decoder.layers")):
            inner = IN_ENCODER_LAYERS if renamed.startswith("encoder") else IN_DECODER_LAYERS
            for pattern, replacement in (*inner, *IN_LAYERS):
                renamed = re.sub(pattern, replacement, renamed)
        if renamed.startswith("encoder") and ".self_attn.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed = re.sub(r"self_attn\.q_proj\.", "attention.in_proj_", renamed)
            yield renamed, torch.cat(parts)
        else:
            yield renamed, tensor


def load_peer_weights(model: nn.Module, peer: Peer, config: DetectorConfig) -> None:
    """Give ``model`` the peer's weights.

    Raises:
        ValueError: one has weights that the other lacks.
    """
    missing, unexpected = model.load_state_dict(our_names(peer.state_dict(), config), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"no weights for {missing}; no place for {unexpected}")


def peer_layers(peer: Peer, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Logits (L, B, Q, classes) and boxes (L, B, Q, 4) of every layer, the last as transformers
    itself gives them."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in peer.model.decoder.layers
    ]
    inputs = {"pixel_values": batch.pixels, "pixel_mask": (~batch.padding_mask()).long()}
    try:
        output = peer(**inputs)
        references = peer.model(**inputs).reference_points
    finally:
        for hook in hooks:
            hook.remove()
    states = states[: len(peer.model.decoder.layers)]
    logits, boxes = [], []
    for layer, state in enumerate(states):
        normed = peer.model.decoder.layernorm(state)
        change = peer.bbox_predictor(normed)
        if isinstance(peer, DabDetrForObjectDetection):
            change = change + torch.logit(references[layer], eps=1e-5)
            logits.append(peer.class_embed(normed))
        else:
            # Conditional DETR's references lie (Q, B, 2), and have no width and height.
            points = torch.logit(references.transpose(0, 1), eps=1e-5)
            change = change + torch.cat((points, torch.zeros_like(points)), dim=-1)
            logits.append(peer.class_labels_classifier(normed))
        boxes.append(change.sigmoid())
    logits[-1], boxes[-1] = output.logits, output.pred_boxes
    return torch.stack(logits), torch.stack(boxes)
