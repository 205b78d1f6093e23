"""The Markdown page of an analysis."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Protocol, TypeVar

from codetr.analysis.frame import Measurement

EMPTY = "–"


def write_page(
    path: Path,
    title: str,
    *,
    seen: str,
    paper: str,
    about: str,
    blocks: Sequence[str],
) -> Path:
    """Write an analysis' page.

    Args:
        title: its heading.
        seen: what is seen here, in a sentence.
        paper: what the paper saw, in a sentence.
        about: on what it was seen.
        blocks: tables, pictures and paragraphs, in order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([f"# {title}", f"{seen} {paper}", about, *blocks]) + "\n")
    return path


def images_of(measurements: Sequence[Measurement]) -> str:
    """On what the detectors were looked at, and what a table's cell is, in sentences."""
    facts = measurements[0].facts
    images = f"{facts['images']} images with {facts['objects']} objects for each detector."
    return f"{images} {seeds_of(map(len, groups(measurements).values()))}".rstrip()


def seeds_of(counts: Iterable[int]) -> str:
    """What :func:`mean_and_range` shows of groups of so many, in a sentence; none for one each."""
    found = sorted({*counts})
    if found[-1] == 1:
        return ""
    number = f"{found[0]} to {found[-1]}" if len(found) > 1 else found[0]
    return f"Numbers are means over {number} seeds, with the least and the greatest behind them."


def first_of(measurements: Sequence[Measurement]) -> str:
    """The end of a sentence on a picture that shows one of each group; none where all are one."""
    some = groups(measurements)
    if len(some) == len(measurements):
        return ""
    seeds = sorted({str(of_one[0].facts.get("seed")) for of_one in some.values()})
    return f"; of several seeds one is shown, {' or '.join(seeds)}"


def heading(name: str) -> str:
    """A name over a small picture, in lines that are no wider."""
    return textwrap.fill(name, 18)


def mean_and_range(values: Sequence[float]) -> str | None:
    """``0.6120 (0.5980 to 0.6310)``: mean, least and greatest; one alone as it is; None of none."""
    if len(values) < 2:
        return _cell(values[0]) if values else None
    return f"{fmean(values):#.4g} ({min(values):#.4g} to {max(values):#.4g})"


def number_table(measurements: Sequence[Measurement], columns: Mapping[str, str]) -> str:
    """A row for each group.

    Args:
        columns: the number of each, by the column's title.
    """
    return table(
        ["detector", *columns],
        [
            [group, *(mean_and_range(values_of(some, name)) for name in columns.values())]
            for group, some in groups(measurements).items()
        ],
    )


def values_of(measurements: Sequence[Measurement], name: str) -> list[float]:
    """A number of each; of none of them where it is undefined in one."""
    found = [one.numbers[name] for one in measurements if name in one.numbers]
    return found if len(found) == len(measurements) else []


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell, a float has four significant digits."""
    lines = [[*head], ["---", *["---:"] * (len(head) - 1)], *[[*map(_cell, row)] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return EMPTY
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def image(path: Path, text: str) -> str:
    """A picture beside the page."""
    return f"![{text}]({path.name})"


class Grouped(Protocol):
    """What belongs to a group, as the seeds of an arm."""

    @property
    def group(self) -> str: ...


G = TypeVar("G", bound=Grouped)


def groups(some: Iterable[G]) -> dict[str, list[G]]:
    """Things by what they belong to together, in their order."""
    found: dict[str, list[G]] = {}
    for one in some:
        found.setdefault(one.group, []).append(one)
    return found


def extremes(measurements: Sequence[Measurement], name: str, form: str = ".3f") -> str:
    """As :func:`largest_and_smallest`, of a number in each group that has it."""
    found = {group: values_of(some, name) for group, some in groups(measurements).items()}
    return largest_and_smallest(found, form)


def largest_and_smallest(
    found: Mapping[str, Sequence[float]], form: str, of_each: str = "seeds"
) -> str:
    """``largest with K=1 (0.701), smallest with K=0 (0.612)``: of the means of several groups; how
    sure that order is, by whether the values of one lie among the other's.

    Args:
        of_each: what a group's values are of.
    """
    known = {group: values for group, values in found.items() if values}
    if len(known) < 2:
        return ", ".join(f"{fmean(v):{form}} with {g}" for g, v in known.items()) or "undefined"
    least, *_, most = sorted(known, key=lambda group: fmean(known[group]))
    if f"{fmean(known[least]):{form}}" == f"{fmean(known[most]):{form}}":
        return f"{fmean(known[most]):{form}} with each"
    text = ", ".join(
        f"{word} with {group} ({fmean(known[group]):{form}})"
        for word, group in (("largest", most), ("smallest", least))
    )
    overlap = min(known[most]) <= max(known[least])
    return f"{text}, whose {of_each} overlap" if overlap else text
