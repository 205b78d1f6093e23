"""Encoders and decoder: deformable on several maps, or dense on a single one."""

from codetr.transformer.decoder import Decoder
from codetr.transformer.dense import DenseEncoder
from codetr.transformer.encoder import Encoder

__all__ = ["Decoder", "DenseEncoder", "Encoder"]
