"""The losses of all query groups (equations 5 and 6), unweighted and by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.boxes import cxcywh_to_xyxy, extents, generalised_iou, xyxy_to_cxcywh
from codetr.config import BoxLossConfig
from codetr.distributed import normaliser
from codetr.losses import sigmoid_focal_loss
from codetr.matching.hungarian import Match, hungarian_layers
from codetr.structures import GroupPrediction, KnownTargets, QueryGroup, Size, Targets

Losses = dict[str, Tensor]


def group_losses(
    group: QueryGroup,
    prediction: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    cost: BoxLossConfig,
) -> Losses:
    """Losses ``GROUP/LAYER/TERM`` of one group on every decoder layer.

    Targets are the group's own where it knows them, else each layer's Hungarian matching.
    """
    if group.targets is not None:
        layer_targets = [group.targets] * len(prediction.logits)
    else:
        layer_targets = match(prediction, targets, sizes, cost)
    terms = box_losses(prediction, layer_targets, sizes)
    return {
        f"{group.name}/{layer}/{term}": values[layer]
        for term, values in terms.items()
        for layer in range(len(values))
    }


def encoder_losses(
    proposals: GroupPrediction,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
    cost: BoxLossConfig,
) -> Losses:
    """Losses ``encoder/TERM`` of the proposals at all tokens.

    Every object counts as class 0: the encoder learns where objects are, not which (method.md 35).
    """
    objects = [
        Targets(t.boxes, torch.zeros_like(t.labels), t.image_id, t.original_size) for t in targets
    ]
    terms = box_losses(proposals, match(proposals, objects, sizes, cost), sizes)
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
    prediction: GroupPrediction, targets: Sequence[KnownTargets], sizes: Sequence[Size]
) -> dict[str, Tensor]:
    """Focal, L1 and GIoU losses of all layers, (L,) each (method.md 33, 34).

    Each is divided by the number of positives of its layer over the whole batch of all ranks. L1
    is measured on normalised cxcywh, GIoU on pixels. Without a positive the box losses are zeros
    that still depend on the boxes, so that every parameter keeps a gradient.
    """
    num_classes = prediction.logits.shape[-1]
    boxes = prediction.boxes.float()
    labels = torch.stack([t.labels for t in targets])
    wanted = torch.stack([t.boxes for t in targets])
    label_weights = torch.stack([t.label_weights for t in targets])
    is_object = (labels < num_classes) & (label_weights > 0)
    positives = normaliser(is_object.flatten(1).sum(1))

    cls = torch.stack(
        [
            sigmoid_focal_loss(logits.flatten(0, 1), label.flatten(), weight.flatten())
            for logits, label, weight in zip(prediction.logits, labels, label_weights, strict=True)
        ]
    )
    scale = extents(sizes, boxes)[:, None]
    l1 = (boxes - wanted).abs().sum(-1)
    giou = 1 - generalised_iou(cxcywh_to_xyxy(boxes) * scale, cxcywh_to_xyxy(wanted) * scale)
    return {
        "cls": cls / positives,
        "l1": (l1 * is_object).flatten(1).sum(1) / positives,
        "giou": (giou * is_object).flatten(1).sum(1) / positives,
    }
