"""Conditional attention: content and place of queries and keys side by side (Conditional DETR)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from codetr.config import QueryConfig, TransformerConfig
from codetr.structures import Memory
from codetr.transformer.attention import feed_forward, perceptron
from codetr.transformer.positions import encode_boxes


class SpatialQueries(nn.Module):
    """Where queries look: the sine encoding of their centres, transformed by their states.

    From the second layer on it is multiplied by a perceptron of the state (Conditional DETR,
    equation 3). With ``size_modulation`` the half for x is also multiplied by w' / w and that for y
    by h' / h, where w' and h' are read from the state (DAB-DETR, section 4.4).
    """

    def __init__(self, config: TransformerConfig, queries: QueryConfig) -> None:
        super().__init__()
        self.channels, self.smallest = config.embed_dim, queries.logit_eps
        self.modulated = queries.size_modulation
        if config.decoder_layers > 1:  # the first layer transforms nothing
            self.transform = perceptron(self.channels, self.channels, self.channels)
        if self.modulated:
            self.size = perceptron(self.channels, self.channels, 2)

    def forward(self, content: Tensor, reference: Tensor, *, first: bool) -> Tensor:
        """(B, Q, C), the halves for y and x, from states (B, Q, C) and normalised cxcywh boxes
        (B, Q, 4); ``first``: of the first layer."""
        encoding = encode_boxes(reference[..., [1, 0]], self.channels // 2).to(content.dtype)
        if not first:
            encoding = encoding * self.transform(content)
        if self.modulated:
            sides = reference[..., 2:].clamp(min=self.smallest)
            ratio = (self.size(content).sigmoid() / sides).to(encoding.dtype)
            encoding = encoding * ratio[..., [1, 0]].repeat_interleave(self.channels // 2, dim=-1)
        return encoding


class ConditionalSelfAttention(nn.Module):
    """Self-attention of queries, with projections of their own for content and position."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_content = nn.Linear(channels, channels)
        self.query_position = nn.Linear(channels, channels)
        self.key_content = nn.Linear(channels, channels)
        self.key_position = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, content: Tensor, position: Tensor, blocked: Tensor | None) -> Tensor:
        """(B, Q, C) from content and position (B, Q, C); ``blocked`` as of attention_mask()."""
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(content) + self.key_position(position)
        visible = None if blocked is None else ~blocked
        if visible is not None and visible.dim() == 3:
            visible = visible.unflatten(0, (-1, self.heads))
        return self.output(_attend(query, key, self.value(content), self.heads, visible))


class ConditionalCrossAttention(nn.Module):
    """Each head compares contents and places of queries and tokens, and adds up both (Conditional
    DETR, section 3.3)."""

    def __init__(self, channels: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.query_content = nn.Linear(channels, channels)
        self.query_place = nn.Linear(channels, channels)
        self.key_content = nn.Linear(channels, channels)
        self.key_position = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        if first:
            self.query_position = nn.Linear(channels, channels)

    def forward(self, content: Tensor, position: Tensor, place: Tensor, memory: Memory) -> Tensor:
        """(B, Q, C) from content, position and place (B, Q, C) of queries. Contents of the first
        layer say nothing yet: there, positions are added to them. Padding has no weight."""
        query, key = self.queries_and_keys(content, position, place, memory)
        visible = ~memory.padding[:, None, None]
        return self.output(_attend(query, key, self.value(memory.tokens), self.heads, visible))

    def queries_and_keys(
        self, content: Tensor, position: Tensor, place: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """(B, Q, 2 C) and (B, T, 2 C), what the heads compare; arguments as of :meth:`forward`."""
        assert memory.position is not None, "conditional attention needs a dense encoder"
        query, key = self.query_content(content), self.key_content(memory.tokens)
        key_position = self.key_position(memory.position)
        if self.first:
            query, key = query + self.query_position(position), key + key_position
        return (
            self._side_by_side(query, self.query_place(place)),
            self._side_by_side(key, key_position),
        )

    def _side_by_side(self, content: Tensor, place: Tensor) -> Tensor:
        """(B, N, 2 C) from two (B, N, C), so that each head has a share of both."""
        shares = [rows.unflatten(-1, (self.heads, -1)) for rows in (content, place)]
        return torch.cat(shares, dim=-1).flatten(-2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None
) -> Tensor:
    """(B, Q, V) from (B, Q, D), (B, T, D), (B, T, V); ``visible`` (..., Q, T) bool; None: all."""
    query, key, value = (
        rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in (query, key, value)
    )
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return attended.transpose(1, 2).flatten(2)


class ConditionalDecoderLayer(nn.Module):
    """Post-norm self-attention, conditional cross-attention and perceptron."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__()
        channels, heads = config.embed_dim, config.attention_heads
        self.self_attention = ConditionalSelfAttention(channels, heads)
        self.cross_attention = ConditionalCrossAttention(channels, heads, first=first)
        self.ffn = feed_forward(channels, config.ffn_dim, config.activation)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        place: Tensor,
        memory: Memory,
        blocked: Tensor | None,
    ) -> Tensor:
        """(B, Q, C) from content, position and place (B, Q, C), the last as of SpatialQueries;
        ``blocked`` as of attention_mask()."""
        attended = self.self_attention(content, position, blocked)
        content = self.norms[0](content + attended)
        attended = self.cross_attention(content, position, place, memory)
        content = self.norms[1](content + attended)
        return self.norms[2](content + self.ffn(content))
