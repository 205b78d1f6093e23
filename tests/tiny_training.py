"""A detector of a few thousand parameters, and batches for it, for the tests of training."""

from __future__ import annotations

from typing import Any

import torch

from codetr.config import DataConfig, DetectorConfig, TrainingConfig
from codetr.data import Classes
from codetr.structures import ImageBatch, Targets
from codetr.training import TrainingState

MASK_RCNN = {
    "type": "mask_rcnn",
    "rpn": {"samples": 32, "train_nms_pre": 50, "test_nms_pre": 50, "keep": 40},
    "rcnn": {"samples": 32, "fc_dim": 32, "finest_scale": 28},
    "mask": {"convs": 1, "channels": 16, "roi_size": 7},
}
CLASSES = Classes(("cat", "dog", "fish"), (1, 2, 7))
FASTER_RCNN = {
    "type": "faster_rcnn",
    "rpn": {"samples": 32, "train_nms_pre": 50, "test_nms_pre": 50, "keep": 40},
    "rcnn": {"samples": 32, "fc_dim": 32, "finest_scale": 28},
}


C5 = {
    "backbone": {"stages": [4]},
    "transformer": {"attention": "conditional", "levels": 1, "encoder_layers": 2},
}
DAB: dict[str, Any] = {
    "backbone": C5["backbone"],
    "transformer": {**C5["transformer"], "activation": "prelu", "scale_positions": True},
    "queries": {
        "learned_content": False,
        "norm_states": True,
        "dynamic_anchors": True,
        "shared_branches": True,
        "size_modulation": True,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "one-stage": {},
    "unrefined": {"queries": {"box_refinement": False}},
    "two-stage": {"queries": {"two_stage": True}},
    "dino": {
        "queries": {
            "two_stage": True,
            "rank_by": "best_class",
            "dynamic_anchors": True,
            "norm_states": True,
            "logit_eps": 1e-3,
        },
        "denoising": {"enabled": True, "queries": 6},
        "query_loss": {"classification": "quality_focal", "cls": 1.0},
        "soft_nms": {"enabled": True},
    },
    "hybrid": {
        "queries": {"two_stage": True},
        "one_to_many": {"groups": 1, "queries": 20, "repeat": 3, "tokens": "next"},
    },
    "grouped": {
        "queries": {"two_stage": True},
        "one_to_many": {"groups": 3, "queries": 12},
    },
    "conditional": {
        **C5,
        "queries": {"box_refinement": False, "learned_content": False, "norm_states": True},
    },
    "grouped conditional": {
        **C5,
        "queries": {"box_refinement": False, "learned_content": False, "norm_states": True},
        "one_to_many": {"groups": 2, "queries": 12},
    },
    "dab": DAB,
    "dab-dc5": {
        **DAB,
        "backbone": {**C5["backbone"], "dilated": True},
        "queries": {**DAB["queries"], "count": 4, "patterns": 3},
    },
    "dn": {
        "transformer": {"scale_positions": True},
        "queries": {"dynamic_anchors": True, "look_forward_twice": False},
        "denoising": {"enabled": True, "contrastive": False, "groups": 2, "box_noise": 0.4},
    },
}
"""Settings that make the tiny detector one of each kind."""


def tiny_detector(
    *heads: Any,
    kind: str = "one-stage",
    two_stage: bool = False,
    frozen_norm: bool = True,
    dino: bool = False,
    **settings: Any,
) -> DetectorConfig:
    """Strides 8 to 32, 32 channels, 1 + 2 layers, 12 queries; ``heads`` of small samples; changed
    as the ``kind`` wants, and then by ``settings`` of the detector."""
    kind = "dino" if dino else "two-stage" if two_stage else kind
    sizes = {
        "num_classes": len(CLASSES),
        "backbone": {
            "name": "tiny",
            "pretrained": False,
            "frozen_stages": -1,
            "frozen_norm": frozen_norm,
        },
        "transformer": {
            "embed_dim": 32,
            "ffn_dim": 64,
            "attention_heads": 4,
            "sampling_points": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "levels": 3,
            "group_norm_groups": 8,
        },
        "queries": {"count": 12, "two_stage": False},
        "heads": heads,
        "positive_queries": {"max": 20, "features": kind != "dino"},
    }
    return DetectorConfig.model_validate(merged(merged(sizes, KINDS[kind]), settings))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with the values of ``above``, section by section."""
    changed = {
        key: merged(below[key], value) if isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return below | changed


def tiny_training(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"epochs": 2, "batch_size": 4, "drop_epochs": [1], "precision": "fp32"} | settings
    )


def start(detector: DetectorConfig, training: TrainingConfig, steps: int) -> TrainingState:
    """A fresh state on the CPU with seed 7."""
    return TrainingState.start(
        detector,
        training,
        DataConfig(),
        CLASSES,
        seed=7,
        steps_per_epoch=steps,
        device=torch.device("cpu"),
        class_images=(5, 50, 500),
    )


def tiny_targets(image_id: int, objects: int, side: int = 64) -> Targets:
    draw = torch.Generator().manual_seed(image_id)
    corners = torch.rand(objects, 2, generator=draw) * side * 0.6
    lengths = (0.1 + 0.3 * torch.rand(objects, 2, generator=draw)) * side
    return Targets(
        boxes=torch.cat((corners, (corners + lengths).clamp(max=side)), dim=1),
        labels=torch.randint(len(CLASSES), (objects,), generator=draw),
        image_id=image_id,
        original_size=(side, side),
        seed=image_id,
        masks=torch.rand(objects, side, side, generator=draw) < 0.5,
    )


def tiny_batch(
    image_ids: list[int], objects: list[int], side: int = 64
) -> tuple[ImageBatch, list[Targets]]:
    """Images of one size; pixels and targets depend on the image's id alone."""
    pixels = [
        torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)) for i in image_ids
    ]
    targets = [tiny_targets(i, n, side) for i, n in zip(image_ids, objects, strict=True)]
    return ImageBatch(torch.stack(pixels), [(side, side)] * len(pixels)), targets
