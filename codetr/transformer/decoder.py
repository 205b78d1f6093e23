"""The decoder: every group of queries in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from codetr.boxes import inverse_sigmoid
from codetr.config import QueryConfig, TransformerConfig
from codetr.structures import GroupPrediction, Memory, QueryGroup
from codetr.transfer import tensor_on
from codetr.transformer.attention import DeformableAttention, SamplingFrame, feed_forward
from codetr.transformer.positions import encode_boxes


class DecoderLayer(nn.Module):
    """Post-norm self-attention, deformable cross-attention and perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.embed_dim
        self.self_attention = nn.MultiheadAttention(
            channels, config.attention_heads, batch_first=True
        )
        self.cross_attention = DeformableAttention(
            channels, config.attention_heads, config.levels, config.sampling_points
        )
        self.ffn = feed_forward(channels, config.ffn_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        frame: SamplingFrame,
        memory: Memory,
        blocked: Tensor | None,
    ) -> Tensor:
        """(B, Q, C) from content and position (B, Q, C); ``blocked`` as of attention_mask()."""
        query = content + position
        attended, _ = self.self_attention(
            query, query, content, attn_mask=blocked, need_weights=False
        )
        content = self.norms[0](content + attended)
        attended = self.cross_attention(content + position, frame, memory)
        content = self.norms[1](content + attended)
        return self.norms[2](content + self.ffn(content))


class Decoder(nn.Module):
    """Refines all query groups layer by layer (method.md 19-23)."""

    def __init__(self, config: TransformerConfig, queries: QueryConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.queries = config, queries
        layers = config.decoder_layers
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(layers))
        # Without refinement one pair of branches serves all layers (Deformable DETR).
        branches = layers if queries.box_refinement else 1
        self.classify = nn.ModuleList(
            classification_branch(config.embed_dim, num_classes) for _ in range(branches)
        )
        # One-stage boxes start small: their reference knows no width and height.
        first = 0.0 if queries.two_stage else -2.0
        self.regress = nn.ModuleList(
            box_branch(config.embed_dim, size_bias=first if index == 0 else 0.0)
            for index in range(branches)
        )
        if queries.dynamic_anchors:
            self.anchor_position = anchor_perceptron(config.embed_dim)
        # One norm for the states of all layers.
        self.norm = nn.LayerNorm(config.embed_dim) if queries.norm_states else nn.Identity()

    def forward(self, groups: list[QueryGroup], memory: Memory) -> dict[str, GroupPrediction]:
        """Predictions of every layer for every group, by the group's name."""
        content = torch.cat([group.content for group in groups], dim=1)
        position = _own_positions(groups)
        reference = torch.cat([group.reference for group in groups], dim=1)
        is_point = _point_references(groups)
        blocked = attention_mask(groups, self.config.attention_heads)

        logits, boxes, eps = [], [], self.queries.logit_eps
        visible_reference = reference  # what the next layer's boxes are gradients of
        for index, layer in enumerate(self.layers):
            frame = SamplingFrame.of_boxes(reference, is_point, memory, self.config.sampling_points)
            if self.queries.dynamic_anchors:
                position = self._anchor_positions(reference, memory)
            assert position is not None
            content = layer(content, position, frame, memory, blocked)
            branch = index if self.queries.box_refinement else 0
            state = self.norm(content)
            delta = self.regress[branch](state).float()
            logits.append(self.classify[branch](state))
            boxes.append((delta + inverse_sigmoid(visible_reference, eps)).sigmoid())
            if self.queries.box_refinement:
                if self.queries.norm_states:
                    delta = self.regress[branch](content).float()
                reference = (delta + inverse_sigmoid(reference.detach(), eps)).sigmoid()
                visible_reference = (
                    reference if self.queries.look_forward_twice else reference.detach()
                )
                reference = reference.detach()
                is_point = None
        counts = [group.count for group in groups]
        split_logits = torch.stack(logits).split(counts, dim=2)
        split_boxes = torch.stack(boxes).split(counts, dim=2)
        return {
            group.name: GroupPrediction(group_logits, group_boxes)
            for group, group_logits, group_boxes in zip(
                groups, split_logits, split_boxes, strict=True
            )
        }

    def _anchor_positions(self, reference: Tensor, memory: Memory) -> Tensor:
        """(B, Q, C) from boxes (B, Q, 4) (DAB-DETR, section 4.3; method.md 18).

        They are encoded in fractions of the finest padded map, in the order y, x, width, height.
        """
        boxes = reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        encoding = encode_boxes(boxes[..., [1, 0, 2, 3]], self.config.embed_dim // 2)
        return self.anchor_position(encoding.to(memory.tokens.dtype))


def attention_mask(groups: list[QueryGroup], heads: int) -> Tensor | None:
    """Which queries may not attend to which.

    A group sees itself and the groups named in ``sees``; its ``parts`` do not see one another, and
    nobody sees a query that is mere padding, apart from that query itself, whose softmax would
    otherwise be empty.

    Returns:
        bool, True where blocked: (Q, Q), or (B * heads, Q, Q) where padding differs between
        images, or None where every query sees every other.
    """
    if len(groups) == 1 and groups[0].valid is None and groups[0].parts == 1:
        return None
    device = groups[0].content.device
    owner = torch.cat([torch.full((g.count,), i, device=device) for i, g in enumerate(groups)])
    part = torch.cat(
        [torch.arange(g.parts, device=device).repeat_interleave(g.count // g.parts) for g in groups]
    )
    sees = tensor_on(device, [[a is b or b.name in a.sees for b in groups] for a in groups])
    blocked = ~sees[owner][:, owner]
    blocked |= (owner[:, None] == owner) & (part[:, None] != part)
    if all(group.valid is None for group in groups):
        return blocked
    valid = torch.cat(
        [
            group.content.new_ones(group.content.shape[:2], dtype=torch.bool)
            if group.valid is None
            else group.valid
            for group in groups
        ],
        dim=1,
    )
    itself = torch.eye(len(owner), dtype=torch.bool, device=device)
    blocked = (blocked | ~valid[:, None, :]) & ~itself
    return blocked.repeat_interleave(heads, dim=0)


def _own_positions(groups: list[QueryGroup]) -> Tensor | None:
    """(B, Q, C) positions that the groups bring along; None where the decoder computes them."""
    positions = [group.position for group in groups if group.position is not None]
    return torch.cat(positions, dim=1) if positions else None


def _point_references(groups: list[QueryGroup]) -> Tensor | None:
    """(Q,) bool, True where a query's reference is a point only; None where none is."""
    if not any(group.points for group in groups):
        return None
    device = groups[0].content.device
    return torch.cat([torch.full((g.count,), g.points, device=device) for g in groups])


def classification_branch(channels: int, num_classes: int) -> nn.Linear:
    """Class logits, which start at a probability of 0.01 (method.md 62)."""
    branch = nn.Linear(channels, num_classes)
    nn.init.constant_(branch.bias, -math.log(99))
    return branch


def anchor_perceptron(channels: int) -> nn.Sequential:
    """From the sine encoding of a box, (..., 2 * channels), to a position (..., channels)."""
    first, last = nn.Linear(2 * channels, channels), nn.Linear(channels, channels)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(first, nn.ReLU(), last)


def box_branch(channels: int, size_bias: float = 0.0) -> nn.Sequential:
    """Three-layer perceptron to a change of box logits (cx, cy, w, h).

    It starts at no change, apart from ``size_bias`` on width and height.
    """
    last = nn.Linear(channels, 4)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, size_bias, size_bias]))
    hidden = (nn.Linear(channels, channels), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(channels, channels), nn.ReLU(), last)
