"""Encoder and decoder of deformable DETRs."""

from codetr.transformer.decoder import Decoder
from codetr.transformer.encoder import Encoder

__all__ = ["Decoder", "Encoder"]
