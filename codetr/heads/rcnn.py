"""Second stage of Faster R-CNN: classify and refine proposals (method.md 43-45)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import clip_boxes_to_image

from codetr.boxes import decode_deltas, pairwise_iou
from codetr.config import RcnnConfig
from codetr.distributed import normaliser
from codetr.heads.dense import conv_tower, nms_by_class
from codetr.heads.regions import region_features
from codetr.losses import cross_entropy, giou_loss
from codetr.matching.max_iou import match_max_iou
from codetr.matching.objects import pad_objects
from codetr.ops.roi_align import RegionFeatures
from codetr.sampling import draw_generator, sample_balanced
from codetr.structures import Detections, HeadOutput, Positives, Size, Targets
from codetr.transfer import moved


@dataclass
class RoiSamples:
    """The regions of one image that the second stage is trained on.

    Attributes:
        boxes: (S, 4) xyxy pixels; the P positives first.
        labels: (P,) class of each positive's object.
        targets: (P, 4) that object's box.
        numbers: (P,) that object's number in its image.
        assigned: (A,) on the CPU, the same of every region that was positive, sampled or not.
    """

    boxes: Tensor
    labels: Tensor
    targets: Tensor
    numbers: Tensor
    assigned: Tensor


@dataclass
class RoiOutput(HeadOutput):
    """What the second stage gives in training.

    Attributes:
        samples: the regions of each image that it was trained on.
    """

    samples: list[RoiSamples]


class Rcnn(nn.Module):
    """Convolutions, if any, and fully connected layers on each region's RoIAlign feature.

    Its samples are those that each image's seed and ``stream`` draw.
    """

    def __init__(
        self,
        config: RcnnConfig,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        groups: int = 32,
        *,
        stream: str = "rcnn",
    ) -> None:
        super().__init__()
        self.config, self.num_classes, self.strides = config, num_classes, tuple(strides)
        self.stream = stream
        boxes = 1 if config.class_agnostic else num_classes
        self.convs = conv_tower(channels, config.convs, groups, bias=False)
        self.fc1 = nn.Linear(channels * config.roi_size**2, config.fc_dim)
        second = config.fcs == 2
        self.fc2 = nn.Linear(config.fc_dim, config.fc_dim) if second else nn.Identity()
        self.cls = nn.Linear(config.fc_dim, num_classes + 1)
        self.reg = nn.Linear(config.fc_dim, boxes * 4)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        for layer in (self.fc1, self.fc2):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)

    def forward(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> RoiOutput:
        """Losses ``rcnn_cls`` and ``rcnn_giou`` on sampled proposals, and which were positive."""
        samples = self.sample(proposals, targets)
        features = self.roi_features(pyramid, [s.boxes for s in samples])
        logits, deltas = self.predict(features.cells)
        means = features.means.split([len(s.boxes) for s in samples])
        positives = [_positives(s, of_image) for s, of_image in zip(samples, means, strict=True)]
        return RoiOutput(self._losses(logits, deltas, samples), positives, samples)

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Targets]) -> list[RoiSamples]:
        """A random sample of each image's objects and proposals (n, 4), objects in front."""
        objects, _ = pad_objects(targets)
        overlaps = pairwise_iou(objects, pad_sequence(list(proposals), batch_first=True))
        assigned = match_max_iou(overlaps, positive=0.5, negative=0.5).cpu()
        samples = []
        for of_image, boxes, t in zip(assigned, proposals, targets, strict=True):
            numbers = torch.cat((torch.arange(len(t)), of_image[: len(boxes)]))
            positive, negative = sample_balanced(
                numbers,
                self.config.samples,
                self.config.positive_fraction,
                draw_generator(t, self.stream),
            )
            chosen = moved(torch.cat((positive, negative)), boxes.device)
            matched = moved(numbers[positive], boxes.device)
            candidates = torch.cat((t.boxes, boxes))
            samples.append(
                RoiSamples(
                    boxes=candidates[chosen],
                    labels=t.labels[matched],
                    targets=t.boxes[matched],
                    numbers=matched,
                    assigned=numbers[numbers >= 0],
                )
            )
        return samples

    def roi_features(self, pyramid: Sequence[Tensor], boxes: Sequence[Tensor]) -> RegionFeatures:
        """What is read in the regions of all images, each from the level of its size.

        Args:
            pyramid: (B, C, h, w) maps of ``strides``.
            boxes: (n, 4) xyxy pixels of each image.
        """
        return region_features(
            pyramid,
            self.strides,
            boxes,
            size=self.config.roi_size,
            finest_scale=self.config.finest_scale,
        )

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, classes + 1), background last, and deltas (R, classes, 4)."""
        hidden = self.convs(features).flatten(1)
        hidden = self.fc1(hidden).relu_()
        if self.config.fcs == 2:
            hidden = self.fc2(hidden).relu_()
        deltas = self.reg(hidden).float().unflatten(1, (-1, 4))
        # Where one box serves all classes, it is shown once for each.
        return self.cls(hidden).float(), deltas.expand(-1, self.num_classes, -1)

    def class_scores(self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor]) -> Tensor:
        """(B, classes): probability of each class, summed over each image's proposals (n, 4)."""
        logits, _ = self.predict(self.roi_features(pyramid, proposals).cells)
        scores = logits.softmax(-1)[:, :-1].split([len(p) for p in proposals])
        return torch.stack([of_image.sum(0) for of_image in scores])

    def _losses(
        self, logits: Tensor, deltas: Tensor, samples: Sequence[RoiSamples]
    ) -> dict[str, Tensor]:
        boxes = torch.cat([s.boxes for s in samples])
        # Behind each image's positives the background takes the rest of its rows.
        labels = torch.cat(
            [
                functional.pad(s.labels, (0, len(s.boxes) - len(s.labels)), value=self.num_classes)
                for s in samples
            ]
        )
        positive = (labels < self.num_classes).nonzero().squeeze(1)
        refined = decode_deltas(
            boxes[positive], deltas[positive, labels[positive]], self.config.stds
        )
        count = normaliser(len(boxes), logits.device)
        return {
            "rcnn_cls": cross_entropy(logits, labels) / count,
            "rcnn_giou": giou_loss(refined, torch.cat([s.targets for s in samples])) / count,
        }

    @torch.no_grad()
    def detect(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[Detections]:
        """Detections from proposals (n, 4) of each image (method.md 59)."""
        logits, deltas = self.predict(self.roi_features(pyramid, proposals).cells)
        scores = logits.softmax(-1)[:, :-1]
        boxes = decode_deltas(torch.cat(list(proposals))[:, None], deltas, self.config.stds)
        counts = [len(p) for p in proposals]
        detections = []
        for s, b, size in zip(scores.split(counts), boxes.split(counts), sizes, strict=True):
            row, label = (s > self.config.test_score).nonzero(as_tuple=True)
            clipped = clip_boxes_to_image(b[row, label], size)
            detections.append(
                nms_by_class(
                    clipped,
                    s[row, label],
                    label,
                    iou=self.config.test_nms,
                    keep=self.config.test_keep,
                )
            )
        return detections


def _positives(samples: RoiSamples, features: Tensor) -> Positives:
    index = torch.arange(len(samples.boxes), device=samples.boxes.device)
    count = len(samples.labels)
    return Positives(
        boxes=samples.boxes,
        features=features,
        positive=index[:count],
        negative=index[count:],
        labels=samples.labels,
        targets=samples.targets,
        assigned=samples.assigned,
    )
