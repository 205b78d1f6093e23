"""What pages and pictures make of several seeds."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from codetr.analysis.frame import Measurement
from codetr.analysis.instability import Course, report_courses
from codetr.analysis.iof_iob import GRID, IofIob
from codetr.analysis.page import (
    extremes,
    first_of,
    largest_and_smallest,
    mean_and_range,
    number_table,
    seeds_of,
)
from codetr.analysis.stability import Instability
from codetr.plotting import COLOURS, dot_styles, draw_mean, legend_below, line_styles


def measured(group: str, seed: int, **numbers: float) -> Measurement:
    facts = {"seed": seed, "images": 4, "objects": 9}
    return Measurement("iof-iob", f"{group}, seed {seed}", group, facts, numbers, {})


THREE = [measured("K=0", 0, x=0.5), measured("K=0", 1, x=0.25), measured("K=1", 0, x=2.0, y=1.0)]


def test_numbers_of_several_seeds() -> None:
    assert mean_and_range([0.5, 0.25, 0.75]) == "0.5000 (0.2500 to 0.7500)"
    assert mean_and_range([0.5]) == "0.5"
    assert mean_and_range([]) is None
    text = number_table(THREE, {"the x": "x", "the y": "y"})
    assert text.splitlines()[0] == "| detector | the x | the y |"
    assert text.splitlines()[2:] == [
        "| K=0 | 0.3750 (0.2500 to 0.5000) | – |",
        "| K=1 | 2 | 1 |",
    ]
    assert extremes(THREE, "x") == "largest with K=1 (2.000), smallest with K=0 (0.375)"
    assert extremes(THREE[:1], "x") == "0.500 with K=0"
    assert extremes([THREE[0], replace(THREE[0], group="K=1")], "x") == "0.500 with each"
    overlapping = [*THREE[:2], measured("K=1", 0, x=0.5)]
    assert extremes(overlapping, "x").endswith("smallest with K=0 (0.375), whose seeds overlap")
    of_detectors = {"atss": [8.5, 9.5], "paa": [9.0, 10.0]}
    text = largest_and_smallest(of_detectors, ".1f", "detectors")
    assert text == "largest with paa (9.5), smallest with atss (9.0), whose detectors overlap"


def test_a_number_that_a_seed_lacks_has_no_mean() -> None:
    """It would be one of other seeds than the rest of the row."""
    lacking = [THREE[0], replace(THREE[1], numbers={}), THREE[2]]
    assert "| K=0 | – |" in number_table(lacking, {"the x": "x"})
    assert extremes(lacking, "x") == "2.000 with K=1"


def test_what_is_said_of_seeds() -> None:
    assert seeds_of([1, 1]) == ""
    assert "over 3 seeds," in seeds_of([3, 3])
    assert "over 1 to 3 seeds," in seeds_of([3, 1, 2])
    assert first_of(THREE) == "; of several seeds one is shown, 0"
    assert first_of([THREE[0], THREE[2]]) == ""


def test_lines_and_dots_are_told_apart_beyond_the_colours() -> None:
    names = [f"detector {n}" for n in range(2 * len(COLOURS) + 1)]
    for styles in (line_styles(names), dot_styles(names)):
        assert len({tuple(style.items()) for style in styles.values()}) == len(names)


def test_the_arms_of_every_shipped_ablation_have_colours_of_their_own() -> None:
    """Eight in ablation-heads, where dots and bars have nothing but these."""
    assert len({*COLOURS}) == 8


def test_a_line_below_another_shows_through_it() -> None:
    dashes = [style["linestyle"] for style in line_styles("abcd").values()]
    assert all(one != other for one, other in pairwise(dashes))


def test_the_mean_is_thick_and_every_seed_faint() -> None:
    axes = Figure().subplots()
    draw_mean(axes, [0, 1], [[0, 2], [2, 4]], "two", color="red")
    draw_mean(axes, [0, 1], [[5, 5]], "one", color="red")
    *faint, mean, alone = axes.lines
    assert [line.get_ydata().tolist() for line in faint] == [[0, 2], [2, 4]]
    assert mean.get_ydata().tolist() == [1, 3]
    assert all(line.get_alpha() < 1 < mean.get_linewidth() for line in faint)
    assert alone.get_ydata().tolist() == [5, 5]
    assert [mean.get_label(), alone.get_label()] == ["two", "one"]


def test_a_legend_has_each_name_once_and_is_none_without_names() -> None:
    figure = Figure()
    panels = figure.subplots(1, 2)
    legend_below(figure, panels)
    assert figure.legends == []
    for axes in panels:
        axes.plot([0], [0], label="a")
    legend_below(figure, panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_no_picture_complains_of_what_it_lacks(tmp_path) -> None:
    """Images without background have no curve: there is nothing to draw or to name."""
    empty = measured("K=0", 0, attention_outside=0.0)
    whole = replace(measured("K=1", 0), arrays={"encoder": GRID, "decoder": np.sqrt(GRID)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in ([empty], [empty, whole]):
            page, picture = IofIob.report(some, tmp_path, {})
            assert picture.exists()
            assert "| K=0 | – | – | 0 |" in page.read_text()


def test_an_arm_has_its_colour_also_where_another_is_lacking(tmp_path, monkeypatch) -> None:
    """K = 0 has no head, and is on no page of heads."""
    drawn = {}

    def note(axes, x, curves, label, **style) -> None:
        drawn.setdefault(label, set()).add(style["color"])

    monkeypatch.setattr("codetr.analysis.iof_iob.draw_mean", note)
    monkeypatch.setattr("codetr.analysis.instability.draw_mean", note)
    one = replace(measured("K=1", 0), arrays={"encoder": GRID, "decoder": GRID})
    IofIob.report([one], tmp_path, {}, ["K=0", "K=1"])
    course = Course("a", "K=1", {2: Instability(0.5, 1.0), 3: Instability(0.5, 1.0)})
    report_courses([course], "Seen.", tmp_path, ["K=0", "K=1"])
    assert drawn == {"K=1": {COLOURS[1]}}


def test_instability_of_seeds_side_by_side(tmp_path) -> None:
    """An epoch that a seed lacks is a mean of the others, and in the picture no mean."""

    def course(group: str, seed: int, **changed: float) -> Course:
        changes = {int(name[1:]): Instability(value, 2.0) for name, value in changed.items()}
        return Course(f"{group}, seed {seed}", group, changes)

    found = [course("K=0", 0, e2=0.5, e3=0.25), course("K=0", 1, e2=0.75), course("K=1", 0, e2=0.5)]
    text = report_courses(found, "Seen.", tmp_path)[0].read_text()
    assert "| epoch | K=0 | K=1 |" in text
    assert "| 2 | 0.6250 (0.5000 to 0.7500) | 0.5 |" in text
    assert "| 3 | 0.25 | – |" in text
    assert "Seen. Numbers are means over 1 to 2 seeds" in text


@pytest.mark.parametrize("group", ["K=0", "K=1"])
def test_courses_without_a_common_epoch(tmp_path, group: str) -> None:
    one = Course("a", "K=0", {2: Instability(0.5, 1.0)})
    other = Course("b", group, {3: Instability(0.5, 1.0)})
    assert report_courses([one, other], "Seen.", tmp_path)[1].exists()
