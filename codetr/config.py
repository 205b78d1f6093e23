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

from codetr.augmentation_config import CopyPasteConfig, JitterConfig
from codetr.backbone_config import (
    BACKBONE_NAMES,
    BackboneConfig,
    ResNetConfig,
    SwinConfig,
    VitConfig,
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
    SquareAnchorConfig,
    TwoStageConfig,
)
from codetr.query_config import (
    BoxLossConfig,
    DenoisingConfig,
    FederatedLossConfig,
    OneToManyConfig,
    PositiveQueryConfig,
    QueryConfig,
    QueryLossConfig,
    SoftNmsConfig,
)
from codetr.strict import ConfigError, Strict, nearest

# What is defined elsewhere and imported from here.
__all__ = [
    "HEAD_CONFIGS",
    "HEAD_TYPES",
    "AnyHeadConfig",
    "AtssConfig",
    "BackboneConfig",
    "BoxLossConfig",
    "ConfigError",
    "CopyPasteConfig",
    "DenoisingConfig",
    "FasterRcnnConfig",
    "FcosConfig",
    "FederatedLossConfig",
    "GflConfig",
    "HeadConfig",
    "JitterConfig",
    "MaskConfig",
    "MaskRcnnConfig",
    "OneStageConfig",
    "OneToManyConfig",
    "PaaConfig",
    "PositiveQueryConfig",
    "QueryConfig",
    "QueryLossConfig",
    "RcnnConfig",
    "ResNetConfig",
    "RetinaNetConfig",
    "RpnConfig",
    "SoftNmsConfig",
    "SquareAnchorConfig",
    "Strict",
    "SwinConfig",
    "TwoStageConfig",
    "VitConfig",
    "nearest",
]

T = TypeVar("T", bound=Strict)


# ----------------------------------------------------------------------------------- the detector


class PositionEncodingConfig(Strict):
    """Sine encoding of the pixel position (method.md 7)."""

    temperature: PositiveFloat = 10000
    offset: float = -0.5


class TransformerConfig(Strict):
    """Kind and sizes of neck, encoder and decoder."""

    attention: Literal["deformable", "conditional"] = "deformable"
    """``deformable``: to a few points on every level (Deformable DETR). ``conditional``: to every
    cell of a single map, by content and place side by side in the decoder; the neck is a
    convolution without a norm (Conditional DETR and DAB-DETR, each "C5")."""
    embed_dim: PositiveInt = 256
    ffn_dim: PositiveInt = 2048
    attention_heads: PositiveInt = 8
    sampling_points: PositiveInt = 4
    """For each level and head of deformable attention."""
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    levels: PositiveInt = 4
    """Feature levels; those beyond the backbone's stages are stride-2 convolutions of the last."""
    group_norm_groups: PositiveInt = 32
    position_encoding: PositionEncodingConfig = PositionEncodingConfig()
    activation: Literal["relu", "prelu"] = "relu"
    """In the perceptrons of all layers; DAB-DETR: ``prelu``."""
    scale_positions: bool = False
    """Positions are multiplied by a perceptron of the state (DAB-DETR): of a conditional encoder in
    each layer, of dynamic anchors of a deformable decoder from the second layer on."""
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


HEAD_PYRAMID = (8, 16, 32, 64, 128)
"""Strides in pixels of the heads' pyramid where it is made of a single map (section 3.2)."""


class DetectorConfig(Strict):
    """A Co-DETR detector; an empty list of heads is its DETR baseline (K = 0)."""

    num_classes: PositiveInt = 80
    backbone: BackboneConfig = ResNetConfig()
    """A name and its family's settings; ``resnet50`` where no name is given."""
    transformer: TransformerConfig = TransformerConfig()
    queries: QueryConfig = QueryConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    one_to_many: OneToManyConfig = OneToManyConfig()
    heads: tuple[HeadConfig, ...] = ()
    """Auxiliary heads in order; ``heads: [atss, faster_rcnn]`` takes their defaults."""
    positive_queries: PositiveQueryConfig = PositiveQueryConfig()
    lambda_1: NonNegativeFloat = 1.0
    """Weight of the losses of the positive queries (equation 6)."""
    lambda_2: NonNegativeFloat = 2.0
    """Weight of the auxiliary heads' losses (equation 6)."""
    head_losses: bool = True
    """False: every loss of the auxiliary heads has weight 0, whatever ``lambda_2`` is. They assign,
    and their positives become queries, but they are not trained (table 9, third row)."""
    query_loss: QueryLossConfig = QueryLossConfig()
    matching_cost: BoxLossConfig = BoxLossConfig()
    max_detections: PositiveInt = 100
    soft_nms: SoftNmsConfig = SoftNmsConfig()

    @model_validator(mode="before")
    @classmethod
    def _k_agrees(cls, data: Any) -> Any:
        """K is counted, not set; who states it beside the heads must not contradict them."""
        if not isinstance(data, dict) or "k" not in data:
            return data
        heads = data.get("heads", ())
        count = len(heads) if isinstance(heads, (list, tuple)) else 0
        if data["k"] != count:
            raise ValueError(f"k={data['k']} disagrees with 'heads', of which there are {count}")
        return {key: value for key, value in data.items() if key != "k"}

    @field_validator("backbone", mode="before")
    @classmethod
    def _backbone_by_name(cls, backbone: Any) -> Any:
        if isinstance(backbone, str):
            backbone = {"name": backbone}
        if not isinstance(backbone, dict):
            return backbone
        name = str(backbone.get("name", "resnet50"))
        if name not in BACKBONE_NAMES:
            raise ValueError(f"unknown backbone.name '{name}'; {nearest(name, [*BACKBONE_NAMES])}")
        return {"name": name, **backbone}

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_by_name(cls, heads: Any) -> Any:
        if not isinstance(heads, (list, tuple)):
            raise ValueError("heads must be a list, for example [atss, faster_rcnn]")
        named = [{"type": head} if isinstance(head, str) else head for head in heads]
        for head in named:
            kind = head.get("type") if isinstance(head, dict) else getattr(head, "type", head)
            if kind is None:
                raise ValueError("a head without 'type': say which, for example {type: atss}")
            if kind not in HEAD_TYPES:
                raise ValueError(f"unknown head '{kind}'; {nearest(str(kind), [*HEAD_TYPES])}")
        return named

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        """What is of one kind of attention is not set for the other."""
        transformer, queries = self.transformer, self.queries
        if transformer.attention == "deformable":
            if queries.size_modulation:
                raise ValueError(
                    "queries.size_modulation is part of conditional attention: set it to false, "
                    "or transformer.attention=conditional"
                )
            if transformer.scale_positions and not queries.dynamic_anchors:
                raise ValueError(
                    "transformer.scale_positions scales positions of boxes: set "
                    "queries.dynamic_anchors=true, or transformer.scale_positions=false"
                )
            return self
        if isinstance(self.backbone, VitConfig):
            raise ValueError(
                f"transformer.attention=conditional reads one map of a ResNet or Swin, not the "
                f"pyramid of '{self.backbone.name}': set transformer.attention=deformable"
            )
        if transformer.levels != 1 or len(self.backbone.stages) != 1:
            raise ValueError(
                f"transformer.attention=conditional reads one map, not transformer.levels="
                f"{transformer.levels} of backbone.stages={[*self.backbone.stages]}: set "
                f"transformer.levels=1 and backbone.stages=[4]"
            )
        if queries.two_stage:
            raise ValueError(
                "transformer.attention=conditional has no tokens of several sizes to select from: "
                "set queries.two_stage=false"
            )
        if self.heads and self.strides[0] not in HEAD_PYRAMID:
            raise ValueError(
                f"the heads' pyramid has strides {', '.join(map(str, HEAD_PYRAMID))}, and "
                f"backbone.stages={[*self.backbone.stages]} has stride {self.strides[0]}: "
                f"set backbone.stages=[4]"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        """Each group has something to learn from, and something of its own."""
        queries, many = self.queries, self.one_to_many
        if many.groups and queries.two_stage and many.tokens == "same":
            if not queries.mixed_selection:
                raise ValueError(
                    "one_to_many.tokens=same needs learned content, or its groups are copies: set "
                    "queries.mixed_selection=true, or one_to_many.tokens=next"
                )
            if many.queries != queries.count:
                raise ValueError(
                    f"one_to_many.tokens=same starts from the boxes of queries.count="
                    f"{queries.count} queries: set one_to_many.queries={queries.count}, or "
                    f"one_to_many.tokens=next"
                )
        if self.heads and not self.head_losses and not self.positive_queries.enabled:
            raise ValueError(
                "heads without losses and without positive queries do nothing: set heads=[], "
                "head_losses=true or positive_queries.enabled=true"
            )
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        self.backbone.level_strides(self.transformer.levels)
        return self

    @model_validator(mode="after")
    def _denoising_has_positions(self) -> Self:
        if self.denoising.enabled and not self.queries.dynamic_anchors:
            raise ValueError(
                "denoising queries have no position but that of their boxes: set "
                "queries.dynamic_anchors=true, or denoising.enabled=false"
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
        return self.backbone.level_strides(self.transformer.levels)

    @property
    def head_strides(self) -> tuple[int, ...]:
        """Strides in pixels of the memory pyramid: the encoder's levels and one coarser, or, made
        of a single map, the published pyramid."""
        if self.transformer.attention == "conditional":
            return HEAD_PYRAMID
        return (*self.strides, self.strides[-1] * 2)

    def loss_weights(self) -> dict[str, float]:
        """Effective weight of every loss term in the total (equation 6).

        Names: ``query/LAYER/TERM``, ``denoising/LAYER/TERM``, ``one_to_many/LAYER/TERM``,
        ``encoder/TERM``, ``positive/HEAD/LAYER/TERM`` and ``HEAD/TERM``. The heads' losses stand
        inside equation 6's sum over the L decoder layers, so each carries the factor L * lambda_2,
        or exactly 0 without ``head_losses``. The one-to-many loss is a mean over the groups; its
        weight carries their number, and under ``one_to_many.average`` its and the query's are
        divided by the number of all groups.
        """
        layers = self.transformer.decoder_layers
        terms = self.query_loss.weights()
        many = self.one_to_many
        share = 1 / (1 + many.groups) if many.average else 1.0
        weights = {f"query/{i}/{t}": share * w for i in range(layers) for t, w in terms.items()}
        if self.denoising.enabled:
            weights |= {f"denoising/{i}/{t}": w for i in range(layers) for t, w in terms.items()}
        if many.groups:
            each = share * many.weight * many.groups
            weights |= {
                f"one_to_many/{i}/{t}": w * each for i in range(layers) for t, w in terms.items()
            }
        if self.queries.two_stage:
            weights |= {f"encoder/{t}": w for t, w in terms.items()}
        for name, head in zip(self.head_names, self.heads, strict=True):
            if self.positive_queries.enabled:
                weights |= {
                    f"positive/{name}/{i}/{t}": w * self.lambda_1
                    for i in range(layers)
                    for t, w in terms.items()
                }
            factor = layers * self.lambda_2 if self.head_losses else 0.0
            weights |= {f"{name}/{t}": w * factor for t, w in head.loss_weights().items()}
        return weights


# --------------------------------------------------------------------------- training and the data


EMA_DECAY = 0.9999
"""Of ``training.ema: true``: the original's for the record model."""


class TrainingConfig(Strict):
    """One training run (section 4.1; method.md 63). The batch size is global: it belongs to the
    experiment, however many workers share it."""

    start_from: Path | None = None
    """Weights of a whole detector to start from, as fine-tuning does: a file of 'codetr convert',
    or a training's checkpoint. Layers for another number of classes are new; all others must fit.
    None: the backbone's weights alone."""
    epochs: PositiveInt = 12
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-4
    weight_decay: NonNegativeFloat = 1e-4
    backbone_multiplier: NonNegativeFloat = 0.1
    """Learning rate of the backbone, as a multiple."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each block of a ViT learns at this multiple of the rate of the block after it; the record
    model: 0.8 with multipliers of 1."""
    decay_norms: bool = True
    """Weight decay of biases and norms, too; the record model: False."""
    offsets_multiplier: NonNegativeFloat = 0.1
    """Learning rate of sampling offsets and reference points, as a multiple."""
    clip_norm: PositiveFloat = 0.1
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from a thousandth of the learning rate."""
    drop_epochs: tuple[PositiveInt, ...] = (11,)
    """The learning rate is multiplied by ``drop_factor`` after each of these epochs."""
    drop_factor: PositiveFloat = 0.1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay, at each step, of an exponential moving average of the weights, which is evaluated and
    used in their place (supplementary B); None: no average. ``true``: the record model's 0.9999."""
    ema_warmup: NonNegativeInt = 2000
    """The average begins as the weights themselves; its decay comes near ``ema`` in so many steps.
    0: it is that from the beginning. Both as the original's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that supports it, else fp32."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    evaluate_branches: bool = False
    """After the last epoch each auxiliary head is also evaluated on its own (table 11)."""
    accumulate: PositiveInt = 1
    """Parts in which each worker computes its share of a batch: a fraction of the memory, twice the
    forward passes, the same gradients. At most the worker's images, if given more."""
    loader_workers: NonNegativeInt = 0
    """Processes that load images, for each training worker."""

    @field_validator("ema", mode="before")
    @classmethod
    def _ema_on_or_off(cls, ema: Any) -> Any:
        return {True: EMA_DECAY, False: None}[ema] if isinstance(ema, bool) else ema

    def require_fitting(self, detector: DetectorConfig) -> None:
        """Raise a ConfigError if the detector cannot be trained so."""
        if self.layer_decay < 1 and not isinstance(detector.backbone, VitConfig):
            raise ConfigError(
                f"training.layer_decay={self.layer_decay:g} lowers the rates of a ViT's blocks, "
                f"and '{detector.backbone.name}' is none: set training.layer_decay=1"
            )


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
    jitter: JitterConfig = JitterConfig()
    copy_paste: CopyPasteConfig = CopyPasteConfig()
    repeat_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Images with a class that less than this share of the training images has are seen more often
    than others (LVIS, appendix B.2; 0.001 there). An epoch is as long as without. 0: once each."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    skip_bad: bool = False
    """Train without images whose file or annotations are broken, and report how many."""
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """What computes the metrics."""

    @model_validator(mode="after")
    def _has_a_canvas(self) -> Self:
        if not self.copy_paste.enabled:
            return self
        if not self.jitter.enabled:
            raise ValueError(
                "copy_paste needs the canvas of large-scale jitter: set jitter.enabled=true"
            )
        if self.jitter.padding_mask:
            raise ValueError(
                "copy_paste pastes beyond the image, too, where jitter.padding_mask=true hides it: "
                "set jitter.padding_mask=false"
            )
        return self


# ----------------------------------------------------------------------------- reading and messages


def error_text(error: ValidationError) -> str:
    """One line for each problem of a pydantic error: ``transformer.levels: …``."""
    tags = {*HEAD_TYPES, *BACKBONE_NAMES}
    lines = []
    for problem in error.errors():
        # Discriminated unions put the tag into the location; it is no key of the user's file.
        where = ".".join(str(part) for part in problem["loc"] if part not in tags)
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
