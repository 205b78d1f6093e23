"""Deformable DETR, ours and transformers': equal weights compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_deformable import (
    build_peer,
    compute_ours,
    compute_theirs,
    expressible,
    load_peer_weights,
    peer_config,
    randomise,
)

from codetr.config import DetectorConfig
from codetr.detector import CoDETR
from codetr.structures import ImageBatch, Targets

QUERIES = {
    "two-stage": {"two_stage": True},
    "one-stage with box refinement": {"two_stage": False},
    "one-stage": {"two_stage": False, "box_refinement": False},
}


def detector(**queries: Any) -> DetectorConfig:
    """A ResNet-18, 64 channels, 2 + 3 layers, 20 queries, 7 classes, without DINO's options."""
    config = DetectorConfig.model_validate(
        {
            "num_classes": 7,
            "backbone": {"name": "resnet18", "pretrained": False},
            "transformer": {
                "embed_dim": 64,
                "ffn_dim": 96,
                "attention_heads": 4,
                "sampling_points": 3,
                "encoder_layers": 2,
                "decoder_layers": 3,
            },
            "queries": {"count": 20, **queries},
        }
    )
    return expressible(config)


def padded_batch() -> tuple[ImageBatch, list[Targets]]:
    """One image fills the batch of 160 × 224 pixels, the other leaves padding on two sides."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(160, 224), (131, 170)]
    pixels = torch.zeros(2, 3, 160, 224)
    targets = []
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = torch.randn(3, height, width, generator=draw)
        corners = torch.rand(3 + image, 2, generator=draw) * 60
        sides = 20 + torch.rand(3 + image, 2, generator=draw) * 50
        labels = torch.randint(7, (3 + image,), generator=draw)
        targets.append(Targets(torch.cat((corners, corners + sides), 1), labels, image))
    return ImageBatch(pixels, sizes), targets


def gradients_of(detector: Any) -> dict[str, Tensor]:
    """At both ends and in the middle: what is detached on the way would show."""
    theirs = hasattr(detector, "model")
    encoder = detector.model if theirs else detector
    backbone = encoder.backbone.model if theirs else encoder.backbone.body
    head = detector.bbox_embed[0].layers[0] if theirs else detector.decoder.regress[0][0]
    level = detector.model.level_embed if theirs else detector.encoder.level_embedding
    parameters = {"backbone": backbone.layer4[1].conv2.weight, "level": level, "head": head.weight}
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("queries", QUERIES.values(), ids=QUERIES)
def test_equal_weights_give_equal_logits_boxes_and_losses(queries: dict[str, bool]) -> None:
    config = detector(**queries)
    torch.manual_seed(0)
    peer, model = build_peer(config), CoDETR(config)
    randomise(peer)
    load_peer_weights(model, peer)
    batch, targets = padded_batch()
    ours = compute_ours(model.train(), batch, targets)
    theirs = compute_theirs(peer.train(), batch, targets)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-4)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, value in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for computed in (ours, theirs):
        torch.stack([*computed.losses.values()]).sum().backward()
    for name, expected in gradients_of(peer).items():
        actual = gradients_of(model)[name]
        assert (actual - expected).abs().max() < 1e-3 * expected.abs().max(), name
    # A detector that ignored its input would pass the above.
    assert theirs.boxes.std() > 0.01
    assert (theirs.logits[:, 0] - theirs.logits[:, 1]).abs().max() > 0.01


def test_the_same_parameters_are_trained() -> None:
    """All but the biases of the neck's convolutions, which ours lacks."""
    config = detector(two_stage=True)
    peer, model = build_peer(config), CoDETR(config)
    theirs, ours = (
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (peer, model)
    )
    assert theirs - ours == config.transformer.levels * config.transformer.embed_dim


def test_a_bias_of_the_neck_is_refused() -> None:
    config = detector(two_stage=False)
    peer = build_peer(config)
    with torch.no_grad():
        peer.model.input_proj[1][0].bias[3] = 0.1
    with pytest.raises(ValueError, match=r"input_proj\.1\.0\.bias is not zero"):
        load_peer_weights(CoDETR(config), peer)


def test_what_transformers_cannot_be_is_refused() -> None:
    config = DetectorConfig.model_validate(
        {"backbone": {"width": 32, "pretrained": False}, "heads": ["atss"]}
    )
    names = r"heads, queries\.mixed_selection, queries\.look_forward_twice, backbone\.width$"
    with pytest.raises(ValueError, match=names):
        peer_config(config)
