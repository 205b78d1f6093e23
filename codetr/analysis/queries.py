"""Where positive queries lie (figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codetr.analysis.frame import (
    EXAMPLE_SIDE,
    Analysis,
    Arrays,
    Measurement,
    Numbers,
    Seen,
    Tables,
    shown,
)
from codetr.analysis.page import (
    groups,
    image,
    images_of,
    largest_and_smallest,
    mean_and_range,
    table,
    values_of,
    write_page,
)
from codetr.boxes import extents, xyxy_to_cxcywh
from codetr.heads.head import Head
from codetr.matching.hungarian import Match, hungarian
from codetr.plotting import legend_below, line_styles, picture
from codetr.queries.selection import QUERY
from codetr.structures import Positives, Size, Targets

BINS = np.linspace(0, 1, 101)
"""Of distances, in fractions of the image's diagonal."""

KINDS = {"matched": "-", "unmatched": "--"}
"""Of queries from which distances are taken, and the lines that show them."""

PAPERS_COLOURS = {QUERY: "red", "faster_rcnn": "blue", "atss": "orange"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#882255", "#000000", "#999933")
"""Of the other heads, in their order."""

PAPER = (
    "The paper (section 4.4, figure 7) saw{per_object} customised positive queries around the "
    "centre of their objects, on average much further from the negative queries of one-to-one "
    "matching than from its positive ones."
)


class Queries(Analysis):
    """Numbers: ``positives_per_object/HEAD``, how many candidates a head's assignment gives an
    object; ``queries_per_object/HEAD``, how many of them the decoder is handed in training, after
    the sampler of an R-CNN and ``positive_queries.max``; ``objects_without/HEAD``, the share of
    objects that the assignment gives nothing to; ``distance_matched/HEAD`` and
    ``distance_unmatched/HEAD``, the mean distance of a head's positives, sampled where it samples,
    from the query matched with their object, and from the queries that are matched with none,
    between centres in fractions of the image's diagonal.

    Queries and positives lie where the decoder is given them: at their reference points.
    """

    name = "queries"
    trains_heads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heads = self.model.config.head_names
        self.objects: dict[int, int] = {}
        self.counts: dict[tuple[int, str], tuple[int, int, int]] = {}
        self.distances: dict[tuple[int, str], tuple[NDArray[Any], NDArray[Any]]] = {}
        self.pictures: Arrays = {}

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        sizes, model = seen.batch.sizes, self.model
        memory = model.encode(seen.batch)
        group = model.queries(memory).group
        prediction = model.decoder([group], memory)[QUERY]
        cost = model.config.matching_cost
        matched = hungarian(prediction.logits[-1], prediction.boxes[-1], seen.targets, sizes, cost)
        pyramid = model.memory_pyramid(memory)
        found = {
            name: cast(Head, head)(pyramid, sizes, seen.targets).positives
            for name, head in zip(self.heads, model.heads, strict=True)
        }
        centres = group.reference[..., :2] * extents(sizes, group.reference)[:, None, :2]
        for number, (index, targets) in enumerate(zip(seen.indices, seen.targets, strict=True)):
            positives = {name: of_images[number] for name, of_images in found.items()}
            objects = {QUERY: matched[number][1]}
            self.objects[index] = len(targets)
            for name, positive in positives.items():
                own = objects[name] = assigned_objects(positive, targets)
                every = own if positive.assigned is None else positive.assigned
                self.counts[index, name] = (len(every), len(every.unique()), self._handed(positive))
                self.distances[index, name] = query_distances(
                    positive_centres(positive),
                    own,
                    centres[number],
                    matched[number],
                    seen.sizes[number],
                )
            if index in self.examples:
                points = {QUERY: centres[number][matched[number][0]]}
                points |= {name: positive_centres(some) for name, some in positives.items()}
                self._keep(index, seen.pixels(number), targets, points, objects)

    def _handed(self, positives: Positives) -> int:
        """How many of an image's positives become queries of the decoder in training."""
        limits = self.model.config.positive_queries
        return min(len(positives.positive), limits.max) if limits.enabled else 0

    def _keep(
        self,
        index: int,
        pixels: Tensor,
        targets: Targets,
        points: Mapping[str, Tensor],
        objects: Mapping[str, Tensor],
    ) -> None:
        """Keep what is drawn of an image; ``objects``: the number of each point's."""
        scale = min(1.0, EXAMPLE_SIDE / max(pixels.shape[-2:]))
        self.pictures[f"image/{index}"] = shown(pixels, self.subject.checkpoint.data)
        self.pictures[f"boxes/{index}"] = (targets.boxes * scale).cpu().numpy()
        for name, places in points.items():
            self.pictures[f"points/{index}/{name}"] = (places * scale).cpu().numpy()
            self.pictures[f"objects/{index}/{name}"] = objects[name].cpu().numpy()

    def finish(self) -> tuple[Numbers, Arrays]:
        places, objects = sorted(self.objects), sum(self.objects.values())
        numbers: Numbers = {}
        arrays: Arrays = {"bins": BINS, **self.pictures}
        for name in self.heads:
            counts = np.array([self.counts[place, name] for place in places])
            numbers[f"positives_per_object/{name}"] = counts[:, 0].sum() / objects
            numbers[f"objects_without/{name}"] = 1 - counts[:, 1].sum() / objects
            numbers[f"queries_per_object/{name}"] = counts[:, 2].sum() / objects
            for number, kind in enumerate(("matched", "unmatched")):
                values = np.concatenate([self.distances[place, name][number] for place in places])
                arrays[f"{kind}/{name}"] = np.histogram(values, BINS)[0]
                if len(values):
                    numbers[f"distance_{kind}/{name}"] = values.mean()
        return numbers, arrays

    @classmethod
    def report(
        cls,
        measurements: Sequence[Measurement],
        folder: Path,
        paper: Tables,
        arms: Sequence[str] = (),
    ) -> list[Path]:
        heads = [*dict.fromkeys(head for one in measurements for head in one.facts["heads"])]
        places = _draw_places(measurements, folder)
        styles = line_styles([*arms, *groups(measurements)])
        histograms = _draw_distances(measurements, heads, styles, folder)
        theirs = paper.get("defaults", {}).get("positive_queries_per_gt", {})
        given = {head: _of_head(measurements, f"positives_per_object/{head}") for head in heads}
        near, far = (_span(measurements, heads, f"distance_{kind}") for kind in KINDS)
        by_head = largest_and_smallest(given, ".1f", "detectors")
        ratios = " and ".join(f"{n} ({head})" for head, n in theirs.items())
        per_object = (
            ratios and f" {ratios} positives for each object on COCO (supplementary A), and"
        )
        page = write_page(
            folder / f"{cls.name}.md",
            "Where positive queries lie",
            seen=f"The number of positives that an object is given is {by_head}; they lie {near} "
            f"of the diagonal from the matched queries and {far} from the others.",
            paper=PAPER.format(per_object=per_object),
            about=images_of(measurements),
            blocks=[
                table(
                    [
                        "detector", "head", "positives per object", "handed over", "the paper's",
                        "objects without", "distance from matched", "from unmatched",
                    ],
                    [
                        [group, head, every, handed, theirs.get(head), *rest]
                        for group, head, every, handed, *rest in _rows(measurements)
                    ],
                ),
                image(places, "Matched queries and positives, with their objects"),
                image(histograms, "Distances of positives from matched and unmatched queries"),
                "Positives are all that a head's assignment gives an object; handed over to the "
                "decoder are those that an R-CNN's sampler takes (`rcnn.samples` times "
                "`rcnn.positive_fraction` in an image at most), and of each head "
                "`positive_queries.max` at most. The paper does not say which of the two it "
                "counted. Objects without: those that the assignment gives nothing to. Distances "
                "are between centres, in fractions of the image's diagonal, of the positives that "
                "a head samples, or of all; unmatched: the mean over the queries that are matched "
                "with no object. Queries and positives are where the decoder is given them.",
            ],
        )  # fmt: skip
        return [page, places, histograms]


def positive_centres(positives: Positives) -> Tensor:
    """(P, 2) x, y in pixels."""
    return xyxy_to_cxcywh(positives.boxes[positives.positive])[:, :2]


def assigned_objects(positives: Positives, targets: Targets) -> Tensor:
    """(P,) the number of the object that each positive is assigned to."""
    same = (positives.targets[:, None] == targets.boxes).all(-1)
    same &= positives.labels[:, None] == targets.labels
    return same.int().argmax(1) if len(targets) else same.new_zeros(len(same), dtype=torch.long)


def query_distances(
    positives: Tensor, objects: Tensor, queries: Tensor, matched: Match, size: Size
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distance of each positive from the query that is matched with its object, and its mean
    distance from the queries that are matched with none; in fractions of the diagonal.

    Args:
        positives: (P, 2) x, y in pixels.
        objects: (P,) the object of each.
        queries: (Q, 2) x, y in pixels.
        matched: queries and their objects.
        size: (height, width) of the image.
    """
    between = torch.cdist(positives.float(), queries.float()) / float(np.hypot(*size))
    chosen, of_objects = matched
    is_own = objects[:, None] == of_objects  # an object without a query gives no distance
    row, column = is_own.nonzero(as_tuple=True)
    free = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    free[chosen] = False
    own, others = between[row, chosen[column]], between[:, free]
    means_ = others.double().mean(1) if others.shape[1] else others.new_zeros(0)
    return own.cpu().numpy(), means_.cpu().numpy()


def _of_head(measurements: Sequence[Measurement], name: str) -> list[float]:
    """The number in every detector that has it."""
    return [one.numbers[name] for one in measurements if name in one.numbers]


def _span(measurements: Sequence[Measurement], heads: Sequence[str], name: str) -> str:
    """``0.06 to 0.08``: of the number, over all heads of all detectors."""
    values = [v for head in heads for v in _of_head(measurements, f"{name}/{head}")]
    ends = [f"{end:.2f}" for end in (min(values), max(values))] if values else ["undefined"]
    return " to ".join(dict.fromkeys(ends))


def _rows(measurements: Sequence[Measurement]) -> list[list[str | None]]:
    """Group and head, and the numbers of the head there."""
    names = (
        "positives_per_object", "queries_per_object", "objects_without",
        "distance_matched", "distance_unmatched",
    )  # fmt: skip
    return [
        [group, head, *(mean_and_range(values_of(some, f"{name}/{head}")) for name in names)]
        for group, some in groups(measurements).items()
        for head in some[0].facts["heads"]
    ]


def _draw_places(measurements: Sequence[Measurement], folder: Path) -> Path:
    """Of a detector with most heads: a row for each, an image in each column."""
    chosen = max(measurements, key=lambda one: len(one.facts["heads"]))
    heads = chosen.facts["heads"]
    indices = sorted(int(n.split("/")[1]) for n in chosen.arrays if n.startswith("image/"))
    path, side = folder / "queries.png", 2.1
    size = (side * len(indices) + 0.4, side * len(heads) + 0.7)
    colours = head_colours(heads)
    with picture(path, len(heads), len(indices), size=size, axes_grid=False) as (figure, panels):
        for row, head in zip(panels, heads, strict=True):
            for axes, index in zip(row, indices, strict=True):
                draw_objects(axes, chosen, index)
                draw_links(axes, chosen, index, head, colours[head])
                draw_links(axes, chosen, index, QUERY, colours[QUERY])
                x, y = chosen.arrays[f"points/{index}/{head}"].T
                axes.scatter(
                    x, y, s=18, color=colours[head], edgecolors="white", linewidths=0.4,
                    label=f"positives of {head}",
                )  # fmt: skip
                x, y = chosen.arrays[f"points/{index}/{QUERY}"].T
                axes.scatter(
                    x, y, s=80, marker="*", color=colours[QUERY], edgecolors="white",
                    linewidths=0.5, label="matched queries",
                )  # fmt: skip
            row[0].set_ylabel(f"positives of {head}", fontsize=9)
        figure.suptitle(chosen.label, fontsize=9)
        legend_below(figure, panels.flat)
    return path


def head_colours(heads: Sequence[str]) -> dict[str, str]:
    """Of the query head and of each auxiliary one: the paper's, and of others no two alike."""
    others = zip([head for head in heads if head not in PAPERS_COLOURS], cycle(OTHER_COLOURS))
    return PAPERS_COLOURS | dict(others)


def draw_links(axes: Any, measurement: Measurement, index: int, head: str, colour: str) -> None:
    """A thin line from each of a head's points to the centre of its object."""
    boxes = measurement.arrays[f"boxes/{index}"]
    objects = measurement.arrays.get(f"objects/{index}/{head}")
    if objects is None or not len(objects):  # kept by an earlier version, or nothing to link
        return
    centres = (boxes[objects, :2] + boxes[objects, 2:]) / 2
    points = measurement.arrays[f"points/{index}/{head}"]
    axes.plot(*np.stack([points, centres], 1).T, color=colour, linewidth=0.9, alpha=0.9)


def draw_objects(axes: Any, measurement: Measurement, index: int) -> None:
    """An example with its objects' boxes, which are seen on dark and on light."""
    image_ = measurement.arrays[f"image/{index}"]
    height, width = image_.shape[:2]
    axes.imshow(image_, extent=(0, width, height, 0))
    for left, top, right, bottom in measurement.arrays[f"boxes/{index}"]:
        outline = [left, right, right, left, left], [top, top, bottom, bottom, top]
        for colour, thickness in (("black", 2.4), ("white", 1.2)):
            axes.plot(*outline, color=colour, linewidth=thickness)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)


def _draw_distances(
    measurements: Sequence[Measurement],
    heads: Sequence[str],
    styles: Mapping[str, dict[str, Any]],
    folder: Path,
) -> Path:
    """The distribution of distances over all seeds of a group, a panel for each head."""
    found = groups(measurements)
    # Dashes tell the kinds of queries; a line that lies below others is the thickest of them.
    looks = {
        group: {"color": styles[group]["color"], "linewidth": width}
        for group, width in zip(found, np.linspace(2.6, 0.9, len(found)), strict=True)
    }
    path, columns = folder / "queries_distances.png", min(3, len(heads))
    rows = -(-len(heads) // columns)
    size = (max(4.2, 3.2 * columns), 2.8 * rows + 0.6)
    with picture(path, rows, columns, size=size, font_size=9) as (figure, panels):
        for axes in panels.flat[len(heads) :]:
            axes.axis("off")
        most = 0.05
        for axes, head in zip(panels.flat, heads, strict=False):
            for group, some in found.items():
                for kind, style in KINDS.items():
                    counts = np.sum([m.arrays.get(f"{kind}/{head}", 0 * BINS[1:]) for m in some], 0)
                    if counts.any():
                        shares = counts / counts.sum()
                        axes.stairs(shares, BINS, linestyle=style, **looks[group])
                        most = max(most, BINS[1:][counts > 0].max())
            axes.set(xlabel="distance / diagonal", title=f"positives of {head}")
        for axes in panels.flat[: len(heads)]:
            axes.set_xlim(0, most)
        for axes in panels[:, 0]:
            axes.set_ylabel("share")
        for group, look in looks.items():
            panels[0, 0].plot([], [], label=group, **look)
        for kind, style in KINDS.items():
            panels[0, 0].plot([], [], color="0.4", linestyle=style, label=f"{kind} queries")
        legend_below(figure, panels.flat)
    return path
