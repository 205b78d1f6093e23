"""Randomness: seeds by what is drawn, and the state of every generator in between."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch

INITIALISATION, EPOCH = 0, 1
"""Streams of randomness: the initial weights; what an epoch draws, by epoch and rank."""


def seed_everything(seed: int, *stream: int) -> None:
    """Seed Python's, numpy's and torch's global generators; streams are independent."""
    words = np.random.SeedSequence((seed, *stream)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators, as plain values and tensors.

    Args:
        device: that of the training; a GPU has a generator of its own.
    """
    kind, words, *rest = cast("tuple[Any, ...]", np.random.get_state())
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Have the generators go on where :func:`generator_states` found them."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
