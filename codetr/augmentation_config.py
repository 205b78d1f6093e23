"""Typed settings of the "++" data: large-scale jitter and copy-paste (method.md, training recipe).

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from codetr.strict import Strict


class JitterConfig(Strict):
    """Large-scale jitter on a canvas of fixed size (Simple Copy-Paste, section 3). It takes the
    place of ``short_sides``, ``max_side`` and ``crop``; evaluation fits images to the canvas."""

    enabled: bool = False
    canvas: PositiveInt = 1024
    """Side in pixels of the square on which images lie, at the top left. What reaches beyond it is
    cropped, at a random place; objects of which nothing is left are gone."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """An image's size is drawn between these multiples of that at which it just fits."""
    fill: Annotated[int, Field(ge=0, le=255)] = 114
    """Grey of the canvas, before normalisation."""
    padding_mask: bool = False
    """True: what the image leaves of the canvas is padding as any other, masked and no part of the
    image. False: it is image, in evaluation too (the original's ``with_attn_mask=False``;
    method.md 5)."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={[*self.scale]} must be the smallest and the largest multiple")
        return self


class CopyPasteConfig(Strict):
    """Objects of another, equally jittered image are pasted over an image (Simple Copy-Paste), at
    the places where they are. How many is uniform between none and all of them."""

    enabled: bool = False
    max_objects: PositiveInt = 100
    """So many of them at most."""
    shapes: Literal["masks", "boxes"] = "masks"
    """What is copied: the objects' masks, which the annotations must then have; or all that is in
    their boxes, for data without masks, as Objects365."""
    box_tolerance: NonNegativeFloat = 10
    """Pixels on a canvas of 1024, and in proportion on others. An object that was pasted over is
    kept where no side of its box has moved farther …"""
    min_visible: NonNegativeFloat = 300
    """… or where more than so many pixels of it are still seen, again on a canvas of 1024."""

    @property
    def needs_masks(self) -> bool:
        """Whether the annotations must have masks."""
        return self.enabled and self.shapes == "masks"
