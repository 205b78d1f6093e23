"""Grad-CAM on the encoder's output: where a branch of the detector looks for its classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from codetr.analysis.maps import to_image, valid_maps
from codetr.detector import CoDETR
from codetr.heads.head import Head
from codetr.queries.selection import QUERY
from codetr.structures import Memory, Size, Targets

Scores = Callable[[Memory], Tensor]
"""(B, classes), how much of each class a branch finds in each image, differentiable."""


def branch_scores(model: CoDETR, sizes: Sequence[Size]) -> dict[str, Scores]:
    """The class scores of the query head and of every auxiliary head, by the branch's name."""
    scores: dict[str, Scores] = {QUERY: partial(_query_scores, model)}
    for name, head in zip(model.config.head_names, model.heads, strict=True):
        scores[name] = partial(_head_scores, model, cast(Head, head), sizes)
    return scores


def _query_scores(model: CoDETR, memory: Memory) -> Tensor:
    """The probability of each class, summed over the one-to-one queries of the last layer."""
    prediction = model.decoder([model.queries(memory).group], memory)[QUERY]
    return prediction.logits[-1].float().sigmoid().sum(1)


def _head_scores(model: CoDETR, head: Head, sizes: Sequence[Size], memory: Memory) -> Tensor:
    return head.class_scores(model.memory_pyramid(memory), sizes)


def grad_cams(
    branches: Mapping[str, Scores],
    memory: Memory,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    *,
    alone: Memory | None = None,
) -> dict[str, list[Tensor]]:
    """Grad-CAM of each branch for the classes that are present: a map (H, W) for each image.

    What is explained is the sum of the scores of the classes of which the image has an object: one
    map for all of them together, zero for an image without objects.

    Args:
        branches: see :func:`branch_scores`.
        memory: of B images.
        targets: their objects.
        sizes: (height, width) of each image in pixels, without its canvas.
        alone: the memory of which maps are made, as of :meth:`Analysis.images_alone`; None: the
            same, where there is no canvas.
    """
    tokens = memory.tokens.detach().requires_grad_()
    source = replace(memory, tokens=tokens)
    maps = {}
    for name, scores in branches.items():
        with torch.enable_grad():
            found = scores(source)
            total = (found * present_classes(targets, found)).sum()
        # Images do not look at one another: the gradient of the sum is each one's own.
        (gradient,) = torch.autograd.grad(total, tokens)
        maps[name] = grad_cam(tokens.detach(), gradient, alone or memory, sizes)
    return maps


def present_classes(targets: Sequence[Targets], like: Tensor) -> Tensor:
    """(B, classes) one where an image has an object of the class, else zero."""
    present = torch.zeros_like(like)
    for row, objects in zip(present, targets, strict=True):
        row[objects.labels] = 1
    return present


def grad_cam(
    tokens: Tensor, gradient: Tensor, memory: Memory, sizes: Sequence[Size]
) -> list[Tensor]:
    """Grad-CAM of each image, (H, W), not negative (Selvaraju et al., equations 1 and 2).

    On each level a channel's weight is the mean gradient over the image's own cells; the weighted
    sum of the channels, where positive, is resized to the image, and averaged over the levels.

    Args:
        tokens, gradient: (B, T, C) features, and the gradient of a score on them.
        memory: gives the levels' shapes and the padding.
        sizes: valid (height, width) of each image in pixels.
    """
    pairs = zip(valid_maps(tokens, memory), valid_maps(gradient, memory), sizes, strict=True)
    return [
        torch.stack(
            [
                to_image((f * g.mean((0, 1))).sum(-1).relu(), size)
                for f, g in zip(features, gradients, strict=True)
            ]
        ).mean(0)
        for features, gradients, size in pairs
    ]
