"""The dense encoder of single-scale DETRs: every cell looks at every other."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codetr.config import TransformerConfig
from codetr.structures import ImageBatch, Memory
from codetr.transformer.attention import feed_forward, perceptron
from codetr.transformer.encoder import lay_out


class DenseEncoderLayer(nn.Module):
    """Post-norm self-attention of all tokens and perceptron (DETR, section 3.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.embed_dim
        self.attention = nn.MultiheadAttention(channels, config.attention_heads, batch_first=True)
        self.ffn = feed_forward(channels, config.ffn_dim, config.activation)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """(B, T, C) from tokens and their positions (B, T, C); nobody attends to those that are
        ``padding`` (B, T)."""
        query = tokens + position
        attended, _ = self.attention(
            query, query, tokens, key_padding_mask=padding, need_weights=False
        )
        tokens = self.norms[0](tokens + attended)
        return self.norms[1](tokens + self.ffn(tokens))


class DenseEncoder(nn.Module):
    """Lets every cell of one map look at all others (DETR; DAB-DETR with ``scale_positions``)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DenseEncoderLayer(config) for _ in range(config.encoder_layers))
        if config.scale_positions:  # one perceptron for all layers
            self.scale = perceptron(config.embed_dim, config.embed_dim, config.embed_dim)

    def forward(self, pyramid: list[Tensor], batch: ImageBatch) -> Memory:
        """The memory, with its positions, of a pyramid of one (B, C, h, w) map."""
        memory, (position,) = lay_out(pyramid, batch, self.config)
        tokens = memory.tokens
        for layer in self.layers:
            scaled = position
            if self.config.scale_positions:
                scaled = position * self.scale(tokens)
            if self.config.checkpoint_encoder and self.training:
                tokens = checkpoint(layer, tokens, scaled, memory.padding, use_reentrant=False)
            else:
                tokens = layer(tokens, scaled, memory.padding)
        return replace(memory, tokens=tokens, position=position)
