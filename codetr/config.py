"""Typed, validated configuration of a detector, its training and its data.

Nothing here imports torch: a plan can be validated and printed within a fraction of a second.
Every default is the paper's Co-Deformable-DETR with a ResNet-50 (section 4.1), unless its
comment says otherwise; the laptop's sizes are other values of the same fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from codetr.head_config import (
    HEAD_CONFIGS,
    HEAD_TYPES,
    AnyHeadConfig,
    AtssConfig,
    FasterRcnnConfig,
    FcosConfig,
    GflConfig,
    HeadConfig,
    MaskConfig,
    MaskRcnnConfig,
    OneStageConfig,
    PaaConfig,
    RcnnConfig,
    RetinaNetConfig,
    RpnConfig,
)
from codetr.strict import ConfigError, Strict, nearest

# What is defined elsewhere and imported from here.
__all__ = [
    "HEAD_CONFIGS",
    "HEAD_TYPES",
    "AnyHeadConfig",
    "AtssConfig",
    "ConfigError",
    "FasterRcnnConfig",
    "FcosConfig",
    "GflConfig",
    "HeadConfig",
    "MaskConfig",
    "MaskRcnnConfig",
    "OneStageConfig",
    "PaaConfig",
    "RcnnConfig",
    "RetinaNetConfig",
    "RpnConfig",
    "Strict",
    "nearest",
]

T = TypeVar("T", bound=Strict)


# ----------------------------------------------------------------------------------- the detector


class BackboneConfig(Strict):
    """A timm ResNet and how much of it is trained (method.md 1)."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"] = "resnet50"
    stages: tuple[PositiveInt, ...] = (2, 3, 4)
    """Residual stages whose outputs feed the neck; stage n has stride 2**(n + 1)."""
    pretrained: bool | Path = True
    """True: timm's weights from its hub; a path: a local state dict; False: random."""
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = 1
    """-1 trains everything; 0 freezes the stem; n also freezes the first n stages."""
    frozen_norm: bool = True
    """Batch norm keeps its running statistics and its affine parameters are not trained."""
    width: PositiveInt = 64
    """Width of the stem and base width of the stages (64 in every published ResNet)."""

    @field_validator("stages")
    @classmethod
    def _stages_in_order(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        if not stages or list(stages) != sorted(set(stages)) or stages[-1] > 4:
            raise ValueError("stages must be increasing numbers of 1 to 4, for example [2, 3, 4]")
        return stages

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2 ** (stage + 1) for stage in self.stages)


class PositionEncodingConfig(Strict):
    """Sine encoding of the pixel position (method.md 7)."""

    temperature: PositiveFloat = 10000
    offset: float = -0.5


class TransformerConfig(Strict):
    """Sizes of neck, encoder and decoder."""

    embed_dim: PositiveInt = 256
    ffn_dim: PositiveInt = 2048
    attention_heads: PositiveInt = 8
    sampling_points: PositiveInt = 4
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    levels: PositiveInt = 4
    """Feature levels; those beyond the backbone's stages are stride-2 convolutions of the last."""
    group_norm_groups: PositiveInt = 32
    position_encoding: PositionEncodingConfig = PositionEncodingConfig()
    checkpoint_encoder: bool = False
    """Recompute encoder layers in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for name in ("attention_heads", "group_norm_groups"):
            if self.embed_dim % getattr(self, name):
                raise ValueError(
                    f"embed_dim={self.embed_dim} is no multiple of {name}={getattr(self, name)}"
                )
        if self.embed_dim % 4:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of 4 (sine encoding)")
        return self


class QueryConfig(Strict):
    """The one-to-one queries and how they are refined (method.md 14-23)."""

    count: PositiveInt = 300
    two_stage: bool = True
    """Queries start from the best encoder tokens; False: from learned embeddings (one stage)."""
    mixed_selection: bool = True
    """Two-stage only. Content of the queries is learned, only their positions are selected."""
    box_refinement: bool = True
    """Each decoder layer refines the boxes of the one before."""
    look_forward_twice: bool = True
    """The gradient of a layer's boxes also reaches the layer before it (DINO, section 3.5)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement: set box_refinement=true")
        return self


class BoxLossConfig(Strict):
    """Weights of classification, L1 and GIoU: of the query losses, or of the matching cost."""

    cls: NonNegativeFloat = 2.0
    l1: NonNegativeFloat = 5.0
    giou: NonNegativeFloat = 2.0


class PositiveQueryConfig(Strict):
    """Customised positive queries (section 3.3, equation 4; method.md 47-56)."""

    enabled: bool = True
    max: PositiveInt = 300
    """At most this many of one head's positives become queries, a random subset of them."""
    min: PositiveInt = 9
    padding: Literal["negatives", "mask"] = "negatives"
    """What brings an image with fewer positives to the batch's number of queries."""
    features: bool = True
    """Add the feature term of equation 4 to the content."""
    official_defects: bool = False
    """Reproduce the original's defects: one scalar for each head as head embedding, and padding
    queries with all-zero boxes where ATSS rejected an anchor (method.md 49, 53)."""


class DetectorConfig(Strict):
    """A Co-DETR detector; an empty list of heads is its DETR baseline (K = 0)."""

    num_classes: PositiveInt = 80
    backbone: BackboneConfig = BackboneConfig()
    transformer: TransformerConfig = TransformerConfig()
    queries: QueryConfig = QueryConfig()
    heads: tuple[HeadConfig, ...] = ()
    """Auxiliary heads in order; ``heads: [atss, faster_rcnn]`` takes their defaults."""
    positive_queries: PositiveQueryConfig = PositiveQueryConfig()
    lambda_1: NonNegativeFloat = 1.0
    """Weight of the losses of the positive queries (equation 6)."""
    lambda_2: NonNegativeFloat = 2.0
    """Weight of the auxiliary heads' losses (equation 6)."""
    query_loss: BoxLossConfig = BoxLossConfig()
    matching_cost: BoxLossConfig = BoxLossConfig()
    max_detections: PositiveInt = 100

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_by_name(cls, heads: Any) -> Any:
        if not isinstance(heads, (list, tuple)):
            raise ValueError("heads must be a list, for example [atss, faster_rcnn]")
        named = [{"type": head} if isinstance(head, str) else head for head in heads]
        for head in named:
            kind = head.get("type") if isinstance(head, dict) else getattr(head, "type", head)
            if kind not in HEAD_TYPES:
                raise ValueError(f"unknown head '{kind}'; {nearest(str(kind), [*HEAD_TYPES])}")
        return named

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if self.transformer.levels < len(self.backbone.stages):
            raise ValueError(
                f"transformer.levels={self.transformer.levels} is fewer than the "
                f"{len(self.backbone.stages)} backbone.stages: every stage is a level"
            )
        return self

    @property
    def k(self) -> int:
        """Number of auxiliary heads, the paper's K."""
        return len(self.heads)

    @property
    def needs_masks(self) -> bool:
        """Whether a head is trained on the objects' masks."""
        return any(isinstance(head, MaskRcnnConfig) for head in self.heads)

    @property
    def head_names(self) -> tuple[str, ...]:
        """One unique name for each head: ``atss``, and ``atss_2`` where a kind repeats."""
        kinds = [head.type for head in self.heads]
        counts = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
        return tuple(k if n == 1 else f"{k}_{n}" for k, n in zip(kinds, counts, strict=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in pixels of the encoder's levels."""
        strides = list(self.backbone.strides)
        while len(strides) < self.transformer.levels:
            strides.append(strides[-1] * 2)
        return tuple(strides)

    @property
    def head_strides(self) -> tuple[int, ...]:
        """Strides in pixels of the memory pyramid: the encoder's levels and one coarser."""
        return (*self.strides, self.strides[-1] * 2)

    def loss_weights(self) -> dict[str, float]:
        """Effective weight of every loss term in the total (equation 6).

        Names: ``query/LAYER/TERM``, ``encoder/TERM``, ``positive/HEAD/LAYER/TERM`` and
        ``HEAD/TERM``. The heads' losses stand inside equation 6's sum over the L decoder layers,
        so each carries the factor L * lambda_2.
        """
        layers = self.transformer.decoder_layers
        terms = self.query_loss.model_dump()
        weights = {f"query/{i}/{t}": w for i in range(layers) for t, w in terms.items()}
        if self.queries.two_stage:
            weights |= {f"encoder/{t}": w for t, w in terms.items()}
        for name, head in zip(self.head_names, self.heads, strict=True):
            if self.positive_queries.enabled:
                weights |= {
                    f"positive/{name}/{i}/{t}": w * self.lambda_1
                    for i in range(layers)
                    for t, w in terms.items()
                }
            weights |= {
                f"{name}/{t}": w * layers * self.lambda_2 for t, w in head.loss_weights().items()
            }
        return weights


# --------------------------------------------------------------------------- training and the data


class TrainingConfig(Strict):
    """One training run (section 4.1; method.md 63). The batch size is global: it belongs to the
    experiment, however many workers share it."""

    epochs: PositiveInt = 12
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-4
    weight_decay: NonNegativeFloat = 1e-4
    backbone_multiplier: NonNegativeFloat = 0.1
    offsets_multiplier: NonNegativeFloat = 0.1
    """Learning rate of sampling offsets and reference points, as a multiple."""
    clip_norm: PositiveFloat = 0.1
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from a thousandth of the learning rate."""
    drop_epochs: tuple[PositiveInt, ...] = (11,)
    """The learning rate is multiplied by ``drop_factor`` after each of these epochs."""
    drop_factor: PositiveFloat = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that supports it, else fp32."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    accumulate: PositiveInt = 1
    """Parts in which each worker computes its share of a batch: a fraction of the memory, twice the
    forward passes, the same gradients. At most the worker's images, if given more."""
    loader_workers: NonNegativeInt = 0
    """Processes that load images, for each training worker."""


class DataConfig(Strict):
    """Where the images are and how they are augmented (method.md, training recipe)."""

    dataset: Literal["digits", "digits-lvis", "coco"] = "coco"
    """Embedded digits (made on first use), their long-tailed LVIS variant, or a COCO folder."""
    path: Path | None = None
    """Folder with ``annotations/`` and the image folders; only for ``coco``."""
    train_images: PositiveInt | None = None
    """Use only the first n training images."""
    val_images: PositiveInt | None = None
    short_sides: tuple[PositiveInt, ...] = tuple(range(480, 801, 32))
    """Training resizes the short side to one of these; evaluation to the largest.
    Empty: images keep their size."""
    max_side: PositiveInt = 1333
    crop: bool = True
    """Half of the images: resize to 400-600, crop 384-600, then resize (DETR's augmentation).
    Part of the resizing: without ``short_sides`` there is neither."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    skip_bad: bool = False
    """Train without images whose file or annotations are broken, and report how many."""
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """What computes the metrics."""


# ----------------------------------------------------------------------------- reading and messages


def error_text(error: ValidationError) -> str:
    """One line for each problem of a pydantic error: ``transformer.levels: …``."""
    lines = []
    for problem in error.errors():
        # Discriminated unions put the tag into the location; it is no key of the user's file.
        where = ".".join(str(part) for part in problem["loc"] if part not in HEAD_TYPES)
        what = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}" if where else what)
    return "; ".join(dict.fromkeys(lines))


def parse(model: type[T], data: Any, source: str) -> T:
    """Validate ``data`` as ``model``.

    Raises:
        ConfigError: names ``source`` (a file or an option) and every offending key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {error_text(error)}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
