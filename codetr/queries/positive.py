"""Customised positive queries: an auxiliary head's positives as queries of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codetr.boxes import extents, xyxy_to_cxcywh
from codetr.config import PositiveQueryConfig
from codetr.distributed import world_max
from codetr.sampling import draw_generator, random_subset
from codetr.structures import KnownTargets, Positives, QueryGroup, Size, Targets
from codetr.transfer import moved
from codetr.transformer.positions import encode_boxes


class PositiveQueries(nn.Module):
    """Makes the query group of one auxiliary head (section 3.3, equation 4).

    Boxes are transformed to content and position; with ``dynamic_anchors`` to content alone,
    because the decoder computes positions (method.md 53).
    """

    def __init__(
        self,
        config: PositiveQueryConfig,
        channels: int,
        num_classes: int,
        *,
        dynamic_anchors: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.num_classes, self.channels = config, num_classes, channels
        embedded = channels if dynamic_anchors else 2 * channels
        self.position = nn.Linear(2 * channels, embedded)
        self.position_norm = nn.LayerNorm(embedded)
        nn.init.xavier_uniform_(self.position.weight)
        if config.features:
            self.feature = nn.Linear(channels, channels)
            self.feature_norm = nn.LayerNorm(channels)
            nn.init.xavier_uniform_(self.feature.weight)
        if dynamic_anchors:
            self.head_embedding = None
            return
        # Tells the decoder which head a query comes from. The original declares one scalar for
        # each head instead of a vector (method.md 53).
        self.head_embedding = nn.Parameter(torch.zeros(1 if config.official_defects else channels))

    def forward(
        self,
        name: str,
        positives: Sequence[Positives],
        sizes: Sequence[Size],
        targets: Sequence[Targets],
    ) -> QueryGroup:
        """The group ``positive/NAME`` of one head's positives in each image.

        Args:
            name: of the head.
            positives: what the head's assignment found, image by image.
            sizes: valid (height, width) of each image in pixels.
            targets: of each image; only their seeds are read.
        """
        chosen = self._choose(name, positives, targets)
        boxes = _gather([p.boxes for p in positives], chosen.candidates)
        boxes = (xyxy_to_cxcywh(boxes) / extents(sizes, boxes)[:, None]).detach()
        if self.config.padding == "zeros":
            boxes = boxes * chosen.valid[..., None]
        content, position = self._embed(boxes, positives, chosen)
        objects = xyxy_to_cxcywh(chosen.objects) / extents(sizes, boxes)[:, None]
        is_object = chosen.labels < self.num_classes
        return QueryGroup(
            name=f"positive/{name}",
            content=content,
            position=position,
            reference=boxes,
            targets=KnownTargets(
                labels=chosen.labels,
                boxes=objects * is_object[..., None],
                label_weights=chosen.valid.float(),
            ),
            valid=chosen.valid if chosen.padded and self.config.padding != "zeros" else None,
        )

    def _embed(
        self, boxes: Tensor, positives: Sequence[Positives], chosen: _Chosen
    ) -> tuple[Tensor, Tensor | None]:
        """Content (B, Q, C) of equation 4, and position unless the decoder computes it."""
        encoding = encode_boxes(boxes.clamp(0, 1), self.channels // 2)
        content = self.position_norm(self.position(encoding.to(self.position.weight.dtype)))
        position = None
        if self.head_embedding is not None:
            position, content = content.chunk(2, dim=-1)
            position = position + self.head_embedding
        if self.config.features:
            rows = chosen.candidates // positives[0].per_feature
            features = _gather([p.features for p in positives], rows)
            content = content + self.feature_norm(self.feature(features))
        return content, position

    def _choose(
        self, name: str, positives: Sequence[Positives], targets: Sequence[Targets]
    ) -> _Chosen:
        """Bring every image to the same number of queries (method.md 48, 49).

        The number is that of the image with most positives, of all ranks, within the configured
        bounds. Other images are filled with random negatives, whose target is background; where
        there are too few of those, with padding that neither attends nor is trained.
        """
        device = positives[0].boxes.device
        most = world_max(max(len(p.positive) for p in positives), device)
        count = max(min(most, self.config.max), self.config.min)
        rows = [
            self._choose_in_image(p, count, draw_generator(t, f"positive/{name}"))
            for p, t in zip(positives, targets, strict=True)
        ]
        lengths = [len(row.candidates) for row in rows]
        filled = torch.arange(count) < torch.tensor(lengths)[:, None]
        pad = [(0, count - length) for length in lengths]
        return _Chosen(
            candidates=_stack([r.candidates for r in rows], pad),
            labels=_stack([r.labels for r in rows], pad, self.num_classes),
            objects=_stack([r.objects for r in rows], [(0, 0, *p) for p in pad]),
            valid=moved(filled, device),
            padded=min(lengths) < count,
        )

    def _choose_in_image(
        self, positives: Positives, count: int, generator: torch.Generator | None
    ) -> _Row:
        order = random_subset(torch.arange(len(positives.positive)), count, generator)
        order = moved(order, positives.positive.device)
        candidates = positives.positive[order]
        missing = count - len(candidates)
        negatives = positives.negative[:0]
        if missing and self.config.padding == "negatives":
            negatives = random_subset(positives.negative, missing, generator)
        background = positives.labels.new_full((len(negatives),), self.num_classes)
        return _Row(
            candidates=torch.cat((candidates, negatives)),
            labels=torch.cat((positives.labels[order], background)),
            objects=torch.cat(
                (positives.targets[order], positives.targets.new_zeros(len(negatives), 4))
            ),
        )


@dataclass
class _Row:
    """The queries of one image: candidate indices (n,), labels (n,), target boxes (n, 4)."""

    candidates: Tensor
    labels: Tensor
    objects: Tensor


@dataclass
class _Chosen:
    """The queries of all images: candidate indices (B, Q), labels (B, Q), target boxes (B, Q, 4) in
    pixels, and which of them (B, Q) are no padding."""

    candidates: Tensor
    labels: Tensor
    objects: Tensor
    valid: Tensor
    padded: bool


def _stack(rows: list[Tensor], pad: Sequence[tuple[int, ...]], value: float = 0) -> Tensor:
    return torch.stack(
        [nn.functional.pad(row, p, value=value) for row, p in zip(rows, pad, strict=True)]
    )


def _gather(candidates: list[Tensor], indices: Tensor) -> Tensor:
    """(B, Q, D): rows ``indices`` (B, Q) of each image's candidates (N, D).

    An image without a single candidate has padding alone, of zeros: Faster R-CNN proposes nothing
    where all boxes are empty.
    """
    rows = [
        c[i] if len(c) else c.new_zeros(len(i), c.shape[1])
        for c, i in zip(candidates, indices, strict=True)
    ]
    return torch.stack(rows)
