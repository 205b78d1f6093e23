"""The paper's argument on one page: AP, conflict and discriminability against K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from codetr.analysis import CATALOGUE
from codetr.plotting import COLOURS, picture
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
        paper: the paper's, by K.
    """

    title: str
    analysis: str | None = None
    number: str = ""
    paper: Mapping[int, float] | None = None


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
            "Every dot is a trial, lines join the means; grey is the paper on COCO, on an axis of "
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

    paper_ap = {t.detector.k: t.paper_ap for t in plan.trials if t.paper_ap is not None}
    return [
        Quantity("AP (%)", paper=paper_ap),
        Quantity("conflict of heads (KL)", "conflicts", "conflict", paper_conflict(paper_tables())),
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
    with picture(path, 1, len(points), size=(3.7 * len(points), 3.5), font_size=9) as (
        figure,
        panels,
    ):
        for axes, (quantity, some) in zip(panels[0], points.items(), strict=True):
            means = _means(some)
            of_k = {k: fmean(v for (_, at), v in means.items() if at == k) for _, k in means}
            axes.plot(sorted(of_k), [of_k[k] for k in sorted(of_k)], color="0.4", linewidth=1)
            for arm, k in means:
                values = [point.value for point in some if (point.arm, point.k) == (arm, k)]
                axes.scatter([k] * len(values), values, s=26, color=colours[arm], zorder=3)
            axes.set(xlabel="auxiliary heads, K", title=quantity.title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            paper = {k: v for k, v in (quantity.paper or {}).items() if k in of_k}
            if paper:
                _draw_paper(axes, paper)
        if len(arms) > len({point.k for some in points.values() for point in some}):
            marks = [axes.scatter([], [], s=26, color=colours[arm], label=arm) for arm in arms]
            figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8)
    return path


def _draw_paper(axes: Any, paper: Mapping[int, float]) -> None:
    other = axes.twinx()
    other.plot(
        sorted(paper), [paper[k] for k in sorted(paper)],
        color="0.65", linestyle=":", marker="s", markersize=4,
    )  # fmt: skip
    other.grid(visible=False)
    other.tick_params(colors="0.55", labelsize=7)


def _means(points: Sequence[Point]) -> dict[tuple[str, int], float]:
    places = dict.fromkeys((point.arm, point.k) for point in points)
    return {
        place: fmean(point.value for point in points if (point.arm, point.k) == place)
        for place in places
    }


def _table(plan: Plan, points: Mapping[Quantity, Sequence[Point]]) -> list[str]:
    """The mean of each arm over its seeds."""
    from codetr.analysis.page import table

    means = [{arm: value for (arm, _), value in _means(some).items()} for some in points.values()]
    ks = {trial.arm: trial.detector.k for trial in plan.trials}
    rows = [[arm, k, *(of.get(arm) for of in means)] for arm, k in ks.items()]
    return [table(["arm", "K", *(quantity.title for quantity in points)], rows)]
