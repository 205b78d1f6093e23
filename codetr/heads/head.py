"""What every auxiliary head is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from codetr.structures import Detections, HeadOutput, Size, Targets


@dataclass(frozen=True)
class HeadContext:
    """What a head must know of the detector around it.

    Attributes:
        name: unique in the detector; the head's random draws are its own by it.
        channels: of the memory pyramid.
        num_classes: without background.
        strides: of the memory pyramid in pixels, finest first, its extra level included.
        groups: of group norms; a divisor of ``channels``.
        official_defects: hand over positives with the original's defects (method.md 49).
    """

    name: str
    channels: int
    num_classes: int
    strides: tuple[int, ...]
    groups: int = 32
    official_defects: bool = False


class Head(nn.Module):
    """A one-to-many detector on the memory pyramid: losses in training, detections alone.

    ``pyramid`` is a list of (B, C, h, w) maps, finest first; ``sizes`` are the valid
    (height, width) of the images in pixels. Boxes are xyxy in pixels of the network's input.
    """

    def forward(
        self, pyramid: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[Targets]
    ) -> HeadOutput:
        """Unweighted losses, named as the configuration's ``loss_weights``, and the positives.

        A loss that has nothing to count, in a batch without objects, is a zero that still depends
        on its parameters: each gets a gradient on every step.
        """
        raise NotImplementedError

    def detect(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Detections of each image by this head alone, best first (table 11)."""
        raise NotImplementedError

    def class_scores(self, pyramid: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """(B, classes): how much of each class this head finds in each image; its gradient on the
        pyramid says where it finds it (Grad-CAM, :mod:`codetr.analysis.conflicts`).

        The sum of the class's probability over all that the head predicts for an image: every valid
        anchor or point of a dense head, every proposal of an R-CNN. Background, centerness and
        objectness do not count: it is the head's classification alone. What lies in the padding is
        left out, and an image's scores do not depend on the others of the batch.
        """
        raise NotImplementedError
