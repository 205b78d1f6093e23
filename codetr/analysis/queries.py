"""Where positive queries lie (figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from codetr.analysis.page import group_colours, groups, image, images_of, means, table, write_page
from codetr.boxes import extents, xyxy_to_cxcywh
from codetr.heads.head import Head
from codetr.matching.hungarian import Match, hungarian
from codetr.plotting import COLOURS, picture
from codetr.queries.selection import QUERY
from codetr.structures import Positives, Size, Targets

BINS = np.linspace(0, 1, 101)
"""Of distances, in fractions of the image's diagonal."""

HEAD_COLOURS = {QUERY: "red", "faster_rcnn": "blue", "atss": "orange"}
"""The paper's; other heads take the next of ours."""

PAPER = (
    "The paper (section 4.4, figure 7) saw{per_object} customised positive queries around the "
    "centre of their objects, on average much further from the negative queries of one-to-one "
    "matching than from its positive ones."
)


class Queries(Analysis):
    """Numbers: ``positives_per_object/HEAD``; ``objects_without/HEAD``, the share of objects that a
    head assigns nothing to; ``distance_matched/HEAD`` and ``distance_unmatched/HEAD``, the mean
    distance of a head's positives from the query matched with their object, and from the queries
    that are matched with none, between centres in fractions of the image's diagonal.

    Queries and positives lie where the decoder is given them: at their reference points.
    """

    name = "queries"
    trains_heads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heads = self.model.config.head_names
        self.objects: dict[int, int] = {}
        self.counts: dict[tuple[int, str], tuple[int, int]] = {}
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
            self.objects[index] = len(targets)
            for name, positive in positives.items():
                own = assigned_objects(positive, targets)
                self.counts[index, name] = (len(own), len(own.unique()))
                self.distances[index, name] = query_distances(
                    positive_centres(positive), own, centres[number], matched[number], sizes[number]
                )
            if index in self.examples:
                queries = centres[number][matched[number][0]]
                self._keep(index, seen.batch.pixels[number], targets, queries, positives)

    def _keep(
        self,
        index: int,
        pixels: Tensor,
        targets: Targets,
        queries: Tensor,
        positives: Mapping[str, Positives],
    ) -> None:
        scale = min(1.0, EXAMPLE_SIDE / max(pixels.shape[-2:]))
        points = {QUERY: queries} | {n: positive_centres(p) for n, p in positives.items()}
        self.pictures[f"image/{index}"] = shown(pixels, self.subject.checkpoint.data)
        self.pictures[f"boxes/{index}"] = (targets.boxes * scale).cpu().numpy()
        for name, places in points.items():
            self.pictures[f"points/{index}/{name}"] = (places * scale).cpu().numpy()

    def finish(self) -> tuple[Numbers, Arrays]:
        places, objects = sorted(self.objects), sum(self.objects.values())
        numbers: Numbers = {}
        arrays: Arrays = {"bins": BINS, **self.pictures}
        for name in self.heads:
            counts = np.array([self.counts[place, name] for place in places])
            numbers[f"positives_per_object/{name}"] = counts[:, 0].sum() / objects
            numbers[f"objects_without/{name}"] = 1 - counts[:, 1].sum() / objects
            for number, kind in enumerate(("matched", "unmatched")):
                values = np.concatenate([self.distances[place, name][number] for place in places])
                arrays[f"{kind}/{name}"] = np.histogram(values, BINS)[0]
                if len(values):
                    numbers[f"distance_{kind}/{name}"] = values.mean()
        return numbers, arrays

    @classmethod
    def report(cls, measurements: Sequence[Measurement], folder: Path, paper: Tables) -> list[Path]:
        places = _draw_places(measurements, folder)
        histograms = _draw_distances(measurements, folder)
        theirs = paper.get("defaults", {}).get("positive_queries_per_gt", {})
        rows = _rows(measurements)
        seen = ", ".join(
            f"{per_object:.1f} by {head} ({group})" for group, head, per_object, *_ in rows
        )
        ratios = " and ".join(f"{n} ({head})" for head, n in theirs.items())
        per_object = (
            ratios and f" {ratios} positives for each object on COCO (supplementary A), and"
        )
        page = write_page(
            folder / f"{cls.name}.md",
            "Where positive queries lie",
            seen=f"Each object is given so many positives: {seen}.",
            paper=PAPER.format(per_object=per_object),
            about=images_of(measurements),
            blocks=[
                table(
                    [
                        "detector", "head", "positives per object", "the paper's",
                        "objects without", "distance from matched", "from unmatched",
                    ],
                    [[g, h, n, theirs.get(h), *rest] for g, h, n, *rest in rows],
                ),
                image(places, "Matched queries and positives, with their objects"),
                image(histograms, "Distances of positives from matched and unmatched queries"),
                "Positives are those of the heads' assignment, before training takes at most "
                "`positive_queries.max` of them. Distances are between centres, in fractions of "
                "the image's diagonal; unmatched: the mean over the queries that are matched with "
                "no object. Queries and positives are where the decoder is given them.",
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


def _rows(
    measurements: Sequence[Measurement],
) -> list[tuple[str, str, float, float, float | None, float | None]]:
    rows = []
    for group, some in groups(measurements).items():
        numbers = means(some)
        for head in some[0].facts["heads"]:
            rows.append(
                (
                    group,
                    head,
                    numbers[f"positives_per_object/{head}"],
                    numbers[f"objects_without/{head}"],
                    numbers.get(f"distance_matched/{head}"),
                    numbers.get(f"distance_unmatched/{head}"),
                )
            )
    return rows


def _draw_places(measurements: Sequence[Measurement], folder: Path) -> Path:
    """Images of the group with most heads; matched queries and positives with their objects."""
    chosen = max(measurements, key=lambda one: len(one.facts["heads"]))
    names = [QUERY, *chosen.facts["heads"]]
    others = iter(COLOURS[2:])
    colours = {name: HEAD_COLOURS.get(name) or next(others) for name in names}
    indices = sorted(int(n.split("/")[1]) for n in chosen.arrays if n.startswith("image/"))
    path = folder / "queries.png"
    size = (3.2 * len(indices), 3.9)
    with picture(path, 1, len(indices), size=size, axes_grid=False) as (figure, panels):
        for axes, index in zip(panels[0], indices, strict=True):
            axes.imshow(chosen.arrays[f"image/{index}"], alpha=0.85)
            for left, top, right, bottom in chosen.arrays[f"boxes/{index}"]:
                axes.plot(
                    [left, right, right, left, left], [top, top, bottom, bottom, top],
                    color="white", linewidth=1.5,
                )  # fmt: skip
            for name in reversed(names):
                x, y = chosen.arrays[f"points/{index}/{name}"].T
                is_query = name == QUERY
                axes.scatter(
                    x, y, s=60 if is_query else 14, color=colours[name], label=name,
                    marker="*" if is_query else "o", linewidths=0, alpha=1 if is_query else 0.7,
                )  # fmt: skip
            axes.axis("off")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.suptitle(chosen.group, fontsize=9)
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower center", ncols=len(names), fontsize=9
        )
    return path


def _draw_distances(measurements: Sequence[Measurement], folder: Path) -> Path:
    """The distribution of distances, a panel for each head."""
    heads = [*dict.fromkeys(head for one in measurements for head in one.facts["heads"])]
    colours = group_colours(measurements)
    path = folder / "queries_distances.png"
    with picture(path, 1, len(heads), size=(4.2 * len(heads), 3.4)) as (_, panels):
        for axes, head in zip(panels[0], heads, strict=True):
            for group, some in groups(measurements).items():
                for kind, style in (("matched", "-"), ("unmatched", "--")):
                    counts = sum(
                        one.arrays[f"{kind}/{head}"] for one in some if head in one.facts["heads"]
                    )
                    if np.sum(counts):
                        axes.stairs(
                            counts / np.sum(counts), BINS, color=colours[group], linestyle=style,
                            label=f"{group}: {kind}",
                        )  # fmt: skip
            axes.set(xlabel="distance / diagonal", title=f"positives of {head}")
            axes.legend(fontsize=7)
        panels[0, 0].set_ylabel("share")
    return path
