"""Random draws as the original made them: recorded in a golden folder, fed to our detector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from codetr.heads.rpn import Rpn
from codetr.queries import denoising
from codetr.queries.denoising import Noise

Trace = dict[str, Tensor]


@contextmanager
def recorded_draws(outputs: Trace) -> Iterator[list[str]]:
    """``torch.randperm`` gives the recorded permutations, in the order they were drawn.

    Yields:
        the names of the recorded draws that have not been used yet.
    """
    names = sorted(name for name in outputs if name.startswith("21_randperm"))

    def randperm(n: int, **_: Any) -> Tensor:
        # A draw that decides nothing (all candidates are taken) is skipped by us.
        while names and len(outputs[names[0]]) != n:
            names.pop(0)
        assert names, f"no recorded permutation of {n} is left"
        return outputs[names.pop(0)].long()

    with mock.patch("torch.randperm", randperm):
        yield names


@contextmanager
def recorded_noise(outputs: Trace, counts: list[int]) -> Iterator[None]:
    """The noise of denoising queries is the recorded one.

    Args:
        outputs: of the golden folder; its draws are those of all copies of all images' objects.
        counts: number of objects of each image.
    """
    images = iter(range(len(counts)))

    def draw_noise(copies: int, objects: int, *_: Any) -> Noise:
        image = next(images)
        assert counts[image] == objects
        of_image = slice(sum(counts[:image]), sum(counts[: image + 1]))
        draws = _noise_of_all_images(outputs)
        shape = (copies, sum(counts))
        return Noise(**{n: d.reshape(*shape, *d.shape[1:])[:, of_image] for n, d in draws.items()})

    with mock.patch.object(denoising, "draw_noise", draw_noise):
        yield


def _noise_of_all_images(outputs: Trace) -> dict[str, Tensor]:
    """The recorded noise; only labels that are replaced had a new one drawn."""
    draws = {n.removeprefix("02a_dn_draw."): d for n, d in outputs.items() if n.startswith("02a_")}
    flip = draws["label_noise_uniform"]
    label = torch.zeros(len(flip), dtype=torch.int64)
    label[(flip < 0.25).nonzero().squeeze(1)] = draws["label_noise_new_label"]
    sign = draws["box_noise_sign01"] * 2 - 1
    return {"flip": flip, "label": label, "sign": sign, "shift": draws["box_noise_uniform"]}


@contextmanager
def recorded_proposals(outputs: Trace, images: int, device: str) -> Iterator[list[list[Tensor]]]:
    """The RPN's proposals are the recorded ones, where there are any: the order of near ties among
    them is fragile, and the random samples depend on it.

    Yields:
        what the RPN really proposed, one entry for each call.
    """
    names = [f"15_rpn_proposals.img{i}" for i in range(images)]
    actual: list[list[Tensor]] = []
    propose = Rpn.propose

    def replay(*arguments: Any) -> list[Tensor]:
        actual.append(propose(*arguments))
        if not all(name in outputs for name in names):
            return actual[-1]
        return [outputs[name][:, :4].to(device) for name in names]

    with mock.patch.object(Rpn, "propose", replay):
        yield actual
