"""Tensor operators that no library carries."""

from codetr.ops.deformable_attention import deformable_attention

__all__ = ["deformable_attention"]
