"""How our pictures look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255"
)  # fmt: skip
"""Okabe and Ito's, which colour-blind readers can tell apart, without yellow, unseen on white; and
Tol's wine."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
MARKERS = ("o", "s", "^", "D", "v")

STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **style: Any
) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its (rows, columns) axes, written to ``path`` when all is drawn.

    Args:
        path: of the PNG.
        rows, columns: panels.
        size: of the whole in inches.
        style: what is to differ from ``STYLE``, with underscores for points.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which keeps what it draws, and a screen

    changed = {key.replace("_", ".", 1): value for key, value in style.items()}
    with rc_context({**STYLE, **changed}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How to draw each: colour, dashes and marker change from one to the next, so that a line shows
    through the one that lies upon it; no two of 120 are the same, as there are 8, 3 and 5 of them.
    """
    styles = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    return {
        name: {"color": colour, "linestyle": dashes, "marker": marker}
        for name, (colour, dashes, marker) in zip(dict.fromkeys(names), styles, strict=False)
    }


def dot_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """:func:`line_styles` for dots: colour and marker."""
    return {
        name: {"color": style["color"], "marker": style["marker"]}
        for name, style in line_styles(names).items()
    }


def draw_mean(
    axes: Any, x: ArrayLike, curves: Sequence[ArrayLike], label: str, **style: Any
) -> None:
    """The mean of curves over the same ``x``, and each of several as a faint thin line."""
    import numpy as np

    for curve in curves if len(curves) > 1 else ():
        axes.plot(x, curve, **(style | {"linewidth": 0.8, "alpha": 0.35, "marker": ""}))
    axes.plot(x, np.mean(np.asarray(curves), axis=0), label=label, **({"linewidth": 1.8} | style))


def draw_heat(
    axes: Any, image: ArrayLike, map_: ArrayLike, least: float = 0, most: float | None = None
) -> None:
    """A map (h, w) on its image (H, W, 3), which is seen through it, without its colours.

    Args:
        least, most: the ends of the map's colours; its own maximum where there is none.
    """
    import numpy as np

    grey = np.asarray(image).mean(-1)
    height, width = grey.shape
    extent = (0, width, height, 0)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.imshow(map_, cmap="inferno", vmin=least, vmax=most, alpha=0.6, extent=extent)


def legend_below(figure: Any, panels: Iterable[Any], columns: int = 3) -> None:
    """One legend for all panels, of each name once; none where nothing has a name."""
    named = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside lower center",
            ncols=min(columns, len(named)), fontsize=9,
        )  # fmt: skip


def save(figure: Any, path: Path) -> Path:
    """Write a figure of pyplot's, and forget it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
