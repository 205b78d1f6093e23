"""Random draws that belong to an image, whatever batch or rank it is in."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from codetr.structures import Targets
from codetr.transfer import moved


def draw_generator(targets: Targets, purpose: str = "") -> torch.Generator | None:
    """A CPU generator seeded by the image; None (torch's global one) where it has no seed.

    Args:
        targets: of one image.
        purpose: different words give independent streams, so that one part's draws do not depend
            on how much another part drew.
    """
    if targets.seed is None:
        return None
    salt = zlib.crc32(purpose.encode())
    return torch.Generator().manual_seed(targets.seed ^ salt)


def with_seeds(targets: Sequence[Targets]) -> list[Targets]:
    """The same targets, each with a seed: those that have none are given one from torch's global
    generator, which is asked once, however much the parts of the detector draw from the seeds.
    """
    without = sum(t.seed is None for t in targets)
    if not without:
        return list(targets)
    drawn = iter(torch.randint(2**63 - 1, (without,)).tolist())
    return [replace(t, seed=next(drawn)) if t.seed is None else t for t in targets]


def random_subset(indices: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` of (n,) ``indices`` in random order; all of them, in their own, if there are fewer.

    ``torch.randperm`` is called once if there is anything to choose and else not at all.
    """
    if len(indices) <= count:
        return indices
    chosen = torch.randperm(len(indices), generator=generator)[:count]
    return indices[moved(chosen, indices.device)]


@contextmanager
def forked_rng(name: str) -> Iterator[None]:
    """Seed torch's CPU generator by ``name`` and the current seed; restore it afterwards.

    A part built within has initial weights that do not depend on which other parts were built
    before it, and leaves the others' alone.
    """
    seed = torch.initial_seed() ^ zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def sample_balanced(
    assigned: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random positives and negatives of one image (method.md 41, 43).

    Args:
        assigned: (N,) number of an object (positive), -1 for background (negative), less for
            neither; best on the CPU, where looking at it costs no synchronisation.
        count: how many of both together; negatives fill what positives leave.
        positive_fraction: at most this share of ``count`` are positives.

    Returns:
        Indices of positives and of negatives, both ascending; positives are drawn first.
    """
    positive = (assigned >= 0).nonzero().squeeze(1)
    positive = random_subset(positive, int(count * positive_fraction), generator).sort().values
    negative = (assigned == -1).nonzero().squeeze(1)
    negative = random_subset(negative, count - len(positive), generator).sort().values
    return positive, negative
