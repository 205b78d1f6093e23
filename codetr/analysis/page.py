"""The Markdown page of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from codetr.analysis.frame import Measurement, Numbers
from codetr.plotting import COLOURS

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
    """On what the detectors were looked at, in a sentence."""
    facts = measurements[0].facts
    return f"{facts['images']} images with {facts['objects']} objects for each detector."


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


def groups(measurements: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements by what they belong to together, as the seeds of an arm, in their order."""
    found: dict[str, list[Measurement]] = {}
    for one in measurements:
        found.setdefault(one.group, []).append(one)
    return found


def group_colours(measurements: Sequence[Measurement]) -> dict[str, str]:
    """A colour for each group."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups(measurements))}


def means(measurements: Sequence[Measurement]) -> Numbers:
    """Mean of each number that all of them have."""
    common = [
        name for name in measurements[0].numbers if all(name in m.numbers for m in measurements)
    ]
    return {name: fmean(m.numbers[name] for m in measurements) for name in common}


def ranking(measurements: Sequence[Measurement], name: str, form: str = ".3f") -> str:
    """``0.612 (K=0), 0.701 (K=1)``: a number's mean in each group that has it."""
    found = {group: means(some) for group, some in groups(measurements).items()}
    known = {group: numbers[name] for group, numbers in found.items() if name in numbers}
    return ", ".join(f"{value:{form}} ({group})" for group, value in known.items()) or "undefined"
