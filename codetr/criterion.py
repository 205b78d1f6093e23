"""The losses of all query groups (equations 5 and 6), unweighted and by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from codetr.boxes import cxcywh_to_xyxy, extents, generalised_iou, iou, xyxy_to_cxcywh
from codetr.config import BoxLossConfig, DetectorConfig
from codetr.distributed import normaliser
from codetr.losses import quality_focal_loss, sigmoid_focal_loss
from codetr.matching.hungarian import Match, hungarian_layers
from codetr.structures import GroupPrediction, KnownTargets, QueryGroup, Size, Targets

Losses = dict[str, Tensor]


def group_losses(
    group: QueryGroup,
    prediction: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    config: DetectorConfig,
    *,
    classes: Tensor | None = None,
) -> Losses:
    """Losses ``GROUP/LAYER/TERM`` of one group on every decoder layer.

    Targets are the group's own where it knows them, else each layer's Hungarian matching.
    ``classes`` as in :func:`box_losses`.
    """
    if group.targets is not None:
        layer_targets = [group.targets] * len(prediction.logits)
    else:
        layer_targets = match_parts(
            prediction,
            targets,
            sizes,
            config.matching_cost,
            parts=group.parts,
            repeat=group.repeat,
        )
    terms = box_losses(prediction, layer_targets, sizes, config, parts=group.parts, classes=classes)
    return {
        f"{group.name}/{layer}/{term}": values[layer]
        for term, values in terms.items()
        for layer in range(len(values))
    }


def encoder_losses(
    proposals: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    config: DetectorConfig,
    *,
    classes: Tensor | None = None,
) -> Losses:
    """Losses ``encoder/TERM`` of the encoder's own proposals.

    Where tokens are ranked by objectness, every object counts as class 0: the encoder learns where
    objects are, not which (method.md 35), and ``classes`` of :func:`box_losses` is not for it.
    """
    if config.queries.rank_by == "objectness":
        classes = None
        targets = [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
    matched = match(proposals, targets, sizes, config.matching_cost)
    terms = box_losses(proposals, matched, sizes, config, classes=classes)
    return {f"encoder/{term}": values[0] for term, values in terms.items()}


def match(
    prediction: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    cost: BoxLossConfig,
) -> list[KnownTargets]:
    """The Hungarian targets of each layer."""
    matches = hungarian_layers(prediction.logits, prediction.boxes, targets, sizes, cost)
    return [_targets_of(m, prediction, targets, sizes) for m in matches]


def match_parts(
    prediction: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    cost: BoxLossConfig,
    *,
    parts: int = 1,
    repeat: int = 1,
) -> list[KnownTargets]:
    """The Hungarian targets of each layer: of each of ``parts`` equal parts of the queries on its
    own (Group-DETR), with each object there ``repeat`` times (H-DETR)."""
    if repeat > 1:
        targets = [
            replace(t, boxes=t.boxes.repeat(repeat, 1), labels=t.labels.repeat(repeat))
            for t in targets
        ]
    if parts == 1:
        return match(prediction, targets, sizes, cost)
    layers = len(prediction.logits)

    def as_layers(rows: Tensor) -> Tensor:
        """(L * parts, B, Q / parts, D) from (L, B, Q, D): a part is matched as a layer is."""
        size = rows.shape[2] // parts
        return rows.unflatten(2, (parts, size)).transpose(1, 2).flatten(0, 1)

    by_part = GroupPrediction(as_layers(prediction.logits), as_layers(prediction.boxes))
    found = match(by_part, targets, sizes, cost)
    return [_end_to_end(found[layer * parts : (layer + 1) * parts]) for layer in range(layers)]


def _end_to_end(parts: Sequence[KnownTargets]) -> KnownTargets:
    """The targets of all parts of a group as one."""
    return KnownTargets(
        labels=torch.cat([part.labels for part in parts], dim=1),
        boxes=torch.cat([part.boxes for part in parts], dim=1),
        label_weights=torch.cat([part.label_weights for part in parts], dim=1),
    )


def _targets_of(
    matches: Sequence[Match],
    prediction: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
) -> KnownTargets:
    _, batch, queries, num_classes = prediction.logits.shape
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(matches)])
    query = torch.cat([query for query, _ in matches])
    matched_labels = torch.cat([t.labels[gt] for t, (_, gt) in zip(targets, matches, strict=True)])
    matched_boxes = torch.cat([t.boxes[gt] for t, (_, gt) in zip(targets, matches, strict=True)])

    labels = matched_labels.new_full((batch, queries), num_classes)
    labels[image, query] = matched_labels
    boxes = prediction.boxes.new_zeros(batch, queries, 4)
    scale = extents(sizes, boxes)
    boxes[image, query] = xyxy_to_cxcywh(matched_boxes.to(boxes.dtype)) / scale[image]
    return KnownTargets(labels, boxes, torch.ones_like(boxes[..., 0]))


def box_losses(
    prediction: GroupPrediction,
    targets: Sequence[KnownTargets],
    sizes: Sequence[Size],
    config: DetectorConfig,
    *,
    parts: int = 1,
    classes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Classification, L1 and GIoU losses of all layers, (L,) each (method.md 33, 34).

    Each is divided by the number of positives of its layer over the whole batch of all ranks. L1
    is measured on normalised cxcywh, GIoU on pixels. Without a positive the box losses are zeros
    that still depend on the boxes, so that every parameter keeps a gradient.

    Args:
        prediction: of one group.
        targets: of each layer.
        sizes: valid (height, width) of each image in pixels.
        config: of the detector; its kind of classification loss is read.
        parts: of the group.
        classes: (B, classes) bool, those that have a classification loss in each image (federated
            loss); None: all.
    """
    num_classes = prediction.logits.shape[-1]
    boxes = prediction.boxes.float()
    labels = torch.stack([t.labels for t in targets])
    wanted = torch.stack([t.boxes for t in targets])
    label_weights = torch.stack([t.label_weights for t in targets])
    is_object = (labels < num_classes) & (label_weights > 0)
    # How many parts a group has depends on the whole batch; the positives of one part depend on the
    # images alone, and may be counted before the batch is known (see PartCounts).
    positives = normaliser(is_object.flatten(1).sum(1) / parts) * parts

    corners, wanted_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)
    rows = [prediction.logits.flatten(1, 2), labels.flatten(1), label_weights.flatten(1)]
    if classes is not None:  # (B * Q, classes), the same on all layers
        classes = classes[:, None].expand(-1, boxes.shape[2], -1).flatten(0, 1)
    if config.query_loss.classification == "quality_focal":
        quality = iou(corners.detach(), wanted_corners).flatten(1)
        cls = [
            quality_focal_loss(logits, label, layer_quality, weight, classes=classes)
            for logits, label, weight, layer_quality in zip(*rows, quality, strict=True)
        ]
    else:
        cls = [sigmoid_focal_loss(*layer, classes=classes) for layer in zip(*rows, strict=True)]
    scale = extents(sizes, boxes)[:, None]
    l1 = (boxes - wanted).abs().sum(-1)
    giou = 1 - generalised_iou(corners * scale, wanted_corners * scale)
    return {
        "cls": torch.stack(cls) / positives,
        "l1": (l1 * is_object).flatten(1).sum(1) / positives,
        "giou": (giou * is_object).flatten(1).sum(1) / positives,
    }
