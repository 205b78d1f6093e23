"""Co-DETR: where the parts meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast

import torch
from torch import Tensor, nn

from codetr.backbones import build_adapter, build_backbone, build_neck
from codetr.boxes import cxcywh_to_xyxy, extents
from codetr.config import DataConfig, DetectorConfig, nearest
from codetr.criterion import encoder_losses, group_losses
from codetr.federated import FederatedClasses
from codetr.heads import build_head
from codetr.heads.head import Head
from codetr.queries import (
    DenoisingQueries,
    LearnedQueries,
    OneToManyQueries,
    PositiveQueries,
    TwoStageQueries,
)
from codetr.queries.selection import QUERY
from codetr.sampling import forked_rng, with_seeds
from codetr.soft_nms import soft_nms
from codetr.structures import (
    Detections,
    GroupPrediction,
    ImageBatch,
    LossOutput,
    Memory,
    QueryGroup,
    Size,
    Targets,
)
from codetr.transformer import Decoder, DenseEncoder, Encoder

if TYPE_CHECKING:
    from codetr.data import Classes
    from codetr.inference import ImageLike
    from codetr.tta import TTA


class CoDETR(nn.Module):
    """A DETR trained with collaborative hybrid assignments (figure 4 of the paper).

    Inference is backbone, neck, encoder, query selection and decoder. Training adds the auxiliary
    heads on the memory, and their positives as further groups of queries of the same decoder;
    without heads (K = 0) it is the DETR baseline.

    Attributes:
        data: how :meth:`predict` resizes and normalises images; as in training, where it is read
            from a checkpoint.
        classes: names and ids by class number; None where they are not known.
    """

    data: DataConfig = DataConfig()
    classes: Classes | None = None

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        transformer, channels = config.transformer, config.transformer.embed_dim
        self.backbone = build_backbone(config.backbone)
        self.neck = build_neck(self.backbone.channels, config)
        conditional = transformer.attention == "conditional"
        self.encoder = (DenseEncoder if conditional else Encoder)(transformer)
        self.decoder = Decoder(transformer, config.queries, config.num_classes)
        self.queries = (TwoStageQueries if config.queries.two_stage else LearnedQueries)(config)
        _xavier_uniform(self.encoder.layers, self.decoder.layers)

        # What training adds. Each part draws its initial weights from a stream of its own, so
        # that arms of an ablation start from the same detector.
        if config.denoising.enabled:
            with forked_rng("denoising"):
                self.denoising = DenoisingQueries(
                    config.denoising, channels, config.num_classes, config.queries.logit_eps
                )
        if config.one_to_many.groups:
            with forked_rng("one_to_many"):
                self.one_to_many = OneToManyQueries(config)
        if config.query_loss.federated.enabled:
            self.federated = FederatedClasses(config.query_loss.federated, config.num_classes)
        if config.heads:
            with forked_rng("adapter"):
                self.adapter = build_adapter(config)
        self.heads = nn.ModuleList(
            build_head(
                head,
                name=name,
                channels=channels,
                num_classes=config.num_classes,
                strides=config.head_strides,
                positive_config=config.positive_queries,
                groups=transformer.group_norm_groups,
            )
            for name, head in zip(config.head_names, config.heads, strict=True)
        )
        self.positive_queries = nn.ModuleList()
        for name in config.head_names if config.positive_queries.enabled else ():
            with forked_rng(f"positive/{name}"):
                self.positive_queries.append(
                    PositiveQueries(
                        config.positive_queries,
                        channels,
                        config.num_classes,
                        dynamic_anchors=config.queries.dynamic_anchors,
                    )
                )

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> Self:
        """The detector of a file that ``codetr convert`` or a training wrote, in evaluation mode on
        the CPU, with its classes.

        Raises:
            CheckpointError: there is none, or it is damaged or of somebody else.
        """
        from codetr.weights import load_weights

        return cast(Self, load_weights(Path(path).expanduser()).build())

    @classmethod
    def from_name(cls, name: str, *, pretrained: bool = True) -> Self:
        """An untrained detector of the zoo ('codetr models').

        Args:
            name: as ``co-dino-5scale-r50``.
            pretrained: its backbone starts from published weights, which are downloaded if need
                be; False: at random.

        Raises:
            ConfigError: the zoo has no such detector, or the weights cannot be had.
        """
        from codetr.zoo.catalogue import entry

        named = entry(name)
        config, backbone = named.config, named.config.backbone
        if not pretrained:
            backbone = backbone.model_copy(update={"pretrained": False})
        model = cls(config.model_copy(update={"backbone": backbone}))
        model.data = named.data_config
        return model

    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = 8,
        branch: str = QUERY,
        precision: Literal["fp32", "bf16"] = "fp32",
        tta: TTA | None = None,
    ) -> list[Detections]:
        """Detect in images of any kinds and sizes, on the device that the model is on.

        Args:
            images: each a PIL image, the path of an image file, a numpy array (H, W, 3) or (H, W)
                of uint8, or a tensor (3, H, W) of uint8; colours are red, green, blue in this
                order (OpenCV's are not).
            batch_size: at most so many images go through the model together. Only images that it
                sees at the same size do, so that no image's result depends on the others.
            branch: see :meth:`detect`.
            precision: bf16 computes in bfloat16 where autocast holds that to be safe.
            tta: show each image in several sizes and mirrored, and merge what is found.

        Returns:
            One entry for each image, in their order, on the CPU; boxes in pixels of that image.

        Raises:
            DataError: a file is missing or is no image; an array or tensor is of another kind.
            TypeError: ``images`` is a single image, not a list.
        """
        from codetr.inference import detect_all

        return detect_all(
            self, images, batch_size=batch_size, branch=branch, precision=precision, tta=tta
        )

    def forward(
        self, batch: ImageBatch, targets: list[Targets] | None = None
    ) -> LossOutput | list[Detections]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            batch: the images.
            targets: their objects; needed for the losses.
        """
        if not self.training:
            return self.detect(batch)
        if targets is None:
            raise ValueError("the detector in training mode needs targets; call .eval() to detect")
        return self.losses(batch, targets)

    def losses(self, batch: ImageBatch, targets: list[Targets]) -> LossOutput:
        """All loss terms and their weighted sum (equation 6)."""
        targets = with_seeds(targets)
        memory = self.encode(batch)
        pyramid = self.memory_pyramid(memory) if self.heads else []
        selection = self.queries(memory)
        groups = [selection.group]
        if self.config.denoising.enabled:
            groups.append(self.denoising(batch.sizes, targets))
        if self.config.one_to_many.groups:
            groups.append(self.one_to_many(self.queries, selection, memory))
        losses: dict[str, Tensor] = {}
        for index, (name, head) in enumerate(zip(self.config.head_names, self.heads, strict=True)):
            output = head(pyramid, batch.sizes, targets)
            losses |= {f"{name}/{term}": value for term, value in output.losses.items()}
            if self.positive_queries:
                make_group = self.positive_queries[index]
                groups.append(make_group(name, output.positives, batch.sizes, targets))

        predictions = self._decode(groups, memory)
        classes = self.federated(targets) if self.config.query_loss.federated.enabled else None
        of_batch = (targets, batch.sizes, self.config)
        for group in groups:
            losses |= group_losses(group, predictions[group.name], *of_batch, classes=classes)
        if selection.proposals is not None:
            losses |= encoder_losses(selection.proposals, *of_batch, classes=classes)

        weights = self.config.loss_weights()
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return LossOutput(total, losses)

    def _decode(self, groups: list[QueryGroup], memory: Memory) -> dict[str, GroupPrediction]:
        """Every group's prediction by its name, in as many passes as configured."""
        passes = [groups]
        if self.config.positive_queries.decoder_passes == "per_head":
            seen = {name for group in groups for name in group.sees}
            joined = [bool(group.sees) or group.name in seen for group in groups]
            together = [group for group, is_joined in zip(groups, joined, strict=True) if is_joined]
            passes = [
                [group] for group, is_joined in zip(groups, joined, strict=True) if not is_joined
            ]
            passes += [together] if together else []
        predictions: dict[str, GroupPrediction] = {}
        for of_pass in passes:
            predictions |= self.decoder(of_pass, memory)
        return predictions

    def encode(self, batch: ImageBatch) -> Memory:
        """Backbone, neck and encoder."""
        batch = batch.padded(self.backbone.divisor)
        return self.encoder(self.neck(self.backbone(batch.pixels)), batch)

    def memory_pyramid(self, memory: Memory) -> list[Tensor]:
        """(B, C, h, w) maps that the auxiliary heads read, of ``config.head_strides``."""
        return self.adapter(memory.maps())

    @torch.no_grad()
    def detect(self, batch: ImageBatch, branch: str = QUERY) -> list[Detections]:
        """Detections in pixels of the network's input.

        Args:
            batch: the images.
            branch: ``query`` for the decoder, or the name of an auxiliary head, which then detects
                alone with its own non-maximum suppression (table 11).

        Raises:
            ValueError: the detector has no such branch.
        """
        branches = [QUERY, *self.config.head_names]
        if branch not in branches:
            raise ValueError(f"no branch '{branch}' in this detector; {nearest(branch, branches)}")
        memory = self.encode(batch)
        if branch != QUERY:
            head = cast(Head, self.heads[self.config.head_names.index(branch)])
            return head.detect(self.memory_pyramid(memory), batch.sizes)
        prediction = self.decoder([self.queries(memory).group], memory)[QUERY]
        count, suppression = self.config.max_detections, self.config.soft_nms
        if not suppression.enabled:
            return best_pairs(prediction, batch.sizes, count)
        pairs = best_pairs(prediction, batch.sizes, self.config.queries.total)
        return [
            soft_nms(found, iou=suppression.iou, min_score=suppression.min_score, keep=count)
            for found in pairs
        ]

    def inference_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that inference uses: all but those that training adds."""
        for part in (self.backbone, self.neck, self.encoder, self.decoder, self.queries):
            yield from part.parameters()


def best_pairs(prediction: GroupPrediction, sizes: list[Size], count: int) -> list[Detections]:
    """The ``count`` best pairs of query and class of the last layer, without NMS (method.md 58).

    A query appears once for each class that it scores high for.
    """
    scores = prediction.logits[-1].float().sigmoid()
    num_classes = scores.shape[-1]
    scale = extents(sizes, prediction.boxes)
    boxes = cxcywh_to_xyxy(prediction.boxes[-1]) * scale[:, None]
    detections = []
    for image_scores, image_boxes, edges in zip(scores, boxes, scale, strict=True):
        flat = image_scores.flatten()
        best, pair = flat.topk(min(count, len(flat)))
        found = image_boxes[pair // num_classes]
        found = found.clamp(min=0).minimum(edges)
        detections.append(Detections(found, best, pair % num_classes))
    return detections


def _xavier_uniform(*modules: nn.Module) -> None:
    """Xavier-uniform weights for all matrices but those of deformable attention, which has its
    own start (method.md 62)."""
    for module in modules:
        for name, parameter in module.named_parameters():
            own = ("sampling_offsets", "attention_weights")
            if parameter.dim() > 1 and not any(part in name for part in own):
                nn.init.xavier_uniform_(parameter)
