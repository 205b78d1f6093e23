"""What a named detector costs, measured on the built detector without weights or data.

``python -m codetr.zoo.measure [NAME...]`` writes the numbers into the files of the zoo.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from codetr.checkpoint import without_download
from codetr.config import DetectorConfig
from codetr.detector import CoDETR
from codetr.structures import ImageBatch, Size
from codetr.zoo.catalogue import Measured, entries, entry

IMAGE: Size = (800, 1333)
"""(height, width) in pixels of the image that FLOPs are counted for."""


def on_meta(config: DetectorConfig) -> CoDETR:
    """The detector in evaluation mode, its tensors without memory or values."""
    with torch.device("meta"):
        return CoDETR(without_download(config)).eval()


def gflops(model: CoDETR, size: Size = IMAGE) -> float:
    """10^9 floating-point operations of inference in one image of ``size``, up to the decoder's
    last boxes.

    Convolutions, matrix products and attention count, two operations for each multiply-add, as
    ``torch.utils.flop_counter`` has it (many papers count one). The bilinear samples of deformable
    attention, norms and activations do not.
    """
    device = next(model.parameters()).device
    batch = ImageBatch(torch.zeros(1, 3, *size, device=device), [size])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        memory = model.encode(batch)
        model.decoder([model.queries(memory).group], memory)
    return counter.get_total_flops() / 1e9


def measure(config: DetectorConfig) -> Measured:
    """Parameters and FLOPs of a detector of this configuration."""
    model = on_meta(config)
    return Measured(
        inference_parameters=sum(p.numel() for p in model.inference_parameters()),
        training_parameters=sum(p.numel() for p in model.parameters()),
        gflops=round(gflops(model), 1),
    )


def write(file: Path, measured: Measured) -> None:
    """Put the numbers into the file of a detector, in the place of earlier ones."""
    numbers = ", ".join(f"{name}: {value}" for name, value in measured.model_dump().items())
    text = re.sub(r"^measured: .*\n", "", file.read_text(), flags=re.MULTILINE)
    file.write_text(f"{text}measured: {{{numbers}}}\n")


if __name__ == "__main__":
    for found in [entry(name) for name in sys.argv[1:]] or entries():
        if found.unavailable is None:
            print(found.name, flush=True)
            write(found.file, measure(found.config))
