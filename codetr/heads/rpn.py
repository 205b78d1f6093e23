"""Region proposal network (method.md 40-42)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from codetr.boxes import decode_deltas, encode_deltas
from codetr.config import RpnConfig
from codetr.distributed import normaliser
from codetr.heads.anchors import Anchors, anchors_for, octave_scales
from codetr.heads.dense import flatten_maps, init_convs, top_per_level
from codetr.losses import binary_cross_entropy, l1_loss
from codetr.matching.max_iou import match_anchors
from codetr.matching.objects import pad_objects
from codetr.sampling import draw_generator, sample_balanced
from codetr.structures import Size, Targets
from codetr.transfer import moved


@dataclass
class RpnPrediction:
    """What the network says at each of the N anchors.

    Attributes:
        anchors: of every shape on every cell.
        logits: (B, N) whether there is an object.
        deltas: (B, N, 4) from anchor to object.
    """

    anchors: Anchors
    logits: Tensor
    deltas: Tensor


class Rpn(nn.Module):
    """Class-agnostic proposals on all levels (Faster R-CNN, section 3.1).

    Its samples are those that each image's seed and ``stream`` draw.
    """

    def __init__(
        self, config: RpnConfig, channels: int, strides: Sequence[int], *, stream: str = "rpn"
    ) -> None:
        super().__init__()
        self.config, self.strides, self.stream = config, tuple(strides), stream
        octaves = config.anchor_scales_per_octave
        self.scales = octave_scales(config.octave_base_scale, octaves)
        shapes = octaves * len(config.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls = nn.Conv2d(channels, shapes, 1)
        self.reg = nn.Conv2d(channels, shapes * 4, 1)
        init_convs(self)

    def forward(self, pyramid: Sequence[Tensor]) -> RpnPrediction:
        hidden = [self.conv(level).relu_() for level in pyramid]
        return RpnPrediction(
            anchors_for(pyramid, self.strides, self.scales, self.config.ratios),
            flatten_maps([self.cls(h) for h in hidden], 1).squeeze(-1).float(),
            flatten_maps([self.reg(h) for h in hidden], 4).float(),
        )

    def losses(
        self, prediction: RpnPrediction, sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """``rpn_cls`` and ``rpn_l1`` on a random sample of each image's anchors, both divided by
        the number of samples, of which every image counts at least one positive."""
        anchors, count = prediction.anchors, len(prediction.anchors.boxes)
        assigned = self.assign(anchors, sizes, targets)
        samples = self.sample(assigned, targets)
        # From here on the anchors of all images are laid end to end.
        positive = torch.cat([p + i * count for i, (p, _) in enumerate(samples)])
        negative = torch.cat([n + i * count for i, (_, n) in enumerate(samples)])
        sampled = moved(torch.cat((positive, negative)), assigned.device)
        labels = torch.arange(len(sampled), device=sampled.device) < len(positive)
        positive = sampled[: len(positive)]

        objects, _ = pad_objects(targets)
        boxes = objects[positive // count, assigned.flatten()[positive]]
        deltas = encode_deltas(anchors.boxes[positive % count], boxes)
        total = normaliser(sum(max(len(p), 1) + max(len(n), 1) for p, n in samples), sampled.device)
        cls = binary_cross_entropy(prediction.logits.flatten()[sampled], labels)
        l1 = l1_loss(prediction.deltas.flatten(0, 1)[positive], deltas)
        return {"rpn_cls": cls / total, "rpn_l1": l1 / total}

    @torch.no_grad()
    def assign(self, anchors: Anchors, sizes: Sequence[Size], targets: Sequence[Targets]) -> Tensor:
        """(B, N) the object of each anchor, ``BACKGROUND`` or ``IGNORED``."""
        objects, _ = pad_objects(targets)
        return match_anchors(
            anchors.boxes,
            anchors.valid(sizes),
            objects,
            positive=0.7,
            negative=0.3,
            low_quality=0.3,
        )

    def sample(self, assigned: Tensor, targets: Sequence[Targets]) -> list[tuple[Tensor, Tensor]]:
        """Sampled positives and negatives of each image, ascending, on the CPU."""
        return [
            sample_balanced(
                of_image,
                self.config.samples,
                self.config.positive_fraction,
                draw_generator(objects, self.stream),
            )
            for of_image, objects in zip(assigned.cpu(), targets, strict=True)
        ]

    @torch.no_grad()
    def propose(
        self, prediction: RpnPrediction, sizes: Sequence[Size], per_level: int
    ) -> list[Tensor]:
        """The best boxes of each image, (n, 4) xyxy pixels, without gradient.

        Args:
            prediction: of this network.
            sizes: valid (height, width), to which boxes are clipped; a box that lies in the
                padding is empty then, and dropped.
            per_level: at most this many of each level enter non-maximum suppression.
        """
        anchors = prediction.anchors
        scores = prediction.logits.sigmoid()
        index = top_per_level(scores, anchors.counts, per_level)
        scores = scores.gather(1, index)
        deltas = prediction.deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = decode_deltas(anchors.boxes[index], deltas)
        levels = anchors.levels[index]
        proposals = []
        for image, size in enumerate(sizes):
            clipped = clip_boxes_to_image(boxes[image], size)
            some = (clipped[:, 2:] > clipped[:, :2]).all(1).nonzero().squeeze(1)
            clipped = clipped[some]
            kept = leading_nms(
                clipped,
                scores[image, some],
                levels[image, some],
                iou=self.config.nms,
                keep=self.config.keep,
            )
            proposals.append(clipped[kept])
        return proposals


def leading_nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou: float, keep: int) -> Tensor:
    """Indices of the ``keep`` best boxes after non-maximum suppression in each group, best first.

    They are ``batched_nms(boxes, scores, groups, iou)[:keep]`` but for the order of equal scores.
    Whether a box stays depends on better ones alone, so only the best boxes enter, and twice as
    many where too few of those stay: on a CPU torchvision compares on one core, and each box with
    every one that stays.

    Args:
        boxes: (n, 4) xyxy.
        scores: (n,).
        groups: (n,) boxes of different groups do not suppress each other.
        iou: beyond it the box with the lower score is suppressed.
        keep: at most so many indices.
    """
    order = scores.argsort(descending=True, stable=True)
    count = 2 * keep
    while True:
        best = order[:count]
        kept = batched_nms(boxes[best], scores[best], groups[best], iou)[:keep]
        if len(kept) == keep or count >= len(order):
            return best[kept]
        count *= 2
