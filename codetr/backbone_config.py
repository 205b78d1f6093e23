"""Typed configuration of the backbones: sizes, published weights, and what of them is trained."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from codetr.strict import Strict

Rate = Annotated[float, Field(ge=0, lt=1)]
Stages = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Frozen = Annotated[int, Field(ge=-1, le=4)]


class _BackboneConfig(Strict):
    """What all backbones have."""

    pretrained: bool | Path = True
    """True: ``weights`` from timm's hub; a path: a file that holds them; False: random."""
    weights: str | None = None
    """timm's name of the pretrained weights; None: those that the paper starts from."""

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Strides in pixels of the maps that the backbone gives to the neck."""

    @property
    @abstractmethod
    def published(self) -> str | None:
        """timm's name of the weights to start from; None where nobody has published any."""

    def level_strides(self, levels: int) -> tuple[int, ...]:
        """Strides in pixels of the neck's maps: the backbone's, then coarser ones.

        Raises:
            ValueError: the neck cannot make so many levels of this backbone.
        """
        if levels < len(self.strides):
            raise ValueError(
                f"transformer.levels={levels} is fewer than the {len(self.strides)} "
                "backbone.stages: every stage is a level"
            )
        coarsest = self.strides[-1]
        extra = levels - len(self.strides)
        return (*self.strides, *(coarsest * 2 ** (n + 1) for n in range(extra)))


class _StagedConfig(_BackboneConfig):
    """A backbone of four stages, each of half the resolution of the one before."""

    stages: Stages = (2, 3, 4)
    """Stages whose outputs feed the neck; stage n has stride 2**(n + 1)."""

    @field_validator("stages")
    @classmethod
    def _stages_in_order(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        if not stages or list(stages) != sorted(set(stages)) or stages[-1] > 4:
            raise ValueError("stages must be increasing numbers of 1 to 4, for example [2, 3, 4]")
        return stages

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2 ** (stage + 1) for stage in self.stages)


class ResNetConfig(_StagedConfig):
    """A timm ResNet and how much of it is trained (method.md 1)."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"] = "resnet50"
    frozen_stages: Frozen = 1
    """-1 trains everything; 0 freezes the stem; n also freezes the first n stages."""
    frozen_norm: bool = True
    """Batch norm keeps its running statistics and its affine parameters are not trained."""
    width: PositiveInt = 64
    """Width of the stem and base width of the stages (64 in every published ResNet)."""
    dilated: bool = False
    """The last stage has the stride of the one before, and dilated convolutions instead: the single
    map of the detectors called DC5 (DETR, section 4)."""

    @model_validator(mode="after")
    def _dilated_alone(self) -> Self:
        if self.dilated and self.stages != (4,):
            raise ValueError("dilated makes two stages of one stride: set stages=[4]")
        return self

    @property
    def strides(self) -> tuple[int, ...]:
        return (16,) if self.dilated else super().strides

    @property
    def published(self) -> str | None:
        """torchvision's first weights, as the original."""
        return f"{self.name}.tv_in1k" if self.width == 64 and self.name != "tiny" else None


_SWIN: dict[str, dict[str, Any]] = {
    "swin_tiny": {"width": 96, "depths": (2, 2, 6, 2), "window": 7, "drop_path": 0.2},
    "swin_small": {"width": 96, "depths": (2, 2, 18, 2), "window": 7, "drop_path": 0.2},
    "swin_base": {"width": 128, "depths": (2, 2, 18, 2), "window": 12, "drop_path": 0.2},
    "swin_large": {"width": 192, "depths": (2, 2, 18, 2), "window": 12, "drop_path": 0.3},
}
"""Sizes of the published Swin transformers, and the drop path of the paper's detectors."""

_SWIN_WEIGHTS = {
    ("swin_tiny", 7): "swin_tiny_patch4_window7_224.ms_in1k",
    ("swin_small", 7): "swin_small_patch4_window7_224.ms_in1k",
    ("swin_base", 7): "swin_base_patch4_window7_224.ms_in22k",
    ("swin_base", 12): "swin_base_patch4_window12_384.ms_in22k",
    ("swin_large", 7): "swin_large_patch4_window7_224.ms_in22k",
    ("swin_large", 12): "swin_large_patch4_window12_384.ms_in22k",
}


class SwinConfig(_StagedConfig):
    """A Swin transformer. The name fixes all sizes that are not given."""

    name: Literal["swin_tiny", "swin_small", "swin_base", "swin_large"] = "swin_tiny"
    frozen_stages: Frozen = -1
    """-1 trains everything; 0 freezes the patch embedding; n also freezes the first n stages, each
    with the patch merging after it. The original's number is one higher where n > 0."""
    drop_path: Rate = 0.2
    """Probability that the last block is skipped in training; it grows linearly from 0."""
    checkpoint_blocks: bool = False
    """Recompute the blocks in the backward pass: far less memory, a third more time."""
    window: Annotated[int, Field(gt=1)] = 7
    """Side of the attention windows, in cells."""
    width: PositiveInt = 96
    """Channels of the first stage; each further stage has twice as many."""
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=4, max_length=4)] = (2, 2, 6, 2)
    """Blocks of each stage."""

    @model_validator(mode="before")
    @classmethod
    def _sizes_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {**_SWIN.get(str(data.get("name", "swin_tiny")), {}), **data}
        return data

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each stage: one for every 32 channels."""
        return tuple(max(1, self.width // 32) * 2**stage for stage in range(4))

    @property
    def published(self) -> str | None:
        sizes = _SWIN[self.name]
        known = self.width == sizes["width"] and self.depths == sizes["depths"]
        return _SWIN_WEIGHTS.get((self.name, self.window)) if known else None


class VitConfig(_BackboneConfig):
    """EVA-02's vision transformer, as the record model uses it (section 4.4): most blocks attend
    within windows, some to the whole image; a simple feature pyramid is its neck."""

    name: Literal["eva02_large"] = "eva02_large"
    frozen_stages: Annotated[int, Field(ge=-1)] = -1
    """-1 trains everything; 0 freezes the embeddings; n also freezes the first n blocks."""
    drop_path: Rate = 0.4
    """Probability that the last block is skipped in training; it grows linearly from 0."""
    checkpoint_blocks: bool = True
    """Recompute the blocks in the backward pass: far less memory, a third more time."""
    window: PositiveInt = 24
    """Side of the attention windows, in cells of 16 pixels."""
    global_every: PositiveInt = 4
    """Every n-th block attends to the whole image (4 for COCO; 3, with windows of 16, for LVIS)."""
    width: Annotated[int, Field(gt=0, multiple_of=64)] = 1024
    """Channels; there is one attention head for every 64."""
    depth: PositiveInt = 24
    """Blocks."""
    position_grid: PositiveInt = 32
    """Side of the grid of learned position embeddings, which are interpolated to the image."""

    @property
    def strides(self) -> tuple[int, ...]:
        return (16,)

    def level_strides(self, levels: int) -> tuple[int, ...]:
        if levels not in (4, 5):
            raise ValueError(
                f"transformer.levels={levels}: the pyramid of '{self.name}' has 5 levels, or 4 "
                "without the finest"
            )
        return (4, 8, 16, 32, 64)[-levels:]

    def windowed(self, block: int) -> bool:
        """Whether the block of this number, from 0, attends within windows."""
        return (block + 1) % self.global_every != 0

    @property
    def published(self) -> str | None:
        """EVA-02's masked image modelling; the grid of positions is interpolated on loading."""
        known = (self.width, self.depth) == (1024, 24)
        return "eva02_large_patch14_224.mim_m38m" if known else None


AnyBackbone = ResNetConfig | SwinConfig | VitConfig
BACKBONE_NAMES: dict[str, type[AnyBackbone]] = {
    name: family
    for family in (ResNetConfig, SwinConfig, VitConfig)
    for name in family.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
}
"""Each name and the family that it belongs to."""
BackboneConfig = Annotated[AnyBackbone, Field(discriminator="name")]
