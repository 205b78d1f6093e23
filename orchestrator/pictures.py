"""The pictures of an experiment: curves, the comparison with the paper, detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from codetr.plotting import COLOURS, STYLE, dot_styles, legend_below, line_styles, save
from orchestrator.board import Epoch
from orchestrator.files import read_json
from orchestrator.plan import Plan
from orchestrator.results import ArmSummary, TrialResult, reference, summarise
from orchestrator.worker import PREDICTIONS

mpl.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from codetr.data import CocoDataset
    from codetr.structures import Detections


def draw_all(plan: Plan, results: list[TrialResult]) -> list[Path]:
    """Every picture of what was measured, if anything was; returns their paths."""
    if not any(result.evaluated for result in results):
        return []
    return [
        draw_ap_by_epoch(results, plan.folder / "ap_by_epoch.png"),
        draw_ap_by_arm(results, plan.folder / "ap_by_arm.png"),
    ]


def draw_ap_by_epoch(results: list[TrialResult], path: Path) -> Path:
    """AP against epoch: every seed a thin line, each arm's mean a thick one."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        # Every arm keeps its own, whichever of them have been evaluated.
        styles = line_styles(result.trial.arm for result in results)
        for arm, trials in _by_arm(results).items():
            style = styles[arm]
            curves = [{e.epoch: 100 * e.values["val/AP"] for e in t.evaluated} for t in trials]
            for curve in curves if len(curves) > 1 else []:
                faint = style | {"marker": "", "linewidth": 0.8, "alpha": 0.5}
                axes.plot([*curve], [*curve.values()], **faint)
            # The mean only where every seed was evaluated, or it would jump.
            common = sorted(set.intersection(*map(set, curves)))
            means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in common]
            axes.plot(common, means, **style, linewidth=2.2, label=arm)
        axes.set(xlabel="epoch", ylabel="AP (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("AP on the validation images", loc="left")
        legend_below(figure, [axes], columns=2)
        return save(figure, path)


def draw_ap_by_arm(results: list[TrialResult], path: Path) -> Path:
    """Final AP of each arm, every seed a dot, beside the paper's table."""
    summaries = summarise(results)
    panels = 1 + any(summary.paper_ap is not None for summary in summaries)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, panels, figsize=(1.6 + 3.8 * panels, 1.2 + 0.42 * len(summaries)),
            layout="constrained", squeeze=False, sharey=True,
        )  # fmt: skip
        measured = [_Row(s.arm, s.aps, s.ap, s.gain) for s in summaries]
        _draw_rows(axes[0][0], "measured here", measured)
        if panels == 2:
            paper = [_paper_row(s) for s in summaries]
            _draw_rows(axes[0][1], "the paper, COCO val2017", paper)
        axes[0][0].set_xlabel(f"AP (%) after the last epoch; gain over {reference(results)}")
        axes[0][0].invert_yaxis()  # the first arm on top
        return save(figure, path)


@dataclass(frozen=True)
class _Row:
    """One arm in a panel: its dots, their mean, and its gain over the reference."""

    arm: str
    dots: Sequence[float]
    mean: float | None
    gain: float | None


def _paper_row(summary: ArmSummary) -> _Row:
    dots = [] if summary.paper_ap is None else [summary.paper_ap]
    return _Row(summary.arm, dots, summary.paper_ap, summary.paper_gain)


def _draw_rows(axes: Axes, title: str, rows: list[_Row]) -> None:
    styles = dot_styles(row.arm for row in rows)
    for y, row in enumerate(rows):
        style = styles[row.arm]
        axes.scatter(row.dots, [y] * len(row.dots), s=36, zorder=3, **style)
        if row.mean is None:
            continue
        axes.vlines(row.mean, y - 0.3, y + 0.3, color=style["color"], linewidth=2)
        gain = "" if row.gain is None else f"  {row.gain:+.1f}"
        axes.annotate(
            f"{row.mean:.1f}{gain}",
            (1, y),
            xycoords=axes.get_yaxis_transform(),  # beside the panel, where no dot is
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    dots = [dot for row in rows for dot in row.dots]
    if dots:
        margin = max(0.1 * (max(dots) - min(dots)), 0.3)
        axes.set_xlim(max(0, min(dots) - margin), max(dots) + margin)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_title(title, loc="left")


def draw_curves(result: TrialResult, path: Path) -> Path:
    """One trial: loss and AP against epoch."""
    history = result.history
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        left.plot(*_points(history, "train/total", 1), color=COLOURS[1], marker="o")
        left.set(xlabel="epoch", ylabel="total loss (equation 6)")
        for colour, name in zip(COLOURS, ("AP", "AP50", "AP75"), strict=False):
            points = _points(history, f"val/{name}", 100)
            right.plot(*points, color=colour, marker="o", label=name)
        right.set(xlabel="epoch", ylabel="AP (%)")
        right.set_ylim(bottom=0)
        right.legend()
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(f"{result.trial.arm}, seed {result.trial.seed}")
        return save(figure, path)


def _points(history: list[Epoch], name: str, scale: float) -> tuple[list[int], list[float]]:
    rows = [(e.epoch, scale * e.values[name]) for e in history if name in e.values]
    return [epoch for epoch, _ in rows], [value for _, value in rows]


# -------------------------------------------------------------------------------------- detections


def draw_detections(plan: Plan, results: list[TrialResult], images: int = 4) -> list[Path]:
    """Validation images, row by row: the ground truth, then what each arm's first seed found.

    Returns no path where this machine does not have the predictions, or not the images.

    Raises:
        ConfigError: predictions are damaged.
    """
    from codetr.data import DataError, open_dataset

    firsts = [trials[0] for trials in _by_arm(results).values()]
    shown = [t for t in firsts if t.best is not None and (t.best / PREDICTIONS).exists()]
    if not shown:
        return []
    try:
        dataset = open_dataset(shown[0].trial.data, "val")
    except DataError:  # the data is on the cluster alone
        return []
    dataset.transform = None
    chosen = _interesting(dataset, images)
    found = [_read_predictions(t.best / PREDICTIONS, dataset) for t in shown if t.best]
    with plt.rc_context({**STYLE, "axes.grid": False, "font.size": 9}):
        figure, panels = plt.subplots(
            len(chosen),
            1 + len(shown),
            figsize=(2.6 * (1 + len(shown)), 2.6 * len(chosen) + 0.3),
            layout="constrained",
            squeeze=False,
        )
        for row, index in zip(panels, chosen, strict=True):
            _draw_row(row, dataset, index, found)
        for axes, title in zip(
            panels[0], ["ground truth", *(t.trial.arm for t in shown)], strict=True
        ):
            axes.set_title(title)
        return [save(figure, plan.folder / "detections.png")]


def _draw_row(
    row: Sequence[Any], dataset: CocoDataset, index: int, found: list[dict[int, Detections]]
) -> None:
    from codetr.inference import draw

    image, targets = dataset[index]
    objects: list[Any] = [targets, *(detections[targets.image_id] for detections in found)]
    for axes, boxes in zip(row, objects, strict=True):
        axes.imshow(draw(image, boxes, dataset.classes, side=300))
        axes.axis("off")


def _interesting(dataset: CocoDataset, images: int) -> list[int]:
    """Images spread evenly over those with at least two objects, or over all."""
    counts = dataset.table.starts[1:] - dataset.table.starts[:-1]
    crowded = [i for i, count in enumerate(counts) if count >= 2] or [*range(len(dataset))]
    count = min(images, len(crowded))
    return [crowded[i * len(crowded) // count] for i in range(count)]


def _read_predictions(path: Path, dataset: CocoDataset) -> dict[int, Detections]:
    """COCO results as detections by image id; images without any have an empty entry."""
    import torch

    from codetr.structures import Detections

    number = {category: i for i, category in enumerate(dataset.classes.category_ids)}
    rows: dict[int, list[list[float]]] = {int(i): [] for i in dataset.table.image_ids}
    for found in read_json(path, "no picture of detections is drawn"):
        x, y, width, height = found["bbox"]
        rows[found["image_id"]].append(
            [x, y, x + width, y + height, found["score"], number[found["category_id"]]]
        )
    tensors = {image: torch.tensor(r).reshape(-1, 6) for image, r in rows.items()}
    return {
        image: Detections(boxes=t[:, :4], scores=t[:, 4], labels=t[:, 5].long())
        for image, t in tensors.items()
    }


# ------------------------------------------------------------------------------------------ shared


def _by_arm(results: list[TrialResult]) -> dict[str, list[TrialResult]]:
    """The evaluated trials of each arm."""
    arms: dict[str, list[TrialResult]] = {}
    for result in results:
        if result.evaluated:
            arms.setdefault(result.trial.arm, []).append(result)
    return arms
