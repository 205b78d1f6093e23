"""What query groups and decoder computed, named as a golden folder's ``outputs.pt`` does."""

from __future__ import annotations

from typing import Any

import torch
from recorded import Trace, recorded_draws
from torch import Tensor

from codetr.boxes import inverse_sigmoid
from codetr.detector import CoDETR
from codetr.matching.hungarian import hungarian_layers
from codetr.queries.denoising import DENOISING
from codetr.queries.positive import _gather
from codetr.queries.selection import QUERY
from codetr.structures import GroupPrediction, ImageBatch, QueryGroup, Targets
from codetr.transformer.decoder import attention_mask

Seen = dict[Any, tuple[tuple[Any, ...], Any]]


def trace_queries(model: CoDETR, seen: Seen, batch: ImageBatch, targets: list[Targets]) -> Trace:
    selection, predictions = seen[model.queries][1], seen[model.decoder][1]
    proposals, query = selection.proposals, predictions[QUERY]
    # The original lays the denoising queries in front of the others.
    names = [name for name in (DENOISING, QUERY) if name in predictions]
    result = {
        "06_enc_cls_logits": seen[model.queries.classify][1],
        "08_topk.index": selection.tokens,
        "08_topk.init_reference": selection.group.reference,
        "11_cls_logits": torch.cat([predictions[name].logits for name in names], dim=2),
        "11_boxes_cxcywh": torch.cat([predictions[name].boxes for name in names], dim=2),
    }
    result |= _decoder_tensors("09_dec", model, seen, names)
    objects = targets
    if model.config.queries.rank_by == "objectness":
        result["06_enc_coord_sigmoid"] = proposals.boxes[0]
        result["09_dec.in_query"] = result["09_dec.in_query"][:1]
        objects = [Targets(t.boxes, torch.zeros_like(t.labels)) for t in targets]
    else:
        result["08_topk.score"] = proposals.logits[0]
        result["08_topk.anchor_sigmoid"] = proposals.boxes[0]
    result |= _matches("enc", proposals, objects, batch, model)
    for layer in range(len(query.logits)):
        one = GroupPrediction(query.logits[layer : layer + 1], query.boxes[layer : layer + 1])
        result |= _matches(f"layer{layer}", one, targets, batch, model)
    if model.config.denoising.enabled:
        result |= _trace_denoising(model, seen)
    return result


def _trace_denoising(model: CoDETR, seen: Seen) -> Trace:
    group = seen[model.denoising][1]
    result = {
        "02b_dn.label_query": group.content,
        "02b_dn.bbox_query_unact": group.reference.logit(),
        "02b_dn.attn_mask": attention_mask([group, seen[model.queries][1].group], heads=1),
        "02b_dn.pad_size": torch.tensor(group.count),
        "02b_dn.num_groups": torch.tensor(group.parts),
    }
    classes, slots = model.config.num_classes, torch.arange(group.count)
    width = group.count // (2 * group.parts)
    for image, (labels, boxes) in enumerate(
        zip(group.targets.labels, group.targets.boxes, strict=True)
    ):
        positive = slots[(labels < classes).cpu()]
        result |= {
            f"12_dn_tgt.img{image}.labels": labels,
            f"12_dn_tgt.img{image}.boxes_cxcywh": boxes,
            f"12_dn_tgt.img{image}.pos_index": positive,
            f"12_dn_tgt.img{image}.neg_index": positive + width,
        }
    return result


def trace_inference(model: CoDETR, batch: ImageBatch) -> Trace:
    """The last layer's prediction without the groups of training."""
    memory = model.encode(batch)
    prediction = model.decoder([model.queries(memory).group], memory)[QUERY]
    return {
        "30_test.query_cls_logits_last": prediction.logits[-1],
        "30_test.query_boxes_cxcywh_last": prediction.boxes[-1],
    }


def _matches(
    name: str, prediction: GroupPrediction, targets: list[Targets], batch: ImageBatch, model: CoDETR
) -> Trace:
    cost = model.config.matching_cost
    (matches,) = hungarian_layers(prediction.logits, prediction.boxes, targets, batch.sizes, cost)
    result = {}
    for image, (query, gt) in enumerate(matches):
        result[f"12_hungarian.{name}.img{image}.query_index"] = query
        result[f"12_hungarian.{name}.img{image}.gt_index"] = gt
    return result


def _decoder_tensors(prefix: str, model: CoDETR, seen: Seen, names: list[str]) -> Trace:
    """What enters and leaves the decoder for some of its groups."""
    (groups, _), predictions = seen[model.decoder]
    by_name = {group.name: group for group in groups}
    starts = dict(zip(by_name, [0, *_cumulated(groups)], strict=False))

    def cut(values: Tensor) -> Tensor:
        """Of (B, Q, ...) values of all groups those of ``names``."""
        return torch.cat([values.narrow(1, starts[n], by_name[n].count) for n in names], dim=1)

    states = torch.stack(
        [cut(model.decoder.norm(seen[layer][1])) for layer in model.decoder.layers]
    )
    result = {
        f"{prefix}.in_query": torch.cat([by_name[n].content for n in names], dim=1),
        f"{prefix}.in_reference": torch.cat([by_name[n].reference for n in names], dim=1),
        f"{prefix}.out_states": states,
    }
    if model.config.queries.dynamic_anchors:
        result[f"{prefix}.out_references"] = torch.stack([cut(r) for r in _references(model, seen)])
    else:
        result[f"{prefix}.in_query_pos"] = torch.cat([by_name[n].position for n in names], dim=1)
        # In Co-Deformable-DETR a layer's refined references are its boxes (method.md 22).
        result[f"{prefix}.out_references"] = torch.cat([predictions[n].boxes for n in names], dim=2)
    return result


def _cumulated(groups: list[QueryGroup]) -> list[int]:
    return torch.tensor([group.count for group in groups]).cumsum(0).tolist()


def _references(model: CoDETR, seen: Seen) -> list[Tensor]:
    """The boxes that each layer started from, read off its sampling frame, and those that a layer
    behind the last would start from."""
    references = []
    for layer in model.decoder.layers:
        _, _, frame, memory, _ = seen[layer][0]
        ratios = memory.valid_ratios[:, None, 0]
        sides = frame.scales[:, :, 0] / ratios * 2 * model.config.transformer.sampling_points
        references.append(torch.cat((frame.centers[:, :, 0] / ratios, sides), dim=-1))
    logits = inverse_sigmoid(references[-1], model.config.queries.logit_eps)
    delta = model.decoder.regress[-1](seen[model.decoder.layers[-1]][1])
    return [*references, (logits + delta).sigmoid()]


def trace_positive_queries(number: int, model: CoDETR, seen: Seen, outputs: Trace) -> Trace:
    module, prefix = model.positive_queries[number], f"20_aux{number}"
    (name, positives, _, targets), group = seen[module]
    prediction = seen[model.decoder][1][group.name]
    is_object = group.targets.labels < model.config.num_classes
    with recorded_draws(outputs) as names:
        names[:] = [draw for draw in names if draw.endswith(f".aux{number}")]
        chosen = module._choose(name, positives, targets)
    features = _gather([p.features for p in positives], chosen.candidates)
    result = {
        f"{prefix}.coords_cxcywh": group.reference,
        f"{prefix}.labels": group.targets.labels,
        f"{prefix}.targets_cxcywh": group.targets.boxes,
        f"{prefix}.label_weights": group.targets.label_weights,
        f"{prefix}.bbox_weights": is_object[..., None].expand(-1, -1, 4).float(),
        f"{prefix}.cls_logits": prediction.logits,
        f"{prefix}.boxes_cxcywh": prediction.boxes,
        f"{prefix}.feats": features * chosen.valid[..., None],
        f"{prefix}.attn_masks": _padding_mask(chosen.valid, model),
    }
    for image, p in enumerate(positives):
        result[f"{prefix}.img{image}.num_pos_before_truncation"] = torch.tensor(len(p.positive))
        result[f"{prefix}.img{image}.num_neg_candidates"] = torch.tensor(len(p.negative))
    return result | _decoder_tensors(f"{prefix}.dec", model, seen, [group.name])


def _padding_mask(valid: Tensor, model: CoDETR) -> Tensor:
    """The mask that the original makes with zero padding, and does not use (method.md 50)."""
    blocked = ~(valid[:, :, None] & valid[:, None, :])
    return blocked.repeat_interleave(model.config.transformer.attention_heads, dim=0)
