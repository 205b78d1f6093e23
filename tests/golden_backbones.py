"""Maps of the original Swin transformer, ViT and simple feature pyramid.

Their random weights and inputs are not stored but drawn again as they were for the original: one
``torch.manual_seed`` for each network, then tensor after tensor in the order of its names. The
files hold each tensor's name, shape and first values, against which the draws are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "backbones"


def read(name: str) -> dict[str, Any]:
    """``swin`` or ``vit``: config, input, outputs, state_dict under the original's names without
    its buffers, which are apart (index; rope); of the ViT also neck_outputs, neck_state_dict."""
    golden = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    for key in ("state_dict", "neck_state_dict"):
        if key in golden:
            torch.manual_seed(golden[key]["seed"])
            tensors = golden[key]["tensors"]
            golden[key] = {tensor: draw(**how) for tensor, how in tensors.items()}
    torch.manual_seed(golden["input"].pop("seed"))
    golden["input"] = draw(**golden["input"], scale=1.0)
    return golden


def draw(shape: tuple[int, ...], scale: float | None, first: Tensor) -> Tensor:
    """Normal numbers of that deviation; uniform ones of 0.8 to 1.2 where it is None."""
    value = torch.rand(shape) * 0.4 + 0.8 if scale is None else torch.randn(shape) * scale
    torch.testing.assert_close(
        value.flatten()[: len(first)],
        first,
        rtol=1e-5,
        atol=1e-7,
        msg="torch draws other numbers than those that the original's weights were made of",
    )
    return value
