"""How often a training step looks at the device: each look has a GPU wait for Python.

What waits there is the same operator here, so a profile on the CPU counts it, too: a shape that
depends on values (``nonzero``, also behind boolean indices, ``unique``) and a number that Python
reads (``item``). Copies of the assignments to the host, which are written out as ``.cpu()``, are
not among them.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_detector import images, objects
from tiny_training import FASTER_RCNN, tiny_detector
from torch.profiler import ProfilerActivity, profile

from codetr.detector import CoDETR

SIZES = [(64, 96), (48, 64)]
LOOKS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::_unique2")
SYNCHRONISE = ("cudaStreamSynchronize", "cudaDeviceSynchronize")


def operators_of_a_step(heads: list, device: str, names: tuple[str, ...]) -> Counter[str]:
    """Calls of the operators within losses and backward pass of two images."""
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(*heads, two_stage=True)).to(device).train()
    batch = images(SIZES).to(device)
    targets = [objects(3 - i, size, i).to(device) for i, size in enumerate(SIZES)]
    model.losses(batch, targets).total.backward()  # fills the caches
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=kinds) as measured:
        model.losses(batch, targets).total.backward()
    return Counter(event.name for event in measured.events() if event.name in names)


def test_without_heads_nothing_but_the_matching_looks() -> None:
    assert operators_of_a_step([], "cpu", LOOKS) == {}


@pytest.mark.parametrize(
    ("heads", "most"),
    [
        # For the positives of all images; then, of each image, positives and negatives.
        (["atss"], 1 + 2 * 2),
        (["retinanet"], 1 + 2 * 2),
        (["fcos"], 1 + 2 * 2),
        (["gfl"], 1 + 2 * 2),
        # Candidates of all images, the number of objects, and on the host what the mixtures keep;
        # for the fit itself, whether it goes on, there too, a hundred times at most.
        (["paa"], 1 + 2 * 2 + 1 + 1 + 1 + 100),
        # Of each image, the boxes that are not empty; of each level, the regions that read it;
        # those that are positive. Samples are drawn on the host: of each image two looks, twice.
        ([FASTER_RCNN], 2 + 3 + 1 + 2 * 2 * 2),
    ],
    ids=["ATSS", "RetinaNet", "FCOS", "GFL", "PAA", "Faster R-CNN"],
)
def test_looks_of_a_head(heads: list, most: int) -> None:
    looks = operators_of_a_step(heads, "cpu", LOOKS)
    assert 0 < looks.total() <= most, looks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_waits_no_more_often() -> None:
    """The Hungarian matchings of decoder and encoder: one copy to the host each."""
    waits = operators_of_a_step([], "cuda", SYNCHRONISE)
    assert waits.total() <= 2, waits
