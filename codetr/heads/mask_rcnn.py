"""Mask R-CNN as an auxiliary head (Mask R-CNN, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from codetr.config import MaskConfig, MaskRcnnConfig
from codetr.distributed import normaliser
from codetr.heads.faster_rcnn import FasterRcnnHead
from codetr.heads.head import HeadContext
from codetr.heads.rcnn import RoiSamples
from codetr.heads.regions import region_features
from codetr.losses import binary_cross_entropy
from codetr.structures import Targets


class MaskRcnnHead(FasterRcnnHead):
    """Faster R-CNN with a third branch, which predicts the mask of each positive region.

    Its detections and its positives are boxes, as the other heads': masks only teach.
    """

    config: MaskRcnnConfig

    def __init__(self, config: MaskRcnnConfig, context: HeadContext) -> None:
        super().__init__(config, context)
        self.mask = MaskBranch(
            config.mask,
            context.channels,
            context.num_classes,
            context.strides[:-1],
            config.rcnn.finest_scale,
        )

    def further_losses(
        self, pyramid: Sequence[Tensor], samples: Sequence[RoiSamples], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        return {"mask": self.mask(pyramid, samples, targets)}


class MaskBranch(nn.Module):
    """A small fully convolutional network on each region's RoIAlign feature."""

    def __init__(
        self,
        config: MaskConfig,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        finest_scale: float,
    ) -> None:
        super().__init__()
        self.config, self.strides, self.finest_scale = config, tuple(strides), finest_scale
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(config.convs):
            before = config.channels if number else channels
            layers[f"conv{number}"] = nn.Conv2d(before, config.channels, 3, padding=1)
            layers[f"act{number}"] = nn.ReLU(inplace=True)
        self.convs = nn.Sequential(layers)
        before = config.channels if config.convs else channels
        self.upsample = nn.ConvTranspose2d(before, config.channels, 2, stride=2)
        self.logits = nn.Conv2d(config.channels, num_classes, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(
        self, pyramid: Sequence[Tensor], samples: Sequence[RoiSamples], targets: Sequence[Targets]
    ) -> Tensor:
        """Mean cross entropy of the pixels of all positives' masks, each in its own class.

        Raises:
            ValueError: an image has no masks.
        """
        positives = [s.boxes[: len(s.labels)] for s in samples]
        logits = self.predict(pyramid, positives)
        labels = torch.cat([s.labels for s in samples])
        own = logits[torch.arange(len(labels), device=labels.device), labels]
        wanted = torch.cat(
            [
                mask_targets(t, s.numbers, boxes, self.size)
                for t, s, boxes in zip(targets, samples, positives, strict=True)
            ]
        )
        pixels = normaliser(own.numel(), own.device)
        return binary_cross_entropy(own.flatten(), wanted.flatten()) / pixels

    @property
    def size(self) -> int:
        """Side of the predicted masks in cells."""
        return 2 * self.config.roi_size

    def predict(self, pyramid: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """(R, classes, size, size) logits of the masks in the regions (n, 4) of all images."""
        features = region_features(
            pyramid,
            self.strides,
            boxes,
            size=self.config.roi_size,
            finest_scale=self.finest_scale,
        )
        hidden = self.upsample(self.convs(features.cells)).relu()
        logits: Tensor = self.logits(hidden).float()
        return logits


@torch.no_grad()
def mask_targets(targets: Targets, numbers: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(P, size, size) share of each cell that the object's mask covers, in [0, 1].

    Aligned, as the features are: torchvision's own targets lie half a pixel aside. They stay
    shares; MMDetection rounds them to 0 and 1.

    Args:
        targets: of one image, with masks.
        numbers: (P,) the object of each region.
        boxes: (P, 4) the regions, xyxy in pixels.
        size: cells along each side of a region.

    Raises:
        ValueError: there are no masks.
    """
    if targets.masks is None:
        raise ValueError(
            f"image {targets.image_id} has no masks, which Mask R-CNN is trained on: open the data "
            "with masks=True"
        )
    if not len(numbers):
        return boxes.new_zeros(0, size, size)
    regions = torch.cat((numbers[:, None].to(boxes.dtype), boxes), dim=1)
    masks = targets.masks[:, None].to(boxes.dtype)
    return roi_align(masks, regions, size, 1.0, -1, aligned=True)[:, 0]
