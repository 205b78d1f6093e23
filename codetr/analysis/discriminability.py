"""How discriminative the encoder's features are (equation 7, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codetr.analysis.frame import (
    Analysis,
    Arrays,
    Measurement,
    Numbers,
    Seen,
    Tables,
    shown,
    shrunk,
)
from codetr.analysis.maps import as_fraction, foreground, to_image, valid_maps
from codetr.analysis.page import (
    extremes,
    first_of,
    groups,
    heading,
    image,
    images_of,
    number_table,
    write_page,
)
from codetr.plotting import draw_heat, picture
from codetr.structures import Memory, Size

NUMBERS = ("foreground", "background", "contrast", "separation")

PAPER = (
    "The paper (section 3.4, figure 3) saw ATSS and Co-Deformable-DETR tell the areas of key "
    "objects from the rest better than Deformable-DETR, which the background disturbs."
)


def discriminability(memory: Memory, sizes: Sequence[Size]) -> list[Tensor]:
    """D of equation 7 for each image: (H, W) in [0, 1].

    The L2 norm over channels of each level, divided by its maximum over the image's own cells,
    resized to the image, and averaged over the levels. Cells in the padding do not count.

    Args:
        memory: of B images.
        sizes: valid (height, width) of each image in pixels.
    """
    norms = valid_maps(memory.tokens.float().norm(dim=-1), memory)
    return [
        torch.stack([to_image(as_fraction(level), size) for level in levels]).mean(0).clamp(0, 1)
        for levels, size in zip(norms, sizes, strict=True)
    ]


class Discriminability(Analysis):
    """Numbers: ``foreground`` and ``background``, the mean score inside and outside of boxes over
    the images that have both; ``contrast``, their difference; ``separation``, the difference in
    standard deviations of the image's scores. The encoder ends in a layer norm, which leaves norms
    alike but for its own scales: only the last of these can be compared between detectors.
    """

    name = "discriminability"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows: dict[int, tuple[float, float, float]] = {}
        self.pictures: Arrays = {}

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        memory = self.images_alone(self.model.encode(seen.batch), seen.batch)
        scores = discriminability(memory, seen.sizes)
        rows = zip(seen.indices, scores, seen.targets, strict=True)
        for number, (index, score, targets) in enumerate(rows):
            objects = foreground(targets.boxes, (score.shape[0], score.shape[1]))
            if objects.any() and not objects.all():
                exact = score.double()
                inside, outside = float(exact[objects].mean()), float(exact[~objects].mean())
                self.rows[index] = (inside, outside, float(exact.std()))
            if index in self.examples:
                self.pictures[f"image/{index}"] = shown(
                    seen.pixels(number), self.subject.checkpoint.data
                )
                self.pictures[f"score/{index}"] = shrunk(score[None])[0].cpu().numpy()

    def finish(self) -> tuple[Numbers, Arrays]:
        by_image = np.array([(index, *self.rows[index]) for index in sorted(self.rows)])
        numbers: Numbers = {}
        if len(by_image):
            _, inside, outside, deviation = by_image.T
            varied = deviation > 0
            numbers = {
                "foreground": inside.mean(),
                "background": outside.mean(),
                "contrast": (inside - outside).mean(),
                "separation": ((inside - outside)[varied] / deviation[varied]).mean(),
            }
        return numbers, {"by_image": by_image, **self.pictures}

    @classmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        _: Tables,
        arms: Sequence[str] = (),  # noqa: ARG003
    ) -> list[Path]:
        drawn = _draw([some[0] for some in groups(measurements).values()], folder)
        page = write_page(
            folder / f"{cls.name}.md",
            "Discriminability of the encoder's features",
            seen="How far the mean score of objects lies above the background's, in standard "
            f"deviations, is {extremes(measurements, 'separation', '.2f')}.",
            paper=PAPER,
            about=images_of(measurements),
            blocks=[
                number_table(measurements, {name: name for name in NUMBERS}),
                image(drawn, "The images, and on them the score of each detector"),
                "Score: norm of the encoder's features, each level divided by its maximum in the "
                "image, averaged over levels (equation 7). Foreground is what a box covers. The "
                "encoder ends in a layer norm, which makes norms alike but for its learned scales: "
                "compare the separation, in standard deviations of an image's scores. Each map's "
                "colours span its own range, which is written above it"
                f"{first_of(measurements)}.",
            ],
        )
        return [page, drawn]


def _draw(measurements: Sequence[Measurement], folder: Path) -> Path:
    """Images in rows; ground truth, then each detector's scores, in columns."""
    first = measurements[0].arrays
    indices = sorted(int(name.split("/")[1]) for name in first if name.startswith("image/"))
    columns = 1 + len(measurements)
    path = folder / f"{Discriminability.name}.png"
    size = (1.5 * columns, 1.7 * len(indices) + 0.4)
    with picture(path, len(indices), columns, size=size, axes_grid=False) as (_, panels):
        for axes in panels.flat:
            axes.axis("off")
        for number, (row, index) in enumerate(zip(panels, indices, strict=True)):
            row[0].imshow(first[f"image/{index}"])
            for axes, one in zip(row[1:], measurements, strict=True):
                score = one.arrays[f"score/{index}"]
                least, most = float(score.min()), float(score.max())
                draw_heat(axes, first[f"image/{index}"], score, least, most)
                span = _span(least, most)
                title = span if number else f"{heading(one.group)}\n{span}"
                axes.set_title(title, fontsize=8)
        panels[0, 0].set_title("image", fontsize=8)
    return path


def _span(least: float, most: float) -> str:
    """``0.9991 to 1.0000``: with so many decimals that they differ."""
    decimals = 2 if most == least else max(2, 1 - math.floor(math.log10(most - least)))
    return f"{least:.{decimals}f} to {most:.{decimals}f}"
