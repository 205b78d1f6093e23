"""The paper's argument on one page: AP, conflict and discriminability against K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from codetr.analysis import CATALOGUE
from codetr.plotting import dot_styles, legend_below, picture
from orchestrator.experiment import paper_tables
from orchestrator.plan import Plan
from orchestrator.results import TrialResult

if TYPE_CHECKING:
    from codetr.analysis.frame import Measurement

OVERVIEW, BY_K = "analysis.md", "by_k.png"

PAPER_DOT = {"marker": "s", "color": "0.6", "linewidths": 0}
PAPER_AXIS = "the paper, on the right axis"


@dataclass(frozen=True, eq=False)
class Quantity:
    """What is shown against K.

    Attributes:
        title: of its panel and column.
        analysis, number: where it is found; AP comes from the trial itself.
        paper: the paper's, by the arm that has the same heads.
        comparable: the least K whose values are of one kind with those of a larger; that of a
            smaller is shown, and no line leads to it.
    """

    title: str
    analysis: str | None = None
    number: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)
    comparable: int = 0


@dataclass(frozen=True)
class Point:
    """A trial in a panel."""

    arm: str
    k: int
    value: float


def write_overview(
    plan: Plan,
    results: Sequence[TrialResult],
    measurements: Sequence[Measurement],
    pages: Sequence[Path],
    failures: Sequence[str],
) -> list[Path]:
    """Write the page that leads to the others; returns it, and its picture if the arms differ in K.

    Args:
        measurements: of the finished trials.
        pages: of the single analyses, beside which it will lie.
        failures: what could not be found, a sentence each.
    """
    folder = plan.folder / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    points = {
        quantity: some
        for quantity in quantities(plan)
        if (some := points_of(quantity, results, measurements))
    }
    lines = [f"# {plan.name}: analyses", ""]
    files = []
    if len({trial.detector.k for trial in plan.trials}) > 1 and points:
        nested = chain(plan)
        files.append(draw_by_k(points, plan.arms, nested, folder / BY_K))
        lines += [
            f"![{', '.join(quantity.title for quantity in points)} against K]({BY_K})",
            "",
            "A faint mark is a trial, a full one the mean of an arm over its seeds"
            f"{_chain_sentence(nested)}. Grey is the paper on COCO, arms of the same heads, on an "
            "axis of its own. The paper's argument: auxiliary heads make features more "
            "discriminative and AP higher; that AP falls again with six different heads it "
            "ascribes to conflicts of theirs (sections 3.4 and 4.4). With K = 1 the conflict is "
            "the head's distance from the query head, a hollow mark and no part of the line; with "
            "more heads it is that among themselves.",
            "",
        ]
    lines += [*_table(plan, points), ""]
    lines += [f"- [{CATALOGUE[page.stem].question}]({page.name})" for page in pages]
    lines += [f"\n**Failed:** {failure}" for failure in failures]
    page = folder / OVERVIEW
    page.write_text("\n".join(lines) + "\n")
    return [page, *files]


def quantities(plan: Plan) -> list[Quantity]:
    """AP, conflict, discriminability."""
    from codetr.analysis.conflicts import paper_conflict

    theirs = paper_conflict(paper_tables())
    conflict = {
        trial.arm: theirs[heads]
        for trial in plan.trials
        if (heads := frozenset(trial.detector.head_names)) in theirs
    }
    ap = {trial.arm: trial.paper_ap for trial in plan.trials if trial.paper_ap is not None}
    return [
        Quantity("AP (%)", paper=ap),
        Quantity("conflict of heads (KL)", "conflicts", "conflict", conflict, comparable=2),
        Quantity("discriminability (IoF-IoB area, encoder)", "iof-iob", "encoder_area"),
        Quantity("IoF-IoB area, decoder", "iof-iob", "decoder_area"),
    ]


def chain(plan: Plan) -> list[str]:
    """The arms that lead to the one with most heads, each with the heads of the one before it and
    further ones, and else the same; empty where several have most heads."""
    arms = {trial.arm: trial for trial in plan.trials}
    heads = {arm: trial.detector.heads for arm, trial in arms.items()}
    last, *others = sorted(arms, key=lambda arm: -len(heads[arm]))
    if others and len(heads[others[0]]) == len(heads[last]):
        return []
    rest = {
        arm: (t.detector.model_copy(update={"heads": ()}), t.training) for arm, t in arms.items()
    }
    nested = [
        arm
        for arm in arms
        if heads[arm] == heads[last][: len(heads[arm])] and rest[arm] == rest[last]
    ]
    return sorted(nested, key=lambda arm: len(heads[arm]))


def _chain_sentence(nested: Sequence[str]) -> str:
    if not nested:
        return ""
    return f"; the line joins arms each of which adds heads to the one before: {', '.join(nested)}"


def points_of(
    quantity: Quantity, results: Sequence[TrialResult], measurements: Sequence[Measurement]
) -> list[Point]:
    """Of every trial in which the quantity is known."""
    if quantity.analysis is None:
        return [
            Point(r.trial.arm, r.trial.detector.k, ap)
            for r in results
            if (ap := r.metric("AP")) is not None
        ]
    return [
        Point(m.group, m.facts["k"], m.numbers[quantity.number])
        for m in measurements
        if m.analysis == quantity.analysis and quantity.number in m.numbers
    ]


def draw_by_k(
    points: Mapping[Quantity, Sequence[Point]],
    arms: Sequence[str],
    nested: Sequence[str],
    path: Path,
) -> Path:
    """A panel for each quantity.

    Args:
        points: in each.
        arms: all that are compared, in order: an arm's place decides its colour.
        nested: those that a line joins.
    """
    styles = dot_styles(arms)
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    size = (4.4 * columns, 3 * rows + 1)
    with picture(path, rows, columns, size=size, font_size=9) as (figure, panels):
        for axes in panels.flat[len(points) :]:
            axes.axis("off")
        for axes, (quantity, some) in zip(panels.flat, points.items(), strict=False):
            _draw_points(axes, quantity, some, styles)
            ours = {arm: (k, fmean(values)) for (arm, k), values in _by_place(some).items()}
            _join(axes, quantity, ours, nested, color="0.4", linewidth=1)
            paper = {arm: (ours[arm][0], v) for arm, v in quantity.paper.items() if arm in ours}
            if paper:
                _draw_paper(axes, quantity, paper, nested)
            axes.set(xlabel="auxiliary heads, K", title=quantity.title)
            axes.xaxis.get_major_locator().set_params(integer=True)
        _name_marks(panels[0, 0], points, styles, nested)
        legend_below(figure, panels.flat)
    return path


def _draw_points(
    axes: Any, quantity: Quantity, some: Sequence[Point], styles: Mapping[str, dict[str, Any]]
) -> None:
    """Each trial, and the mean of each arm; hollow where it is of another kind than the rest."""
    for (arm, k), values in _by_place(some).items():
        style = styles[arm] | {"linewidths": 0, "zorder": 3}
        if k < quantity.comparable:
            style |= {"facecolors": "none", "linewidths": 1.2}
        if len(values) > 1:
            axes.scatter([k] * len(values), values, s=22, alpha=0.4, **style)
        axes.scatter([k], [fmean(values)], s=42, **style)


def _join(
    axes: Any,
    quantity: Quantity,
    places: Mapping[str, tuple[int, float]],
    nested: Sequence[str],
    **style: Any,
) -> None:
    """A line through the nested arms whose values can be compared."""
    row = [places[arm] for arm in nested if arm in places]
    row = [(k, value) for k, value in row if k >= quantity.comparable]
    if len(row) > 1:
        axes.plot(*zip(*row, strict=True), **style)


def _draw_paper(
    axes: Any, quantity: Quantity, paper: Mapping[str, tuple[int, float]], nested: Sequence[str]
) -> None:
    other = axes.twinx()
    other.scatter(*zip(*paper.values(), strict=True), s=20, **PAPER_DOT)
    _join(other, quantity, paper, nested, color="0.6", linestyle=":")
    other.grid(visible=False)
    other.tick_params(colors="0.45", labelsize=8)
    other.set_ylabel("the paper, COCO", color="0.45", fontsize=8)
    other.margins(y=0.15)  # apart from ours: both would fill the panel
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)


def _name_marks(
    axes: Any,
    points: Mapping[Quantity, Sequence[Point]],
    styles: Mapping[str, dict[str, Any]],
    nested: Sequence[str],
) -> None:
    """Everything that the panels show, for the legend."""
    drawn = {point.arm for some in points.values() for point in some}
    for arm, style in styles.items():
        if arm in drawn:
            axes.scatter([], [], s=42, linewidths=0, label=arm, **style)
    places = [values for some in points.values() for values in _by_place(some).values()]
    if any(len(values) > 1 for values in places):
        axes.scatter([], [], s=22, color="0.2", alpha=0.4, linewidths=0, label="faint: one seed")
    if any(point.k < quantity.comparable for quantity, some in points.items() for point in some):
        style = {"facecolors": "none", "edgecolors": "0.2", "linewidths": 1.2}
        axes.scatter([], [], s=42, label="from the query head", **style)
    if nested:
        axes.plot([], [], color="0.4", linewidth=1, label="each adds to the one before")
    if any(quantity.paper.keys() & drawn for quantity in points):
        axes.plot([], [], color="0.6", linestyle=":", marker="s", markersize=4, label=PAPER_AXIS)


def _by_place(points: Sequence[Point]) -> dict[tuple[str, int], list[float]]:
    """The values of each arm, at its K."""
    found: dict[tuple[str, int], list[float]] = {}
    for point in points:
        found.setdefault((point.arm, point.k), []).append(point.value)
    return found


def _table(plan: Plan, points: Mapping[Quantity, Sequence[Point]]) -> list[str]:
    """The mean of each arm over its seeds, with the least and the greatest."""
    from codetr.analysis.page import mean_and_range, seeds_of, table

    places = [_by_place(some) for some in points.values()]
    ks = {trial.arm: trial.detector.k for trial in plan.trials}
    rows = [
        [arm, k, *(mean_and_range(of.get((arm, k), [])) for of in places)] for arm, k in ks.items()
    ]
    counts = [len(values) for of in places for values in of.values()]
    head = ["arm", "K", *(quantity.title for quantity in points)]
    return [table(head, rows), "", *([seeds_of(counts)] if counts else [])]
