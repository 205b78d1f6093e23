"""The pictures of a sweep: parallel coordinates, importance, AP against cost."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from codetr.plotting import COLOURS, STYLE, save
from orchestrator.space import Dimension
from orchestrator.sweep import Sweep
from orchestrator.sweep_report import ABSENT, Row, importance, pareto_front, real_choices

mpl.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_all(sweep: Sweep, rows: list[Row]) -> list[Path]:
    """Every picture for which there is something to show; returns their paths."""
    rows = [row for row in rows if row.metric is not None and row.is_first]
    folder = sweep.folder
    files = [draw_parallel_coordinates(sweep, rows, folder / "parallel_coordinates.png")]
    shares = importance(sweep, rows)
    if any(shares.values()):
        files.append(draw_importance(sweep, shares, folder / "importance.png"))
    if any(row.finished for row in rows):
        files.append(draw_front(sweep, rows, folder / "front.png"))
    return files


# ---------------------------------------------------------------------------- parallel coordinates


def draw_parallel_coordinates(sweep: Sweep, rows: list[Row], path: Path) -> Path:
    """One line for each trial through its value of each dimension, coloured by the metric; dashed
    if it was stopped early. Where a dimension was not there the line passes below its axis."""
    dimensions = real_choices(sweep)
    metric = sweep.search.metric
    values = [row.metric or 0.0 for row in rows]
    low, high = min(values), max(values)
    norm = mpl.colors.Normalize(low, high if high > low else low + 1)
    colours = mpl.colormaps["viridis_r"]
    count = len(dimensions) + 1
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(1.9 * count + 1, 4.2), layout="constrained")
        for row in sorted(rows, key=lambda row: row.metric or 0.0):  # the best on top
            heights = [_height(d, row) for d in dimensions] + [float(norm(row.metric or 0.0))]
            xs, ys = _smooth(heights)
            line = "-" if row.finished else (0, (3, 2))
            colour = colours(norm(row.metric or 0.0))
            width = 2.6 if row.rank == 1 else 1.3
            axes.plot(xs, ys, color=colour, linewidth=width, linestyle=line, alpha=0.9)
        for x, dimension in enumerate(dimensions):
            _draw_axis(axes, x, dimension.name, _ticks(dimension))
            if dimension.when:
                axes.text(x, _NOT_THERE - 0.07, "not there", ha="center", fontsize=8, color="0.4")
        ticks = [(norm(v), f"{v:.1f}") for v in (low, (low + high) / 2, high)]
        _draw_axis(axes, len(dimensions), f"{metric} (%)", ticks if high > low else ticks[:1])
        axes.set_axis_off()
        axes.set_xlim(-0.35, count - 0.55)
        axes.set_ylim(-0.3, 1.14)
        return save(figure, path)


_NOT_THERE = -0.17


def _height(dimension: Dimension, row: Row) -> float:
    if dimension.name not in row.entry.latest:
        return _NOT_THERE
    value = row.entry.latest[dimension.name]
    if dimension.low is None or dimension.high is None:
        choices = dimension.choices
        return choices.index(value) / (len(choices) - 1) if len(choices) > 1 else 0.5
    return _on_scale(dimension, float(value or 0))


def _on_scale(dimension: Dimension, value: float) -> float:
    assert dimension.low is not None
    assert dimension.high is not None
    scale = math.log if dimension.log else float
    low, high = scale(dimension.low), scale(dimension.high)
    return (scale(value) - low) / (high - low)


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.low is None or dimension.high is None:
        choices = dimension.choices
        last = len(choices) - 1
        heights = [i / last for i in range(len(choices))] if last else [0.5]
        return [(h, str(choice)) for h, choice in zip(heights, choices, strict=True)]
    middle = (dimension.low + dimension.high) / 2
    if dimension.log:
        middle = math.sqrt(dimension.low * dimension.high)
    values = (dimension.low, middle, dimension.high)
    return [(_on_scale(dimension, value), f"{value:.3g}") for value in values]


def _smooth(heights: list[float], steps: int = 24) -> tuple[list[float], list[float]]:
    """The line in cosine waves, so that lines through one point can be told apart beside it."""
    xs, ys = [], []
    for x, (here, there) in enumerate(pairwise(heights)):
        for step in range(steps + 1):
            part = step / steps
            xs.append(x + part)
            ys.append(here + (there - here) * (1 - math.cos(math.pi * part)) / 2)
    return xs, ys


def _draw_axis(axes: Axes, x: int, name: str, ticks: list[tuple[float, str]]) -> None:
    axes.plot([x, x], [0, 1], color="black", linewidth=1)
    axes.text(x, 1.09, name, ha="center", weight="bold")
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for height, text in ticks:
        axes.plot([x - 0.02, x + 0.02], [height, height], color="black", linewidth=1)
        axes.text(x + 0.04, height, text.strip("[]") or ABSENT, va="center", fontsize=8, bbox=box)


# --------------------------------------------------------------------------- importance, the front


def draw_importance(sweep: Sweep, shares: dict[str, float], path: Path) -> Path:
    """Share of the metric's variance that each dimension explains alone."""
    ordered = sorted(shares.items(), key=lambda item: item[1])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 1.2 + 0.42 * len(ordered)), layout="constrained")
        bars = axes.barh(
            [name for name, _ in ordered], [100 * s for _, s in ordered], color=COLOURS[0]
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_xlim(0, 108)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"share of the variance of {sweep.search.metric} explained alone (%)")
        return save(figure, path)


def draw_front(sweep: Sweep, rows: list[Row], path: Path) -> Path:
    """The metric against what training has cost; the best for its cost are joined."""
    front = pareto_front(rows)
    unit = front[0].cost_unit.replace("_", "-")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        finished = [row for row in rows if row.finished and row.cost is not None]
        stopped = [row for row in rows if not row.finished and row.cost is not None]
        for group, colour, face, label in (
            (stopped, "0.55", "none", "stopped early"),
            (finished, COLOURS[0], COLOURS[0], "finished"),
        ):
            if group:
                axes.scatter(
                    [row.cost or 0 for row in group],
                    [row.metric or 0 for row in group],
                    s=34,
                    edgecolors=colour,
                    facecolors=face,
                    label=label,
                    zorder=2,
                )
        axes.plot(
            [row.cost or 0 for row in front],
            [row.metric or 0 for row in front],
            color=COLOURS[1],
            drawstyle="steps-post",
            marker="o",
            markersize=7,
            label="best for its cost",
            zorder=3,
        )
        for row in front:
            axes.annotate(
                f"#{row.entry.number}",
                (row.cost or 0, row.metric or 0),
                xytext=(5, -12),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set(xlabel=f"{unit} of training and evaluations", ylabel=f"{sweep.search.metric} (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
        return save(figure, path)
