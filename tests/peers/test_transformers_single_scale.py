"""Conditional DETR and DAB-DETR, ours and transformers': equal weights compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers_single_scale import (
    CONDITIONAL,
    DAB,
    DAB_DC5,
    build_peer,
    load_peer_weights,
    our_names,
    peer_layers,
    randomise,
)

from codetr.config import DetectorConfig, parse
from codetr.detector import CoDETR
from codetr.queries.selection import QUERY
from codetr.structures import ImageBatch
from codetr.zoo import detector_config

ALL = pytest.mark.parametrize(
    "config", [CONDITIONAL, DAB, DAB_DC5], ids=["conditional", "dab", "dab-dc5"]
)


def padded_batch() -> ImageBatch:
    """One image fills the batch of 160 x 224 pixels, the other leaves padding on two sides."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(160, 224), (131, 170)]
    pixels = torch.zeros(2, 3, 160, 224)
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=draw)
    return ImageBatch(pixels, sizes)


@ALL
def test_logits_boxes_and_gradients_are_transformers(config: DetectorConfig) -> None:
    torch.manual_seed(0)
    peer, model = build_peer(config).eval(), CoDETR(config).eval()
    randomise(peer)
    load_peer_weights(model, peer, config)
    batch = padded_batch()
    logits, boxes = peer_layers(peer, batch)

    memory = model.encode(batch)
    assert memory.padding[1].any()
    prediction = model.decoder([model.queries(memory).group], memory)[QUERY]
    torch.testing.assert_close(prediction.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.boxes, boxes, rtol=1e-4, atol=1e-4)
    # A detector that ignored its input would pass the above.
    assert boxes.std() > 0.01
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 0.01

    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows.shape, generator=draw) for rows in (logits, boxes)]
    for outputs in ((logits, boxes), (prediction.logits, prediction.boxes)):
        total = sum((weight * rows).sum() for weight, rows in zip(weights, outputs, strict=True))
        total.backward()  # type: ignore[union-attr]
    # Not the backbone's, whose norms and first stages transformers does not freeze as we do.
    theirs = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in peer.named_parameters(remove_duplicate=False)
        if "backbone" not in name
    }
    ours = {n: p.grad for n, p in model.named_parameters() if not n.startswith("backbone")}
    expected = our_names(theirs, config)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert (ours[name] - gradient).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize("name", ["conditional-detr-c5-r50", "dab-detr-c5-r50", "dab-detr-dc5-r50"])
def test_the_zoos_detectors_have_transformers_parameters(name: str) -> None:
    """At full size, name by name and shape by shape, apart from the backbone's norms."""
    settings = detector_config(name).model_dump(mode="json")
    settings["backbone"]["pretrained"] = False
    config = parse(DetectorConfig, settings, name)
    with torch.device("meta"):
        peer, model = build_peer(config), CoDETR(config)
    theirs = our_names(dict(peer.named_parameters(remove_duplicate=False)), config)
    assert {n: p.shape for n, p in theirs.items() if not n.startswith("backbone")} == {
        n: p.shape for n, p in model.named_parameters() if not n.startswith("backbone")
    }
