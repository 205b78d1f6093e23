"""A canvas of fixed size, on which large-scale jitter lays its images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from codetr.structures import Size


@dataclass(frozen=True)
class Canvas:
    """A square on which an image lies at the top left.

    Attributes:
        side: in pixels.
        colour: (3,) what the image leaves free, normalised as images are.
        masked: that is padding; False: it is as good as image.
    """

    side: int
    colour: Tensor
    masked: bool

    @property
    def size(self) -> Size:
        return self.side, self.side

    def hold(self, image: Tensor) -> Tensor:
        """(3, side, side) of an image (3, h, w) that is no larger."""
        whole = self.colour[:, None, None].expand(-1, *self.size).contiguous()
        whole[:, : image.shape[1], : image.shape[2]] = image
        return whole

    def hold_masks(self, masks: Tensor) -> Tensor:
        """(n, side, side) of an image's masks (n, h, w)."""
        height, width = masks.shape[1:]
        return functional.pad(masks, (0, self.side - width, 0, self.side - height))
