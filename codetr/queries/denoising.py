"""Denoising: noisy objects as queries that know their target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from codetr.boxes import extents, inverse_sigmoid, xyxy_to_cxcywh
from codetr.config import DenoisingConfig
from codetr.distributed import world_max
from codetr.queries.selection import QUERY
from codetr.sampling import draw_generator
from codetr.structures import KnownTargets, QueryGroup, Size, Targets
from codetr.transfer import moved, tensor_on

DENOISING = "denoising"
"""Name of the group of noisy objects, which exists in training only."""


@dataclass
class Noise:
    """Random draws for R copies of the n objects of one image; in contrastive denoising rows are
    near, far, near, ...

    Attributes:
        flip: (R, n) uniform in [0, 1); a label is replaced where it is small enough.
        label: (R, n) int64, what it is replaced by.
        sign: (R, n, 4) -1 or 1, in which direction each side moves.
        shift: (R, n, 4) uniform in [0, 1), how far.
    """

    flip: Tensor
    label: Tensor
    sign: Tensor
    shift: Tensor


def draw_noise(
    copies: int, objects: int, num_classes: int, generator: torch.Generator | None = None
) -> Noise:
    """Noise for ``copies`` of one image's ``objects``, on the CPU (method.md 25)."""
    shape = (copies, objects)
    return Noise(
        flip=torch.rand(shape, generator=generator),
        label=torch.randint(num_classes, shape, generator=generator),
        sign=torch.randint(2, (*shape, 4), generator=generator) * 2.0 - 1.0,
        shift=torch.rand((*shape, 4), generator=generator),
    )


def noise_groups(queries: int, objects: int) -> int:
    """How many groups of ``objects`` near and as many far copies there are (method.md 24)."""
    return max(1, queries // objects) if objects else 1


class DenoisingQueries(nn.Module):
    """Makes the group ``denoising`` (DINO, section 3.3; method.md 24-28; DN-DETR, section 4).

    Each object is copied twice in each noise group: the *near* copy must find the object again,
    the *far* one must say that there is none. Not contrastive: there are near copies alone.
    DN-DETR's indicator, one channel that tells noisy from other queries, DINO has dropped, and so
    does this.
    """

    def __init__(
        self, config: DenoisingConfig, channels: int, num_classes: int, logit_eps: float
    ) -> None:
        super().__init__()
        self.config, self.num_classes, self.logit_eps = config, num_classes, logit_eps
        self.label_embedding = nn.Embedding(num_classes, channels)

    def forward(self, sizes: Sequence[Size], targets: Sequence[Targets]) -> QueryGroup:
        """The group of all images: in each noise group one slot for the near and, if contrastive,
        one for the far copy of every object of the image that has most, of all ranks.

        The slots that other images leave empty have no content and a box in the middle; their
        target is background, or nothing if not contrastive, and they are seen as the others are
        (method.md 26).

        Args:
            sizes: valid (height, width) of each image in pixels.
            targets: of each image.
        """
        device = targets[0].boxes.device
        most = world_max(max(len(t) for t in targets), device)
        groups = self.config.groups or noise_groups(self.config.queries, most)
        copies = groups * (2 if self.config.contrastive else 1)
        noise = _stack(
            [
                draw_noise(copies, len(t), self.num_classes, draw_generator(t, DENOISING))
                for t in targets
            ],
            most,
            device,
        )
        boxes = torch.stack([_pad(t.boxes, most) for t in targets])
        boxes = (boxes / extents(sizes, boxes)[:, None])[:, None]
        labels = torch.stack([_pad(t.labels, most) for t in targets])[:, None]
        counts = tensor_on(device, [len(t) for t in targets])
        filled = (torch.arange(most, device=device) < counts[:, None])[:, None]
        far = (torch.arange(copies, device=device) % 2 == 1) & self.config.contrastive

        noisy = torch.where(noise.flip < self.config.label_noise / 2, noise.label, labels)
        content = self.label_embedding(noisy) * filled[..., None]
        logits = inverse_sigmoid(self._moved(boxes, noise, far), self.logit_eps)
        is_object = filled & ~far[:, None]
        trained = torch.ones_like(noise.flip)
        if not self.config.contrastive:
            trained = trained * filled
        return QueryGroup(
            name=DENOISING,
            content=content.flatten(1, 2),
            position=None,
            reference=(logits * filled[..., None]).sigmoid().flatten(1, 2),
            targets=KnownTargets(
                labels=torch.where(is_object, labels, self.num_classes).flatten(1, 2),
                boxes=(xyxy_to_cxcywh(boxes) * is_object[..., None]).flatten(1, 2),
                label_weights=trained.flatten(1, 2),
            ),
            sees=(QUERY,),
            parts=groups,
        )

    def _moved(self, boxes: Tensor, noise: Noise, far: Tensor) -> Tensor:
        """Normalised cxcywh (B, R, M, 4) of the noisy copies of xyxy boxes (B, 1, M, 4)."""
        middle = xyxy_to_cxcywh(boxes)
        sides = middle[..., 2:]
        shift = (noise.shift + far[:, None, None]) * noise.sign * self.config.box_noise
        if self.config.contrastive:
            corners = boxes + shift * sides.repeat(1, 1, 1, 2) / 2
            return xyxy_to_cxcywh(corners.clamp(0, 1))
        return (middle + shift * torch.cat((sides / 2, sides), dim=-1)).clamp(0, 1)


def _pad(rows: Tensor, length: int, axis: int = 0) -> Tensor:
    """Zeros behind ``rows``, until there are ``length`` along ``axis``."""
    behind = [0, 0] * (rows.dim() - axis - 1) + [0, length - rows.shape[axis]]
    return functional.pad(rows, behind)


def _stack(noises: Sequence[Noise], objects: int, device: torch.device) -> Noise:
    """The noise of all images, each padded to ``objects``, with the batch as first dimension."""
    names = [f.name for f in fields(Noise)]
    padded = [[_pad(getattr(noise, name), objects, axis=1) for noise in noises] for name in names]
    return Noise(*[moved(torch.stack(images), device) for images in padded])
