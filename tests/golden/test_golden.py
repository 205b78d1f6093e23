"""Every tensor that the original implementation computed, against ours.

The random draws, and the proposals whose order depends on near ties, are fed as recorded; all else
is computed from the images on.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from comparison import AMPLIFIED, AS_SETS, assert_matches, compare_detections, of_one_image
from replay import Golden, Trace, trace, trace_detections
from torch import Tensor

from codetr.boxes import iou
from codetr.zoo.official import from_official_names, to_official_names

# Co-DINO's coarsest map has 2 x 2 cells, and one kink there happens to lie at a rounding error's
# distance: a relative change of 1e-6 in our weights moves this norm by 0.7 %, to 2e-5 of the
# recorded one. All others keep to the common tolerance.
KINKED = {"neck.extra_convs.0.conv.weight"}


@functools.cache
def golden_of(folder: Path) -> Golden:
    torch.manual_seed(0)
    return Golden(folder)


@functools.cache
def trace_of(folder: Path) -> Trace:
    return trace(golden_of(folder))


@functools.cache
def detections_of(folder: Path) -> Trace:
    return trace_detections(golden_of(folder))


def test_computes_every_recorded_tensor(golden_folder: Path) -> None:
    golden, ours = golden_of(golden_folder), trace_of(golden_folder)
    skipped = (*AS_SETS, "02a_dn_draw", "21_randperm", "24_grad_norm", "22_loss")
    for name, expected in golden.outputs.items():
        if name.startswith(skipped):
            continue
        actual = ours[name] if name in ours else of_one_image(name, ours)
        assert_matches(name, actual, expected, 5e-4 if name in AMPLIFIED else 1e-4)


def test_every_loss(golden_folder: Path) -> None:
    golden, ours = golden_of(golden_folder), trace_of(golden_folder)
    expected = {n: v for n, v in golden.outputs.items() if n.startswith(("22_loss", "23_total"))}
    assert {n for n in ours if n.startswith("22_loss.")} <= set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_every_gradient_norm(golden_folder: Path) -> None:
    golden, ours = golden_of(golden_folder), trace_of(golden_folder)
    ours = {n.removeprefix("24_grad_norm."): v for n, v in ours.items() if "24_grad_norm." in n}
    assert set(ours) == set(golden.grad_norms)
    largest = max(golden.grad_norms.values())
    for name, expected in golden.grad_norms.items():
        # ReLU and bilinear kinks deep in the backbone turn over with the last bit.
        tolerance = 5e-2 if name.startswith("backbone.") else 1e-2 if name in KINKED else 5e-3
        error = abs(ours[name].item() - expected)
        assert error <= tolerance * expected + 1e-6 * largest, f"{name}: {ours[name]} {expected}"
    assert_matches(
        "all", trace_of(golden_folder)["24_grad_norm_all"], golden.outputs["24_grad_norm_all"], 5e-3
    )


def test_frozen_parameters(golden_folder: Path) -> None:
    golden = golden_of(golden_folder)
    trainable = {n: p for n, p in golden.model.named_parameters() if p.requires_grad}
    everything = dict(golden.model.named_parameters())
    config = golden.model.config
    frozen = set(to_official_names(everything, config)) - set(to_official_names(trainable, config))
    assert frozen == golden.frozen


def test_every_recorded_draw_was_used(golden_folder: Path) -> None:
    """Our draws are the original's: same candidates, same order."""
    golden = golden_of(golden_folder)
    used = trace_of(golden_folder)["unused_draws"]
    assert len(used) == 0, [n for n in golden.outputs if n.startswith("21_")]


def test_proposals_and_detections_as_sets(golden_folder: Path) -> None:
    golden = golden_of(golden_folder)
    names = [n for n in golden.outputs if n.startswith(AS_SETS)]
    ours = trace_of(golden_folder) | (detections_of(golden_folder) if names else {})
    for name in names:
        if name.startswith("31_det."):
            if name.endswith(".boxes"):
                compare_detections(name.removesuffix(".boxes"), ours, golden.outputs)
        else:
            compare_proposals(name, ours[name], golden.outputs[name])


def compare_proposals(name: str, actual: Tensor, expected: Tensor) -> None:
    """Nearly every recorded box is among ours; near ties decide a few at NMS and at the cut."""
    overlap = iou(expected[:, None, :4], actual.cpu()[None])
    found = (overlap.amax(1) > 0.999).float().mean()
    assert found >= 0.99, f"{name}: {found:.3f} of the recorded boxes found"


def test_names_round_trip(golden_folder: Path) -> None:
    """Exported under the official names, our weights are the file that we loaded, bit for bit."""
    golden = golden_of(golden_folder)
    config, ours = golden.model.config, golden.model.state_dict()
    official = to_official_names(ours, config)
    again = from_official_names(official, config)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_unknown_official_names_are_listed(golden_folder: Path) -> None:
    config = golden_of(golden_folder).model.config
    with pytest.raises(KeyError, match=r"2 names .*mask_head.*rpn2"):
        from_official_names({"mask_head.x": torch.ones(1), "rpn2": torch.ones(1)}, config)
