"""What the parts of the detector hand to one another.

Boxes are ``xyxy`` in pixels of the network's input, except in :class:`QueryGroup` and
:class:`KnownTargets`, which live inside the decoder: there they are ``cxcywh`` normalised by each
image's own valid size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from codetr.transfer import tensor_on

Size = tuple[int, int]
"""(height, width) in pixels."""


class _Moves:
    """Gives a dataclass of tensors ``to(device)``."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass
class ImageBatch(_Moves):
    """Images of one batch, padded on the right and at the bottom to a common size.

    Attributes:
        pixels: (B, 3, H, W) float, normalised by mean and std; zero in the padding, or the colour
            of the canvas (:class:`codetr.data.canvas.Canvas`).
        sizes: valid (height, width) in pixels of each of the B images.
        contents: sizes of the images alone, where ``sizes`` are those of the canvas on which they
            lie (method.md 5); None: they are ``sizes``.
    """

    pixels: Tensor
    sizes: list[Size]
    contents: list[Size] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def padding_mask(self) -> Tensor:
        """(B, H, W) bool, True where a pixel is padding."""
        height, width = self.pixels.shape[-2:]
        device = self.pixels.device
        sizes = tensor_on(device, self.sizes)
        rows = torch.arange(height, device=device)[None, :, None] >= sizes[:, 0, None, None]
        columns = torch.arange(width, device=device)[None, None, :] >= sizes[:, 1, None, None]
        return rows | columns

    def padded(self, divisor: int) -> ImageBatch:
        """The same images, padded to multiples of so many pixels."""
        height, width = self.pixels.shape[-2:]
        if height % divisor == 0 and width % divisor == 0:
            return self
        pixels = functional.pad(self.pixels, (0, -width % divisor, 0, -height % divisor))
        return replace(self, pixels=pixels)


@dataclass
class Targets(_Moves):
    """The objects of one image.

    Attributes:
        boxes: (n, 4) float, xyxy in pixels of the network's input.
        labels: (n,) int64, contiguous class numbers from 0.
        image_id: the id in the annotation file.
        original_size: (height, width) of the image file, to which detections are scaled back.
        seed: seeds the random draws that training makes for this image (which anchors are sampled,
            which positives become queries), so that they do not depend on the other images of the
            batch or on how many workers share it. None: the detector draws one at each step.
        masks: (n, h, w) bool on the image's own valid pixels; None where no head needs them.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int = 0
    original_size: Size = (0, 0)
    seed: int | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Detections(_Moves):
    """What was found in one image, best first.

    Attributes:
        boxes: (n, 4) xyxy in pixels.
        scores: (n,) in [0, 1].
        labels: (n,) int64, contiguous class numbers from 0.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def rescaled(self, size: Size, new_size: Size) -> Detections:
        """The same detections in an image of ``new_size`` instead of ``size`` (height, width)."""
        factor = self.boxes.new_tensor([new_size[1] / size[1], new_size[0] / size[0]] * 2)
        return replace(self, boxes=self.boxes * factor)


@dataclass
class Memory:
    """Tokens of all levels of the encoder, laid end to end, finest level first.

    Attributes:
        tokens: (B, T, C).
        shapes: (height, width) in cells of each level; their areas add up to T.
        padding: (B, T) bool, True where a token lies in the padding of its image.
        valid_ratios: (B, levels, 2), share of each map's width and height that its image covers.
        position: (B, T, C) encoding of each token's place, for keys of conditional attention; None
            where attention is deformable and needs none.
    """

    tokens: Tensor
    shapes: list[Size]
    padding: Tensor
    valid_ratios: Tensor
    position: Tensor | None = None

    def maps(self) -> list[Tensor]:
        """(B, C, h, w) for each level."""
        levels = self.tokens.split([h * w for h, w in self.shapes], dim=1)
        return [
            level.transpose(1, 2).unflatten(2, shape)
            for level, shape in zip(levels, self.shapes, strict=True)
        ]


@dataclass
class Positives:
    """What an auxiliary head's assignment found in one image (equation 1).

    The candidates are the head's anchors, or its sampled proposals. They are handed over whole,
    with indices, so that nothing is copied before it is known which of them become queries.

    Attributes:
        boxes: (N, 4) every candidate, xyxy in pixels.
        features: (N / per_feature, C) the memory as the head read it at the candidates, of which
            so many in a row share one; gradients flow.
        positive: (P,) indices of the positive candidates.
        negative: (M,) indices of the negative ones.
        labels: (P,) class of the object that each positive is assigned to.
        targets: (P, 4) that object's box, xyxy in pixels.
        per_feature: the number of anchors on each cell.
        assigned: (A,) on the CPU, the number of the object of every candidate that was assigned to
            one, of which a sampler took P; None: nothing was sampled, the positives are all.
    """

    boxes: Tensor
    features: Tensor
    positive: Tensor
    negative: Tensor
    labels: Tensor
    targets: Tensor
    per_feature: int = 1
    assigned: Tensor | None = None


@dataclass
class HeadOutput:
    """What an auxiliary head gives in training.

    Attributes:
        losses: unweighted scalar loss terms by name.
        positives: one entry for each image of the batch.
    """

    losses: dict[str, Tensor]
    positives: list[Positives]


@dataclass
class KnownTargets:
    """Targets of queries that need no matching.

    Attributes:
        labels: (B, Q) int64; ``num_classes`` for background.
        boxes: (B, Q, 4) normalised cxcywh; zero for background.
        label_weights: (B, Q) 0 where a query is only padding and has no class loss.
    """

    labels: Tensor
    boxes: Tensor
    label_weights: Tensor


@dataclass
class QueryGroup:
    """Queries that enter the decoder together and see one another.

    Attributes:
        name: ``query`` for the one-to-one queries, ``denoising`` for noisy objects,
            ``one_to_many`` for further queries that are matched, ``positive/HEAD`` for a head's
            positives.
        content: (B, Q, C).
        position: (B, Q, C) added to queries and keys of the attention; None where the decoder
            computes it at each layer from the boxes (``queries.dynamic_anchors``).
        reference: (B, Q, 4) starting boxes, normalised cxcywh.
        points: the starting references are points only: width and height are not yet known, so
            offsets are in cells of the maps, not in fractions of the box (method.md 11).
        targets: known targets, or None where the criterion finds them by Hungarian matching.
        sees: names of other groups whose queries these may attend to.
        parts: so many equal parts, laid end to end, do not see one another. Without known targets
            each is matched on its own, and the loss is the mean over the parts.
        repeat: so many queries of a part are matched with each object.
        valid: (B, Q) bool, False where a query is mere padding that none may attend to; None: all.
    """

    name: str
    content: Tensor
    position: Tensor | None
    reference: Tensor
    points: bool = False
    targets: KnownTargets | None = None
    sees: tuple[str, ...] = ()
    parts: int = 1
    repeat: int = 1
    valid: Tensor | None = None

    @property
    def count(self) -> int:
        return self.content.shape[1]


@dataclass
class GroupPrediction:
    """The decoder's output for one group, layer by layer.

    Attributes:
        logits: (L, B, Q, classes).
        boxes: (L, B, Q, 4) normalised cxcywh.
    """

    logits: Tensor
    boxes: Tensor


@dataclass
class LossOutput:
    """What the detector returns in training.

    Attributes:
        total: scalar of equation 6, to call ``backward()`` on.
        losses: unweighted terms by name; the names are those of ``DetectorConfig.loss_weights``.
        statistics: detached scalars worth logging that are no losses, by name.
    """

    total: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)
