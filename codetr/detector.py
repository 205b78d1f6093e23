"""Co-DETR: where the parts meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from codetr.backbones import MultiScaleAdapter, build_backbone, build_neck
from codetr.boxes import cxcywh_to_xyxy, extents
from codetr.config import DetectorConfig, nearest
from codetr.criterion import encoder_losses, group_losses
from codetr.heads import build_head
from codetr.heads.head import Head
from codetr.queries import DenoisingQueries, LearnedQueries, PositiveQueries, TwoStageQueries
from codetr.queries.selection import QUERY
from codetr.sampling import forked_rng
from codetr.soft_nms import soft_nms
from codetr.structures import (
    Detections,
    GroupPrediction,
    ImageBatch,
    LossOutput,
    Memory,
    Size,
    Targets,
)
from codetr.transformer import Decoder, Encoder


class CoDETR(nn.Module):
    """A DETR trained with collaborative hybrid assignments (figure 4 of the paper).

    Inference is backbone, neck, encoder, query selection and decoder. Training adds the auxiliary
    heads on the memory, and their positives as further groups of queries of the same decoder;
    without heads (K = 0) it is the DETR baseline.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        transformer, channels = config.transformer, config.transformer.embed_dim
        self.backbone = build_backbone(config.backbone)
        self.neck = build_neck(self.backbone.channels, config)
        self.encoder = Encoder(transformer)
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
        if config.heads:
            with forked_rng("adapter"):
                self.adapter = MultiScaleAdapter(transformer)
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
        memory = self.encode(batch)
        pyramid = self.memory_pyramid(memory) if self.heads else []
        selection = self.queries(memory)
        groups = [selection.group]
        if self.config.denoising.enabled:
            groups.append(self.denoising(batch.sizes, targets))
        losses: dict[str, Tensor] = {}
        for index, (name, head) in enumerate(zip(self.config.head_names, self.heads, strict=True)):
            output = head(pyramid, batch.sizes, targets)
            losses |= {f"{name}/{term}": value for term, value in output.losses.items()}
            if self.positive_queries:
                make_group = self.positive_queries[index]
                groups.append(make_group(name, output.positives, batch.sizes, targets))

        predictions = self.decoder(groups, memory)
        for group in groups:
            prediction = predictions[group.name]
            losses |= group_losses(group, prediction, targets, batch.sizes, self.config)
        if selection.proposals is not None:
            losses |= encoder_losses(selection.proposals, targets, batch.sizes, self.config)

        weights = self.config.loss_weights()
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return LossOutput(total, losses)

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
        pairs = best_pairs(prediction, batch.sizes, self.config.queries.count)
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
    boxes = cxcywh_to_xyxy(prediction.boxes[-1]) * extents(sizes, prediction.boxes)[:, None]
    detections = []
    for image_scores, image_boxes, (height, width) in zip(scores, boxes, sizes, strict=True):
        flat = image_scores.flatten()
        best, pair = flat.topk(min(count, len(flat)))
        found = image_boxes[pair // num_classes]
        found = found.clamp(min=0).minimum(found.new_tensor([width, height, width, height]))
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
