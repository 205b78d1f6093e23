"""Tensor operators that no library carries."""

from codetr.ops.deformable_attention import deformable_attention, deformable_attention_fused
from codetr.ops.switch import implementation

__all__ = ["deformable_attention", "deformable_attention_fused", "implementation"]
