"""How far apart the heads look (equations 9-12, figures 6, 8 and 9)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from codetr.analysis.frame import (
    Analysis,
    Arrays,
    Measurement,
    Numbers,
    Seen,
    Tables,
    shown,
    shrunk,
)
from codetr.analysis.grad_cam import branch_scores, grad_cams
from codetr.analysis.maps import as_fraction
from codetr.analysis.page import (
    extremes,
    groups,
    image,
    images_of,
    mean_and_range,
    table,
    values_of,
    write_page,
)
from codetr.plotting import draw_heat, picture
from codetr.queries.selection import QUERY

FIGURES = {3: "figure8_conflict_k2", 7: "figure9_conflict_k6"}
"""The paper's matrices, by their size."""

PAPER = (
    "The paper (section 4.4, figure 6) saw an insignificant distance for K = 1, a slightly larger "
    "one for K = 2 and a surge from K = 3 to 6, to which it ascribes that six different heads help "
    "less than two"
)


def as_distribution(map_: Tensor) -> Tensor:
    """C of equation 9: a Grad-CAM (H, W) scaled to [0, 1], and its softmax over the pixels.

    The paper does not say how it makes a distribution of a map. This way every pixel has some
    weight, so that the divergence is finite without a constant to choose; and it is small, as the
    paper's.
    """
    return as_fraction(map_.double()).flatten().softmax(0).view_as(map_)


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first || second) in nats of two positive maps (H, W) that sum to one (equation 9)."""
    return float((first * (first / second).log()).sum())


def distances(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) average distance of each of n heads from the others, in both directions (equation 12).

    Args:
        matrix: (n, n) divergence of the row's head from the column's; NaN where a pair is
            undefined, which then does not count.
    """
    both = (matrix + matrix.T) / 2
    np.fill_diagonal(both, np.nan)
    return mean_of_finite(both, axis=1)


def mean_of_finite(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The mean of what is no NaN; NaN where nothing else is."""
    counts = np.isfinite(values).sum(axis)
    sums = np.nansum(values, axis=axis)
    return np.divide(sums, counts, out=np.full(np.shape(counts), np.nan), where=counts > 0)


def head_distances(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) of each auxiliary head from the other auxiliary heads; a single one from the query head.

    Args:
        matrix: (K + 1, K + 1), the query head first.
    """
    heads = matrix if len(matrix) == 2 else matrix[1:, 1:]
    return distances(heads)[-(len(matrix) - 1) :]


class Conflicts(Analysis):
    """Numbers: ``kl/A/B``, the divergence of A's map from B's, mean over the images in which both
    have one; ``distance/HEAD`` (equation 12; with K = 1 from the query head); ``from_all/BRANCH``,
    the same among all branches, the query head included; ``conflict``, the mean of ``distance``;
    ``images_without_objects``; ``zero_maps/BRANCH``, in how many images a branch's map was zero.
    """

    name = "conflicts"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.branches = [QUERY, *self.model.config.head_names]
        self.matrices: dict[int, NDArray[np.float64]] = {}
        self.zero = dict.fromkeys(self.branches, 0)
        self.without_objects = 0
        self.pictures: Arrays = {}

    def update(self, seen: Seen) -> None:
        with torch.no_grad():
            memory = self.model.encode(seen.batch)
        branches = branch_scores(self.model, seen.batch.sizes)
        alone = self.images_alone(memory, seen.batch)
        maps = grad_cams(branches, memory, seen.targets, seen.sizes, alone=alone)
        for number, (index, targets) in enumerate(zip(seen.indices, seen.targets, strict=True)):
            if not len(targets):
                self.without_objects += 1
                continue
            of_image = {name: as_fraction(maps[name][number]) for name in self.branches}
            self._compare(index, of_image)
            if index in self.examples:
                self._keep(index, seen.pixels(number), of_image)

    def _compare(self, index: int, maps: dict[str, Tensor]) -> None:
        matrix = np.full((len(maps), len(maps)), np.nan)
        is_zero = [not map_.any() for map_ in maps.values()]
        for name, zero in zip(maps, is_zero, strict=True):
            self.zero[name] += zero
        shares = [as_distribution(map_) for map_ in maps.values()]
        for i, first in enumerate(shares):
            for j, second in enumerate(shares):
                if not (is_zero[i] or is_zero[j]):
                    matrix[i, j] = 0.0 if i == j else divergence(first, second)
        self.matrices[index] = matrix

    def _keep(self, index: int, pixels: Tensor, maps: dict[str, Tensor]) -> None:
        self.pictures[f"image/{index}"] = shown(pixels, self.subject.checkpoint.data)
        for name, map_ in maps.items():
            self.pictures[f"cam/{index}/{name}"] = shrunk(map_[None])[0].cpu().numpy()

    def finish(self) -> tuple[Numbers, Arrays]:
        by_image = np.stack([self.matrices[index] for index in sorted(self.matrices)])
        counts = np.isfinite(by_image).sum(0)
        matrix = mean_of_finite(by_image, axis=0)
        numbers: Numbers = {
            f"kl/{a}/{b}": matrix[i, j]
            for i, a in enumerate(self.branches)
            for j, b in enumerate(self.branches)
            if i != j
        }
        own = head_distances(matrix)
        for name, distance in zip(self.branches[1:], own, strict=True):
            numbers[f"distance/{name}"] = distance
        for name, distance in zip(self.branches, distances(matrix), strict=True):
            numbers[f"from_all/{name}"] = distance
        numbers["conflict"] = float(mean_of_finite(own, axis=0))
        numbers["images_without_objects"] = self.without_objects
        numbers |= {f"zero_maps/{name}": count for name, count in self.zero.items()}
        return numbers, {"matrix": matrix, "images": counts, **self.pictures}

    @classmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        paper: Tables,
        arms: Sequence[str] = (),  # noqa: ARG003
    ) -> list[Path]:
        matrices = mean_matrices(measurements, paper)
        drawn = [_draw_matrices(some, folder) for some in _by_size(matrices)]
        chosen = max(measurements, key=lambda one: len(one.facts["heads"]))
        names = next(one.names for one in matrices if one.title == chosen.group)
        maps = _draw_maps(chosen, names, folder)
        page = write_page(
            folder / f"{cls.name}.md",
            "Conflicts of heads",
            seen=_seen_sentence(measurements),
            paper=_paper_sentence(paper),
            about=images_of(measurements),
            blocks=[
                _distance_table(measurements, paper),
                *(image(path, "KL divergence of each ordered pair of heads") for path in drawn),
                *_correlations(matrices),
                image(maps, "Grad-CAM of each head"),
                _method(measurements),
            ],
        )
        return [page, *drawn, maps]


def paper_conflict(paper: Tables) -> dict[frozenset[str], float]:
    """The paper's average distance of the auxiliary heads, by these heads (figures 8 and 9)."""
    return {
        frozenset(one.names[1:]): float(head_distances(one.values).mean())
        for one in paper_matrices(paper)
    }


def _seen_sentence(measurements: Sequence[Measurement]) -> str:
    """The distance of a single head is another than that among heads: told apart from it."""
    parts = {
        "The auxiliary heads' average distance from each other is": lambda k: k > 1,
        "a single head's from the query head is": lambda k: k == 1,
    }
    found = []
    for text, belongs in parts.items():
        some = [one for one in measurements if belongs(len(one.facts["heads"]))]
        if some:
            found.append(f"{text} {extremes(some, 'conflict', '.4f')}")
    sentence = "; ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _paper_sentence(paper: Tables) -> str:
    averages = [f"{value:.4f} for K = {len(k)}" for k, value in paper_conflict(paper).items()]
    if not averages:
        return f"{PAPER}."
    return (
        f"{PAPER}; its matrices (figures 8 and 9, of different heads) average to "
        f"{' and '.join(averages)}."
    )


def _distance_table(measurements: Sequence[Measurement], paper: Tables) -> str:
    """Average distance of each auxiliary head, below it the paper's of the same heads."""
    numbers = [*dict.fromkeys(name for one in measurements for name in one.numbers)]
    heads = [*_named(dict.fromkeys(numbers, 0.0), "distance/")]
    columns = {head: f"distance/{head}" for head in heads}
    columns |= {"mean": "conflict", "query head, from all heads": f"from_all/{QUERY}"}
    rows: list[list[object]] = [
        [group, *(mean_and_range(values_of(some, name)) for name in columns.values())]
        for group, some in groups(measurements).items()
    ]
    ours = {frozenset([QUERY, *one.facts["heads"]]) for one in measurements}
    for theirs in paper_matrices(paper):
        if frozenset(theirs.names) in ours:
            own = head_distances(theirs.values)
            by_head = dict(zip(theirs.names[1:], own.tolist(), strict=True))
            ends = (float(own.mean()), float(distances(theirs.values)[0]))
            rows.append([theirs.title, *(by_head.get(head) for head in heads), *ends])
    return table(["detector", *columns], rows)


def _named(numbers: Numbers, prefix: str) -> Numbers:
    return {
        name.removeprefix(prefix): value
        for name, value in numbers.items()
        if name.startswith(prefix)
    }


def _method(measurements: Sequence[Measurement]) -> str:
    empty = max(one.numbers["images_without_objects"] for one in measurements)
    zero = [
        f"{name} {count:.0f} ({one.label})"
        for one in measurements
        for name, count in _named(one.numbers, "zero_maps/").items()
        if count
    ]
    return (
        "A head's map is the Grad-CAM, on the encoder's output, of the class scores that it gives "
        "to the classes present, summed over its predictions; scaled to [0, 1], then a softmax "
        "over the pixels. The paper does not say how it normalised: compare differences more than "
        "values; matrices of one size share their colours, and each is the mean over a detector's "
        "seeds. A row's distance in the table is equation 12: both directions, from the other "
        "auxiliary heads; a single head's is its distance from the query head.\n\n"
        f"Left out: {empty:.0f} images without objects, which have no class to explain; maps that "
        f"were zero everywhere, with their pairs: {', '.join(zero) or 'none'}."
    )


@dataclass(frozen=True)
class Matrix:
    """A matrix of divergences, of the row's branch from the column's.

    Attributes:
        title: whose it is.
        names: of the branches.
        values: (n, n).
        papers: whether it is one of the paper's.
    """

    title: str
    names: Sequence[str]
    values: NDArray[np.float64]
    papers: bool = False


def paper_matrices(paper: Tables) -> list[Matrix]:
    """Figures 8 and 9."""
    return [
        Matrix(
            f"the paper, K={size - 1}, COCO",
            [QUERY, *paper[figure]["order"][1:]],
            np.array(paper[figure]["matrix"]),
            papers=True,
        )
        for size, figure in FIGURES.items()
        if figure in paper
    ]


def mean_matrices(measurements: Sequence[Measurement], paper: Tables) -> list[Matrix]:
    """Every group's, mean over its seeds, and the paper's of the same heads; where the paper has
    these heads, in its order."""
    papers = {frozenset(one.names): one for one in paper_matrices(paper)}
    found: list[Matrix] = []
    for group, some in groups(measurements).items():
        names = [QUERY, *some[0].facts["heads"]]
        values = np.stack([one.arrays["matrix"] for one in some])
        beside = papers.get(frozenset(names))
        if beside is not None:
            places = [names.index(name) for name in beside.names]
            names, values = [*beside.names], values[:, places][:, :, places]
        found.append(Matrix(group, names, values.mean(0)))
    seen = {frozenset(one.names) for one in found}
    return found + [one for names, one in papers.items() if names in seen]


def _by_size(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Those of several heads: a single one's are two numbers, whose mean the table has."""
    sizes = sorted({len(one.names) for one in matrices} - {2})
    return [[one for one in matrices if len(one.names) == size] for size in sizes]


def _correlations(matrices: Sequence[Matrix]) -> list[str]:
    """How alike the paper ranks the pairs of heads, in a paragraph; nothing where it has none."""
    papers = {tuple(one.names): one.values for one in matrices if one.papers}
    found = []
    for one in matrices:
        theirs = papers.get(tuple(one.names))
        if theirs is not None and not one.papers:
            pairs = ~np.eye(len(theirs), dtype=bool) & np.isfinite(one.values)
            ours = one.values[pairs]
            if len({*ours}) > 1:  # else there is no order
                rank = float(spearmanr(ours, theirs[pairs]).statistic)
                found.append(f"{rank:+.2f} over {len(ours)} ordered pairs ({one.title})")
    if not found:
        return []
    return [
        "Spearman's rank correlation with the paper's matrix of the same heads, 1 where the pairs "
        f"are in the same order and 0 where the order says nothing: {', '.join(found)}."
    ]


def _draw_matrices(matrices: Sequence[Matrix], folder: Path) -> Path:
    """Matrices of one size beside each other, in the same colours."""
    count = len(matrices[0].names)
    path, side = folder / f"conflicts_k{count - 1}.png", 1.4 + 0.55 * count
    columns = max(1, min(len(matrices), int(11 / side)))
    rows = -(-len(matrices) // columns)
    size = (side * columns + 0.9, (side + 0.4) * rows)
    known = np.concatenate([one.values[np.isfinite(one.values)] for one in matrices])
    most = float(known.max(initial=0)) or 1
    with picture(path, rows, columns, size=size, axes_grid=False, font_size=9) as (figure, panels):
        for axes in panels.flat[len(matrices) :]:
            axes.axis("off")
        for axes, one in zip(panels.flat, matrices, strict=False):
            drawn = axes.imshow(one.values, cmap="viridis", vmin=0, vmax=most)
            for (row, column), value in np.ndenumerate(one.values):
                dark = not value > 0.6 * most
                axes.text(
                    column, row, "0" if row == column else f"{value:.4f}",
                    ha="center", va="center", fontsize=8, color="white" if dark else "black",
                )  # fmt: skip
            axes.set_xticks(
                range(count), one.names, rotation=45, ha="right", rotation_mode="anchor"
            )
            axes.set_yticks(range(count), one.names)
            axes.set_title(textwrap.fill(one.title, 8 + 6 * count), fontsize=9)
        figure.colorbar(drawn, ax=panels, label="KL(row ‖ column)", shrink=0.8)
    return path


def _draw_maps(chosen: Measurement, names: Sequence[str], folder: Path) -> Path:
    """Images in rows; on them, in columns, the map of each branch, by these names."""
    indices = sorted(int(n.split("/")[1]) for n in chosen.arrays if n.startswith("image/"))
    path, columns = folder / "conflicts_maps.png", 1 + len(names)
    size = (1.25 * columns, 1.25 * len(indices) + 0.6)
    with picture(path, len(indices), columns, size=size, axes_grid=False) as (figure, panels):
        figure.suptitle(f"Grad-CAM of {chosen.label}", fontsize=9)
        for axes in panels.flat:
            axes.axis("off")
        for axes, title in zip(panels[0], ["image", *names], strict=True):
            axes.set_title(title, fontsize=8)
        for row, index in zip(panels, indices, strict=True):
            row[0].imshow(chosen.arrays[f"image/{index}"])
            for axes, name in zip(row[1:], names, strict=True):
                map_ = chosen.arrays[f"cam/{index}/{name}"]
                draw_heat(axes, chosen.arrays[f"image/{index}"], map_, most=float(map_.max()) or 1)
                if not map_.any():
                    axes.text(
                        0.5, 0.5, "zero map", transform=axes.transAxes, ha="center", va="center",
                        fontsize=8, color="white",
                    )  # fmt: skip
    return path
