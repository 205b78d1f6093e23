"""How much foreground and how much background a map covers (equation 8, figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codetr.analysis.attention import CrossAttention, attention_maps
from codetr.analysis.discriminability import discriminability
from codetr.analysis.frame import Analysis, Arrays, Measurement, Numbers, Seen, Tables
from codetr.analysis.maps import as_fraction, foreground
from codetr.analysis.page import (
    extremes,
    groups,
    image,
    images_of,
    number_table,
    write_page,
)
from codetr.plotting import draw_mean, legend_below, line_styles, picture

GRID = np.linspace(0, 1, 201)
"""Background shares at which curves are averaged."""

SOURCES = {"encoder": "the encoder's features", "decoder": "the decoder's cross-attention"}

PAPER = (
    "The paper (section 3.4, figure 2) saw the encoder's curves of ATSS and Co-Deformable-DETR "
    "above those of Deformable-DETR and Group-DETR, and in the decoder's attention those of "
    "Group-DETR and Co-Deformable-DETR generally above that of Deformable-DETR."
)


Curve = NDArray[np.float64]


def iof_iob(score: Tensor, objects: Tensor) -> tuple[Curve, Curve]:
    """Shares of foreground and of background above each threshold that makes a difference
    (equation 8): from (0, 0), where nothing is above it, to (1, 1).

    Args:
        score: (H, W).
        objects: (H, W) bool; must have pixels of both kinds.

    Returns:
        (n,) foreground and (n,) background share, both ascending.
    """
    values, order = score.flatten().sort(descending=True)
    is_object = objects.flatten()[order]
    # Pixels with one value pass a threshold together.
    last = torch.ones_like(is_object)
    last[:-1] = values[1:] != values[:-1]
    shares = [kind.cumsum(0)[last].double() / kind.sum() for kind in (is_object, ~is_object)]
    foreground_share, background_share = (np.append(0.0, share.cpu().numpy()) for share in shares)
    return foreground_share, background_share


def area(foreground_share: Curve, background_share: Curve) -> float:
    """Area under foreground share against background share.

    It is the chance that a pixel of an object scores higher than one of the background: 0.5 where
    the map knows nothing of objects.
    """
    return float(np.trapezoid(foreground_share, background_share))


def on_grid(foreground_share: Curve, background_share: Curve) -> Curve:
    """(201,) foreground share at the background shares of ``GRID``."""
    left = np.searchsorted(background_share, GRID, side="right") - 1
    right = np.minimum(left + 1, len(background_share) - 1)
    run = background_share[right] - background_share[left]
    part = np.divide(GRID - background_share[left], run, out=np.zeros_like(GRID), where=run > 0)
    return foreground_share[left] + part * (foreground_share[right] - foreground_share[left])


class IofIob(Analysis):
    """Numbers: ``encoder_area`` and ``decoder_area``, the areas under the curves, which are means
    over the images that have both foreground and background; ``attention_outside``, the share of
    the sampled attention that falls beyond the image."""

    name = "iof-iob"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.curves: dict[tuple[str, int], Curve] = {}
        self.areas: dict[tuple[str, int], float] = {}
        self.outside: dict[int, float] = {}

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        memory, sizes = self.model.encode(seen.batch), seen.sizes
        with CrossAttention(self.model.decoder) as attention:
            self.model.decoder([self.model.queries(memory).group], memory)
        alone = self.images_alone(memory, seen.batch)
        attended = attention_maps(attention.mean(), alone, sizes)
        scores = {
            "encoder": discriminability(alone, sizes),
            "decoder": [as_fraction(map_) for map_, _ in attended],
        }
        for number, (index, targets) in enumerate(zip(seen.indices, seen.targets, strict=True)):
            self.outside[index] = attended[number][1]
            objects = foreground(targets.boxes, sizes[number])
            if objects.any() and not objects.all():
                for name, maps in scores.items():
                    shares = iof_iob(maps[number], objects)
                    self.curves[name, index] = on_grid(*shares)
                    self.areas[name, index] = area(*shares)

    def finish(self) -> tuple[Numbers, Arrays]:
        outside = [self.outside[index] for index in sorted(self.outside)]
        numbers: Numbers = {"attention_outside": float(np.mean(outside))}
        arrays: Arrays = {"background": GRID}
        for name in SOURCES:
            rows = sorted(index for source, index in self.curves if source == name)
            if rows:
                arrays[name] = np.stack([self.curves[name, index] for index in rows]).mean(0)
                numbers[f"{name}_area"] = float(np.mean([self.areas[name, i] for i in rows]))
        return numbers, arrays

    @classmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        _: Tables,
        arms: Sequence[str] = (),
    ) -> list[Path]:
        drawn = _draw(measurements, line_styles([*arms, *groups(measurements)]), folder)
        page = write_page(
            folder / f"{cls.name}.md",
            "Foreground against background (IoF-IoB)",
            seen="The area under the curve is, for the encoder's features, "
            f"{extremes(measurements, 'encoder_area')}; for the decoder's cross-attention, "
            f"{extremes(measurements, 'decoder_area')}.",
            paper=PAPER,
            about=images_of(measurements),
            blocks=[
                number_table(
                    measurements,
                    {
                        "area, encoder": "encoder_area",
                        "area, decoder": "decoder_area",
                        "attention beyond the image": "attention_outside",
                    },
                ),
                image(drawn, "IoF against IoB"),
                "Each image's curve varies the threshold over all values of its map, from (0, 0), "
                "where nothing is above it, to (1, 1), where everything is; a thick line is the "
                "mean over images and seeds at equal background share, a thin one that of a seed. "
                "The area under it is the chance that a pixel of an object scores higher than one "
                "of the background: 0.5 knows nothing of objects, and below it they are darker "
                "than the rest. "
                "Attention is that of all one-to-one queries, heads and layers together.",
            ],
        )
        return [page, drawn]


def _draw(
    measurements: Sequence[Measurement], styles: Mapping[str, dict[str, Any]], folder: Path
) -> Path:
    path, found = folder / f"{IofIob.name}.png", groups(measurements)
    with picture(path, 1, len(SOURCES), size=(8.4, 4.8)) as (figure, panels):
        for axes, (name, title) in zip(panels[0], SOURCES.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
            for group, some in found.items():
                curves = [np.append(0, one.arrays[name]) for one in some if name in one.arrays]
                if curves:
                    style = styles[group] | {"marker": ""}  # a curve has 201 points
                    draw_mean(axes, np.append(0, GRID), curves, group, **style)
            axes.set(xlabel="IoB: background above the threshold", title=title)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        panels[0, 0].set_ylabel("IoF: foreground above the threshold")
        legend_below(figure, panels[0])
    return path
