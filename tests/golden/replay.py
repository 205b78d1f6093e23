"""Runs our detector on the inputs of a golden folder, fed with the recorded random draws, and
names what it computes as the folder's ``outputs.pt`` does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from recorded import Trace, recorded_draws, recorded_noise, recorded_proposals
from replay_queries import trace_inference, trace_positive_queries, trace_queries
from torch import Tensor, nn
from torch.nn import functional

from codetr.boxes import encode_deltas
from codetr.config import DetectorConfig, parse
from codetr.detector import CoDETR
from codetr.heads import rcnn
from codetr.heads.atss import AtssHead
from codetr.heads.dense import centerness_targets
from codetr.heads.faster_rcnn import FasterRcnnHead
from codetr.matching.max_iou import IGNORED
from codetr.matching.objects import pad_objects
from codetr.queries.selection import token_proposals
from codetr.sampling import sample_balanced
from codetr.structures import ImageBatch, Targets
from codetr.transformer.encoder import cell_centers
from codetr.transformer.positions import encode_pixels
from codetr.zoo.official import from_official_names, to_official_names

# What a detector's name stands for and config.json does not repeat.
VARIANTS: dict[str, dict[str, Any]] = {
    "co-deformable-detr": {},
    "co-dino": {
        "rank_by": "best_class",
        "dynamic_anchors": True,
        "norm_states": True,
        "logit_eps": 1e-3,
    },
}


def detector_config(golden: dict[str, Any]) -> DetectorConfig:
    """Our configuration of the detector that a golden ``config.json`` describes."""
    if golden["detector"] not in VARIANTS:
        raise ValueError(f"no configuration for detector {golden['detector']!r}")
    # The recorded head weights already carry the factor L * lambda_2 of equation 6.
    factor = golden["decoder_layers"] * golden["lambda_2"]
    second_stage = dict(golden["rcnn"])
    assert second_stage.pop("roi_levels") == golden["levels"]

    def unweighted(head: dict[str, Any]) -> dict[str, Any]:
        return {k: v / factor if k.endswith("_weight") else v for k, v in head.items()}

    heads = {
        "faster_rcnn": {
            "type": "faster_rcnn",
            "rpn": unweighted(golden["rpn"]),
            "rcnn": unweighted(second_stage),
        },
        "atss": {"type": "atss", **unweighted(golden["atss"])},
    }
    positive = dict(golden["positive_queries"])
    positive["features"] = positive.pop("coordinate_features")
    config = {
        "num_classes": golden["classes"],
        "backbone": {
            "name": "resnet50",
            "width": golden["backbone"]["base_width"],
            "stages": golden["backbone"]["outputs"],
            "pretrained": False,
        },
        "transformer": {
            "embed_dim": golden["embed_dim"],
            "ffn_dim": golden["ffn_dim"],
            "attention_heads": golden["attention_heads"],
            "sampling_points": golden["sampling_points"],
            "encoder_layers": golden["encoder_layers"],
            "decoder_layers": golden["decoder_layers"],
            "levels": golden["levels"],
            "group_norm_groups": golden["group_norm_groups"],
            "position_encoding": golden["position_encoding"],
        },
        "queries": {
            "count": golden["queries"],
            "two_stage": golden["two_stage"],
            "box_refinement": golden["box_refinement"],
            "mixed_selection": golden["mixed_selection"],
            "look_forward_twice": golden["look_forward_twice"],
            **VARIANTS[golden["detector"]],
        },
        "denoising": _denoising(golden.get("denoising")),
        "heads": [heads[name] for name in golden["heads"]],
        "positive_queries": positive,
        "lambda_1": golden["lambda_1"],
        "lambda_2": golden["lambda_2"],
        "query_loss": {
            "classification": golden["query_losses"]["cls"],
            **_box_weights(golden["query_losses"]),
        },
        "matching_cost": _box_weights(golden["matching"]),
        "max_detections": golden["test"]["max_detections"],
        "soft_nms": _soft_nms(golden["test"]),
    }
    assert golden["matching"]["cls"] == "focal"
    return parse(DetectorConfig, config, "config.json")


def _box_weights(losses: dict[str, Any]) -> dict[str, float]:
    return {term: losses[f"{term}_weight"] for term in ("cls", "l1", "giou")}


def _denoising(denoising: dict[str, Any] | None) -> dict[str, Any]:
    if denoising is None:
        return {"enabled": False}
    assert denoising["dynamic_groups"]
    return {"enabled": True} | {k: v for k, v in denoising.items() if k != "dynamic_groups"}


def _soft_nms(test: dict[str, Any]) -> dict[str, Any]:
    if (soft_nms := test.get("soft_nms")) is None:
        return {"enabled": False}
    assert (soft_nms["method"], test["topk"]) == ("linear", "queries")
    return {"enabled": True} | {k: v for k, v in soft_nms.items() if k != "method"}


@dataclass
class Golden:
    """A golden folder: what to run, and what the original computed."""

    folder: Path
    device: str = "cpu"
    inputs: dict[str, Any] = field(init=False)
    outputs: Trace = field(init=False)
    grad_norms: dict[str, float] = field(init=False)
    frozen: set[str] = field(init=False)
    model: CoDETR = field(init=False)

    def __post_init__(self) -> None:
        description = json.loads((self.folder / "config.json").read_text())
        weights = self.folder / description.get("weights", "model.pt")
        self.inputs = torch.load(self.folder / "inputs.pt", weights_only=True)
        self.outputs = torch.load(self.folder / "outputs.pt", weights_only=True)
        gradients = json.loads((self.folder / "grads.json").read_text())
        self.grad_norms, self.frozen = gradients["grad_norms"], set(gradients["frozen"])
        self.model = CoDETR(detector_config(description))
        state = torch.load(weights, weights_only=True)
        self.model.load_state_dict(from_official_names(state, self.model.config))
        self.model.to(self.device)

    def batch(self) -> ImageBatch:
        pixels = self.inputs["img_int8"].float() * self.inputs["img_scale"]
        return ImageBatch(pixels, [tuple(s) for s in self.inputs["img_shape"]]).to(self.device)

    def targets(self) -> list[Targets]:
        pairs = zip(self.inputs["gt_bboxes"], self.inputs["gt_labels"], strict=True)
        return [Targets(boxes, labels).to(self.device) for boxes, labels in pairs]


@contextmanager
def observed(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """The last arguments and output of each module, while the block runs."""
    seen: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def remember(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen[module] = (arguments, output)

    hooks = [module.register_forward_hook(remember) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trace(golden: Golden) -> Trace:
    """Everything that one training step computes, under the names of ``outputs.pt``."""
    model, config = golden.model.train(), golden.model.config
    batch, targets = golden.batch(), golden.targets()
    layers = [*model.encoder.layers, *model.decoder.layers]
    queries = [model.queries, model.queries.project_norm, model.queries.classify]
    queries += [*model.positive_queries, *([model.denoising] if config.denoising.enabled else [])]
    parts = [model.backbone, model.neck, model.encoder, model.adapter, model.decoder]
    with (
        recorded_draws(golden.outputs) as unused,
        recorded_noise(golden.outputs, [len(t) for t in targets]),
        recorded_proposals(golden.outputs, len(targets), golden.device) as proposals,
        observed(*parts, *layers, *queries, *head_parts(model)) as seen,
    ):
        output = model.losses(batch, targets)
    output.total.backward()

    result: Trace = {"23_total_loss": output.total}
    result |= {f"01_backbone.{i}": x for i, x in enumerate(seen[model.backbone][1])}
    result |= {f"02_neck.{i}": x for i, x in enumerate(seen[model.neck][1])}
    result |= trace_encoder(model, seen)
    result |= {f"10_memory_level.{i}": x for i, x in enumerate(seen[model.adapter][1])}
    result |= trace_queries(model, seen, batch, targets)
    for number in range(config.k):
        result |= trace_positive_queries(number, model, seen, golden.outputs)
    result |= trace_heads(golden, seen, proposals)
    weights = config.loss_weights()
    for name, loss in output.losses.items():
        result[official_loss(name, config)] = weights[name] * loss
    result |= trace_gradients(model)
    result |= trace_downsample(golden)
    with torch.no_grad():
        result |= trace_inference(model, batch)
    result["unused_draws"] = torch.zeros(len(unused))
    return {name: value.detach() for name, value in result.items()}


def trace_encoder(model: CoDETR, seen: dict) -> Trace:
    memory = seen[model.encoder][1]
    channels, encoding = (
        model.config.transformer.embed_dim,
        model.config.transformer.position_encoding,
    )
    areas = [h * w for h, w in memory.shapes]
    masks = [
        mask.unflatten(1, shape)
        for mask, shape in zip(memory.padding.split(areas, dim=1), memory.shapes, strict=True)
    ]
    result = {f"03_mask.{i}": mask for i, mask in enumerate(masks)}
    for i, mask in enumerate(masks):
        position = encode_pixels(mask, channels, encoding.temperature, encoding.offset)
        result[f"03_pos.{i}"] = position.permute(0, 3, 1, 2)
    centers = cell_centers(memory)[:, :, None] * memory.valid_ratios[:, None]
    return result | {
        "04_enc.spatial_shapes": torch.tensor(memory.shapes),
        "04_enc.level_start_index": torch.tensor([0, *areas[:-1]]).cumsum(0),
        "04_enc.valid_ratios": memory.valid_ratios,
        "04_enc.reference_points_level0_first8": centers[:, :8],
        "05_enc_layer0_out": seen[model.encoder.layers[0]][1],
        "07_proposals.valid": token_proposals(memory).isfinite().all(-1),
        "07_proposals.unact": token_proposals(memory),
        "07_proposals.output_memory_img1_last64": seen[model.queries.project_norm][1][1, -64:],
    }


def head_parts(model: CoDETR) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for head in model.heads:
        parts += [head.rpn, head.rcnn] if isinstance(head, FasterRcnnHead) else [head]
    return parts


def trace_heads(golden: Golden, seen: dict, proposals: list[list[Tensor]]) -> Trace:
    result: Trace = {}
    for head in golden.model.heads:
        if isinstance(head, FasterRcnnHead):
            result |= trace_rpn(golden, head, seen, proposals)
            result |= trace_rcnn(golden, head, seen)
        else:
            result |= trace_atss(golden, head, seen)
    return result


def trace_rpn(
    golden: Golden, head: FasterRcnnHead, seen: dict, proposals: list[list[Tensor]]
) -> Trace:
    (pyramid,), prediction = seen[head.rpn]
    targets, sizes, anchors = golden.targets(), golden.batch().sizes, prediction.anchors
    result = {}
    for level, feature in enumerate(pyramid):
        hidden = head.rpn.conv(feature).relu()
        result[f"13_rpn.cls.{level}"] = head.rpn.cls(hidden)
        result[f"13_rpn.reg.{level}"] = head.rpn.reg(hidden)
    assigned = head.rpn.assign(anchors, sizes, targets).cpu()
    with recorded_draws(golden.outputs):
        samples = head.rpn.sample(assigned, targets)
    boxes = anchors.boxes.cpu()
    for image, (positive, negative) in enumerate(samples):
        number = assigned[image, positive]
        objects = golden.inputs["gt_bboxes"][image][number]
        result |= {
            f"14_rpn_tgt.img{image}.num_anchors": torch.tensor(len(boxes)),
            f"14_rpn_tgt.img{image}.num_valid": anchors.valid(sizes)[image].sum(),
            f"14_rpn_tgt.img{image}.pos_index": positive,
            f"14_rpn_tgt.img{image}.neg_index": negative,
            f"14_rpn_tgt.img{image}.pos_anchor_xyxy": boxes[positive],
            f"14_rpn_tgt.img{image}.pos_gt_index": number,
            f"14_rpn_tgt.img{image}.pos_delta_target": encode_deltas(boxes[positive], objects),
            f"15_rpn_proposals.img{image}": proposals[0][image],
        }
    return result | rpn_losses_per_level(golden, head, prediction, samples, result)


def rpn_losses_per_level(
    golden: Golden, head: FasterRcnnHead, prediction: Any, samples: Any, targets: Trace
) -> Trace:
    """The loss of each level, from the traced samples: together they must be the head's loss."""
    weights, name = golden.model.config.loss_weights(), "faster_rcnn"
    levels, count = len(prediction.anchors.counts), sum(len(p) + len(n) for p, n in samples)
    count += sum((len(p) == 0) + (len(n) == 0) for p, n in samples)
    cls, l1 = torch.zeros(levels), torch.zeros(levels)
    of_level = prediction.anchors.levels.cpu()
    for image, (positive, negative) in enumerate(samples):
        for sign, index in ((1.0, positive), (0.0, negative)):
            logits = prediction.logits.detach().cpu()[image, index]
            loss = functional.binary_cross_entropy_with_logits(
                logits, torch.full_like(logits, sign), reduction="none"
            )
            cls.index_add_(0, of_level[index], loss)
        wanted = targets[f"14_rpn_tgt.img{image}.pos_delta_target"]
        loss = (prediction.deltas.detach().cpu()[image, positive] - wanted).abs().sum(1)
        l1.index_add_(0, of_level[positive], loss)
    return {
        "22_loss_per_level.loss_rpn_cls": cls / count * weights[f"{name}/rpn_cls"],
        "22_loss_per_level.loss_rpn_bbox": l1 / count * weights[f"{name}/rpn_l1"],
    }


def trace_rcnn(golden: Golden, head: FasterRcnnHead, seen: dict) -> Trace:
    (pyramid, proposals, targets), _ = seen[head.rcnn]
    chosen = []

    def sample(numbers: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        chosen.append((numbers, *sample_balanced(numbers, *arguments)))
        return chosen[-1][1:]

    with (
        recorded_draws(golden.outputs) as names,
        mock.patch.object(rcnn, "sample_balanced", sample),
    ):
        names[:] = [name for name in names if ".rpn." not in name]
        samples = head.rcnn.sample(proposals, targets)
    result: Trace = {}
    for image, (one, t) in enumerate(zip(samples, targets, strict=True)):
        numbers, positive, negative = chosen[image]
        values = {
            "boxes_xyxy": one.boxes,
            "pos_gt_label": one.labels,
            "pos_gt_box": one.targets,
            "proposal_gt_inds_before_adding_gt": numbers[len(t) :].clamp(min=-1) + 1,
            "pos_index": positive,
            "neg_index": negative,
            "pos_gt_index": numbers[positive],
            "pos_is_gt": positive < len(t),
        }
        result |= {f"16_rcnn_sample.img{image}.{name}": value for name, value in values.items()}

    features = head.rcnn.roi_features(pyramid, [one.boxes for one in samples])
    logits, deltas = head.rcnn.predict(features.cells)
    classes = golden.model.config.num_classes
    pairs = [(one, len(one.boxes) - len(one.labels)) for one in samples]
    labels = torch.cat([functional.pad(one.labels, (0, n), value=classes) for one, n in pairs])
    wanted = torch.cat([functional.pad(one.targets, (0, 0, 0, n)) for one, n in pairs])
    return result | {
        "17_rcnn.roi_feat_first4": features.cells[:4],
        "17_rcnn.roi_feat_mean": features.means,
        "17_rcnn.cls_logits": logits,
        "17_rcnn.bbox_deltas": deltas.flatten(1),
        "17_rcnn.labels": labels,
        "17_rcnn.label_weights": torch.ones(len(logits)),
        "17_rcnn.bbox_targets_xyxy": wanted,
        "17_rcnn.bbox_weights": (labels < classes)[:, None].expand(-1, 4).float(),
        "22_loss.acc0": (logits.argmax(1) == labels).float().mean() * 100,
    }


def trace_atss(golden: Golden, head: AtssHead, seen: dict) -> Trace:
    (pyramid, sizes, targets), _ = seen[head]
    prediction = head.predict(pyramid)
    assigned, anchors = head.assign(prediction, sizes, targets), prediction.anchors
    shapes = [level.shape[-2:] for level in pyramid]
    result = {}
    for name, values in (
        ("cls", prediction.logits),
        ("reg", prediction.deltas),
        ("ctr", prediction.quality[..., None]),
    ):
        for level, of_level in enumerate(values.split(list(anchors.counts), dim=1)):
            maps = of_level.transpose(1, 2).unflatten(2, shapes[level])
            result[f"18_atss.{name}.{level}"] = maps
    for image, (of_image, t) in enumerate(zip(assigned, targets, strict=True)):
        index = (of_image >= 0).nonzero().squeeze(1)
        result |= {
            f"19_atss_tgt.img{image}.num_anchors": torch.tensor(len(of_image)),
            f"19_atss_tgt.img{image}.num_with_weight": (of_image != IGNORED).sum(),
            f"19_atss_tgt.img{image}.pos_index": index,
            f"19_atss_tgt.img{image}.pos_label": t.labels[of_image[index]],
            f"19_atss_tgt.img{image}.pos_anchor_xyxy": anchors.boxes[index],
            f"19_atss_tgt.img{image}.pos_box_target_xyxy": t.boxes[of_image[index]],
        }
    return result | atss_losses_per_level(golden, head, prediction, assigned, targets)


def atss_losses_per_level(
    golden: Golden, head: AtssHead, prediction: Any, assigned: Tensor, targets: list[Targets]
) -> Trace:
    """The head's losses with the assignment of all but one level blanked out, level by level."""
    weights, anchors = golden.model.config.loss_weights(), prediction.anchors
    wanted = {"cls": "loss_cls1", "giou": "loss_bbox1", "centerness": "loss_centerness1"}
    objects, _ = pad_objects(targets)
    image, anchor = (assigned >= 0).nonzero(as_tuple=True)
    boxes = objects[image, assigned[image, anchor]]
    centerness = centerness_targets(anchors.centres[anchor], boxes)
    positives = (assigned >= 0).sum(1).clamp(min=1).sum()
    counts = {"cls": positives, "centerness": positives, "giou": centerness.sum().clamp(min=1)}
    per_level: dict[str, list[Tensor]] = {term: [] for term in wanted}
    for level in range(len(anchors.counts)):
        here = (anchors.levels.to(assigned.device) == level).expand_as(assigned)
        only = torch.where(here, assigned, IGNORED)
        losses = head._losses(prediction, only, targets)
        alone = here[image, anchor]
        own = (only >= 0).sum(1).clamp(min=1).sum()
        own_counts = {"cls": own, "centerness": own, "giou": centerness[alone].sum().clamp(min=1)}
        for term in wanted:
            per_level[term].append(losses[term] * own_counts[term] / counts[term])
    return {
        f"22_loss_per_level.{official}": torch.stack(per_level[term]) * weights[f"atss/{term}"]
        for term, official in wanted.items()
    }


def trace_downsample(golden: Golden) -> Trace:
    prefix = "90_unit.downsample_of_memory_level_"
    levels = [name.removeprefix(prefix) for name in golden.outputs if name.startswith(prefix)]
    return {
        f"{prefix}{i}": golden.model.adapter.downsample(
            golden.outputs[f"10_memory_level.{i}"].to(golden.device)
        )
        for i in levels
    }


def trace_detections(golden: Golden) -> Trace:
    """Detections of every branch, in the network's pixels and in those of the original image."""
    model, batch = golden.model.eval(), golden.batch()
    result: Trace = {}
    for branch, official in (("query", "query"), ("faster_rcnn", "roi"), ("atss", "atss")):
        for image, detections in enumerate(model.detect(batch, branch)):
            height, width = batch.sizes[image]
            scale_w, scale_h = golden.inputs["scale_factor"][image][:2].tolist()
            original = detections.rescaled((height, width), (height / scale_h, width / scale_w))
            for number, found in enumerate((detections, original)):
                prefix = f"31_det.{official}.rescale{number}.img{image}"
                result |= {f"{prefix}.{k}": v for k, v in vars(found).items()}
    with torch.no_grad():
        pyramid = model.memory_pyramid(model.encode(batch))
        for head in model.heads:
            if isinstance(head, FasterRcnnHead):
                per_level = head.config.rpn.test_nms_pre
                proposals = head.rpn.propose(head.rpn(pyramid), batch.sizes, per_level)
                result |= {f"30_test.rpn_proposals.img{i}": p for i, p in enumerate(proposals)}
    return result


def trace_gradients(model: CoDETR) -> Trace:
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    result = {
        f"24_grad_norm.{name}": gradient.norm()
        for name, gradient in to_official_names(gradients, model.config).items()
    }
    return result | {"24_grad_norm_all": torch.stack(list(result.values())).norm()}


def official_loss(name: str, config: DetectorConfig) -> str:
    """``d0.loss_bbox`` for ``query/0/l1`` and so on (method.md 31)."""
    *scope, term = name.split("/")
    kinds = {"cls": "cls", "l1": "bbox", "giou": "iou"}
    last = str(config.transformer.decoder_layers - 1)
    match scope:
        case ["query", layer]:
            prefix = "" if layer == last else f"d{layer}."
            return f"22_loss.{prefix}loss_{kinds[term]}"
        case ["denoising", layer]:
            prefix = "" if layer == last else f"d{layer}."
            return f"22_loss.{prefix}dn_loss_{kinds[term]}"
        case ["encoder"]:
            return f"22_loss.enc_loss_{kinds[term]}"
        case ["positive", head, layer]:
            prefix = "" if layer == last else f"d{layer}."
            return f"22_loss.{prefix}loss_{kinds[term]}_aux{config.head_names.index(head)}"
        case [head]:
            number = config.head_names.index(head)
            stage, _, kind = term.rpartition("_")
            kind = {"l1": "bbox", "giou": "bbox"}.get(kind, kind)
            return f"22_loss.loss_rpn_{kind}" if stage == "rpn" else f"22_loss.loss_{kind}{number}"
    raise AssertionError(name)
