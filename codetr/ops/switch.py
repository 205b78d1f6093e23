"""Which implementation computes deformable attention."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

VARIABLE = "CODETR_DEFORMABLE_ATTENTION"
CHOICES = ("auto", "reference", "triton")
HAS_TRITON = find_spec("triton") is not None

_choice = os.environ.get(VARIABLE, "auto")


@contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Compute deformable attention with ``choice`` inside the block, in every thread.

    Args:
        choice: "auto": the Triton kernels on a CUDA device, plain PyTorch elsewhere; "reference":
            plain PyTorch everywhere; "triton": the kernels everywhere, or an error. The environment
            variable CODETR_DEFORMABLE_ATTENTION says what holds outside of such blocks.

    Raises:
        ValueError: choice is none of these.
    """
    global _choice  # noqa: PLW0603 - a backward pass runs in threads of its own, and is to obey
    before, _choice = _choice, _checked(choice, "implementation()")
    try:
        yield
    finally:
        _choice = before


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels compute what lies on ``device``.

    Raises:
        ValueError: the environment variable has no such choice.
        RuntimeError: the kernels are demanded, but Triton is not installed.
    """
    choice = _checked(_choice, VARIABLE)
    if choice == "triton" and not HAS_TRITON:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton")
    if choice == "auto" and device.type == "cuda" and not HAS_TRITON:
        _warn_of_absence()
    return choice == "triton" or (choice == "auto" and device.type == "cuda" and HAS_TRITON)


def _checked(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source}: {choice!r} is none of {', '.join(CHOICES)}")
    return choice


@cache
def _warn_of_absence() -> None:
    warnings.warn(
        "deformable attention runs in plain PyTorch, several times slower than need be, for Triton "
        f"is not installed: pip install triton, or say that it is meant with {VARIABLE}=reference",
        stacklevel=2,
    )
