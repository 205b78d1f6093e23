"""How often a training step has a GPU wait for Python, and Python for the GPU: by reading what is
not computed yet, by a shape that depends on it, by an upload from memory that is not pinned.

On the CPU a pretended GPU counts this by place, exactly; on a GPU PyTorch itself does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGpu
from test_detector import images, objects
from tiny_training import FASTER_RCNN, MASK_RCNN, tiny_detector
from torch import Tensor

from codetr.detector import CoDETR
from codetr.ops.roi_align import _level_by_level

SIZES = [(64, 96), (48, 64)]
TWO_STAGE = {"two_stage": True}

# Costs go to the host once, of all layers: for the encoder's proposals, and for the decoder.
ENCODER = {"hungarian.hungarian_layers": 1}
MATCHING = {"hungarian.hungarian_layers": 2}
# The positives of all images; then, of each image, positives and negatives.
DENSE = {"one_stage.matched": 1, "one_stage._positives": 2 * 2}
# The assignment goes to the host, where samples are drawn. Of each image, the boxes that are not
# empty, and non-maximum suppression, twice where the best boxes are not enough; of each level, the
# regions that read it; those that are positive.
REGIONS = {
    "rpn.sample": 1,
    "rpn.propose": 2,
    "rpn.leading_nms": 2 * 2,
    "rcnn.sample": 1,
    "roi_align._readers": 3,
    "rcnn._losses": 1,
}
CASES: dict[str, tuple[list, dict[str, Any], dict[str, int]]] = {
    "one stage": ([], {}, ENCODER),
    "K = 0": ([], TWO_STAGE, MATCHING),
    "denoising": ([], {"dino": True}, MATCHING),
    # Groups are matched by themselves.
    "one to many": ([], {"kind": "hybrid"}, {"hungarian.hungarian_layers": 3}),
    "ATSS": (["atss"], TWO_STAGE, MATCHING | DENSE),
    "RetinaNet": (["retinanet"], TWO_STAGE, MATCHING | DENSE),
    "FCOS": (["fcos"], TWO_STAGE, MATCHING | DENSE),
    "GFL": (["gfl"], TWO_STAGE, MATCHING | DENSE),
    # The candidates come first; then their losses go to the host, where mixtures are fitted, and
    # the largest number of an object.
    "PAA": (["paa"], TWO_STAGE, MATCHING | DENSE | {"one_stage.matched": 2, "paa.match_paa": 2}),
    "Faster R-CNN": ([FASTER_RCNN], TWO_STAGE, MATCHING | REGIONS),
    # Masks have region features of their own.
    "Mask R-CNN": ([MASK_RCNN], TWO_STAGE, MATCHING | REGIONS | {"roi_align._readers": 6}),
    "K = 2": (["atss", FASTER_RCNN], TWO_STAGE, MATCHING | DENSE | REGIONS),
}
cases = pytest.mark.parametrize("case", CASES)


def step(case: str, device: str) -> Callable[[], None]:
    """Losses and backward pass of two images."""
    heads, options, _ = CASES[case]
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(*heads, **options)).to(device).train()
    batch = images(SIZES).to(device)
    targets = [objects(3 - i, size, i).to(device) for i, size in enumerate(SIZES)]

    def run() -> None:
        model.losses(batch, targets).total.backward()

    return run


@cases
def test_waits_of_a_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What it would do on a GPU.
    monkeypatch.setattr("codetr.ops.roi_align._with_our_gradient", _level_by_level)
    run = step(case, "cpu")
    with PretendedGpu():
        run()  # fills the caches
    with PretendedGpu() as gpu:
        run()
    assert gpu.waits == CASES[case][2]


def test_what_the_pretended_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to wait, and none of those to avoid it."""
    monkeypatch.setattr("pretended_gpu._place", lambda: "here")
    values = torch.arange(4.0)
    waiting: list[Callable[[Tensor], Any]] = [
        lambda v: v.cpu().tolist(),
        lambda v: v.tolist(),
        lambda v: v.numpy(),
        lambda v: v[1].item(),
        lambda v: float(v[1]),
        lambda v: bool(v.any()),
        lambda v: v[v > 1],
        lambda v: v.nonzero(),
        lambda v: v.unique(),
        lambda v: torch.tensor([1.0], device=v.device),
        lambda v: v.new_tensor([1.0]),
        lambda v: torch.tensor([1.0]).to(v),
        lambda v: v[torch.tensor([0, 1])],
    ]
    free: list[Callable[[Tensor], Any]] = [
        lambda v: v.cpu,
        lambda v: v.to(torch.float64).to(v.device),
        lambda v: v + torch.tensor([1.0]).item(),
        lambda v: v.add_(torch.arange(3).nonzero().sort().values.tolist()[0][0]),
        lambda v: torch.zeros(2, device=v.device) + v.sum(),
        lambda v: v.where(v > 1, 0),
        lambda v: v.clone().masked_fill_(v > 1, 0),
    ]
    for calls, expected in ((waiting, 1), (free, 0)):
        for number, call in enumerate(calls):
            with PretendedGpu() as gpu:
                call(values)
            assert gpu.waits.total() == expected, number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@cases
def test_a_gpu_waits_no_more_often(case: str) -> None:
    run = step(case, "cuda")
    run()  # fills the caches
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in told if "synchroniz" in str(w.message)]
    places = [f"{w.filename}:{w.lineno}" for w in waits]
    assert len(waits) <= sum(CASES[case][2].values()), places
