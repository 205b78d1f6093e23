"""The paper's argument on one page: AP, conflict and discriminability against K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from codetr.analysis import CATALOGUE
from codetr.plotting import COLOURS, legend_below, picture
from orchestrator.experiment import paper_tables
from orchestrator.plan import Plan
from orchestrator.results import TrialResult

if TYPE_CHECKING:
    from codetr.analysis.frame import Measurement

OVERVIEW, BY_K = "analysis.md", "by_k.png"


@dataclass(frozen=True, eq=False)
class Quantity:
    """What is shown against K.

    Attributes:
        title: of its panel and column.
        analysis, number: where it is found; AP comes from the trial itself.
        paper: the paper's: K, and the value; several of one K, where it has several arms of it.
    """

    title: str
    analysis: str | None = None
    number: str = ""
    paper: Sequence[tuple[int, float]] = ()


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
        files.append(draw_by_k(points, folder / BY_K))
        lines += [
            f"![{', '.join(quantity.title for quantity in points)} against K]({BY_K})",
            "",
            "A faint dot is a trial, a full one the mean of an arm over its seeds; the line joins "
            "the means of all arms with so many heads. Grey is the paper on COCO, on an axis of "
            "its own. The paper's argument: auxiliary heads make features more discriminative and "
            "AP higher; that AP falls again with six different heads it ascribes to conflicts of "
            "theirs (sections 3.4 and 4.4). With K = 1 the conflict is the head's distance from "
            "the query head, with more heads that among themselves.",
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

    by_arm = {t.arm: (t.detector.k, t.paper_ap) for t in plan.trials if t.paper_ap is not None}
    conflict = [*paper_conflict(paper_tables()).items()]
    return [
        Quantity("AP (%)", paper=[*by_arm.values()]),
        Quantity("conflict of heads (KL)", "conflicts", "conflict", conflict),
        Quantity("discriminability (IoF-IoB area, encoder)", "iof-iob", "encoder_area"),
        Quantity("IoF-IoB area, decoder", "iof-iob", "decoder_area"),
    ]


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


def draw_by_k(points: Mapping[Quantity, Sequence[Point]], path: Path) -> Path:
    """A panel for each quantity."""
    arms = dict.fromkeys(point.arm for some in points.values() for point in some)
    colours = dict(zip(arms, cycle(COLOURS), strict=False))
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    size = (4.2 * columns, 3 * rows + 0.5)
    with picture(path, rows, columns, size=size, font_size=9) as (figure, panels):
        for axes in panels.flat[len(points) :]:
            axes.axis("off")
        for axes, (quantity, some) in zip(panels.flat, points.items(), strict=False):
            means = {place: fmean(values) for place, values in _by_place(some).items()}
            ks = {k for _, k in means}
            _join([(k, value) for (_, k), value in means.items()], axes, color="0.4", linewidth=1)
            for (arm, k), values in _by_place(some).items():
                style = {"color": colours[arm], "linewidths": 0, "zorder": 3}
                if len(values) > 1:
                    axes.scatter([k] * len(values), values, s=22, alpha=0.35, **style)
                axes.scatter([k], [fmean(values)], s=38, **style)
            axes.set(xlabel="auxiliary heads, K", title=quantity.title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if paper := [(k, value) for k, value in quantity.paper if k in ks]:
                _draw_paper(axes, paper)
        if len(arms) > len({point.k for some in points.values() for point in some}):
            for arm in arms:
                panels[0, 0].scatter([], [], s=38, linewidths=0, color=colours[arm], label=arm)
            legend_below(figure, panels.flat)
    return path


def _join(places: Sequence[tuple[int, float]], axes: Any, **style: Any) -> None:
    """A line through the mean at each K."""
    ks = sorted({k for k, _ in places})
    axes.plot(ks, [fmean(v for at, v in places if at == k) for k in ks], **style)


def _draw_paper(axes: Any, paper: Sequence[tuple[int, float]]) -> None:
    other = axes.twinx()
    other.scatter(*zip(*paper, strict=True), s=18, marker="s", color="0.6", linewidths=0)
    _join(paper, other, color="0.6", linestyle=":")
    other.grid(visible=False)
    other.tick_params(colors="0.45", labelsize=8)
    other.set_ylabel("the paper, COCO", color="0.45", fontsize=8)
    other.margins(y=0.15)  # apart from ours: both would fill the panel
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)


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
