"""Multi-scale deformable attention in plain PyTorch: the definition, and what a CPU runs.

A bilinear sample is a weighted sum of four cells, and attention a weighted sum of samples: together
one product with a sparse matrix whose rows are (query, head) and whose columns are (cell, head).
PyTorch multiplies such a matrix in two forms that never build the samples themselves:
``embedding_bag`` adds up weighted rows, ``sampled_addmm`` takes the inner products at given places.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from codetr.structures import Size
from codetr.transfer import tensor_on

# PyTorch says so at the first sparse matrix of a process, whatever is done with it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

LEFT_OUT = -2.0
"""Where samples beyond the upper or left edge are moved to: no corner of theirs is in the map."""


def _is_empty(locations: Tensor, value: Tensor) -> bool:
    """Whether there is nothing to sample, or nothing to sample of."""
    return not (locations.numel() and value.shape[-1])


def attend(value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """As of ``codetr.ops.deformable_attention``, without gradients."""
    batch, queries, heads = locations.shape[:3]
    if _is_empty(locations, value):
        return value.new_zeros(batch, queries, heads * value.shape[-1])
    frames = _Frames.around(shapes, value)
    samples = _Samples.at(locations, weights, frames)
    sums = functional.embedding_bag(
        samples.corners().flatten(1),
        frames.rows,
        mode="sum",
        per_sample_weights=samples.shares().flatten(1),
    )
    return sums.view(batch, queries, -1).to(value.dtype)


def gradients(
    grad: Tensor,
    value: Tensor,
    shapes: list[Size],
    locations: Tensor,
    weights: Tensor,
    *,
    with_value: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of value, None unless ``with_value``, locations and weights, from that of the result,
    (B, Q, H * D).

    Adds up in an order that depends on the inputs alone, on every device.
    """
    if _is_empty(locations, value):
        of_value = torch.zeros_like(value) if with_value else None
        return of_value, torch.zeros_like(locations), torch.zeros_like(weights)
    frames = _Frames.around(shapes, value)
    samples = _Samples.at(locations, weights, frames)
    grad = grad.to(frames.rows.dtype).reshape(-1, value.shape[-1])  # (B Q H, D)
    of_value = _gradient_of_value(grad, samples, frames).to(value.dtype) if with_value else None
    of_locations, of_weights = _gradients_of_samples(grad, samples, frames)
    return (
        of_value,
        of_locations.view(locations.shape).to(locations.dtype),
        of_weights.view(weights.shape).to(weights.dtype),
    )


def gradient_of_value(
    grad: Tensor, value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """The first of :func:`gradients` alone."""
    if _is_empty(locations, value):
        return torch.zeros_like(value)
    frames = _Frames.around(shapes, value)
    samples = _Samples.at(locations, weights, frames)
    grad = grad.to(frames.rows.dtype).reshape(-1, value.shape[-1])
    return _gradient_of_value(grad, samples, frames).to(value.dtype)


@dataclass
class _Frames:
    """All maps, each in a frame of zeros, end to end.

    Two rows above and below and one column left and right: a sample's corners then need no test
    whether they are inside. (One column serves as the second of the row before.)

    Attributes:
        rows: (B * cells * H, D) in float32 at least.
        starts: index of the first cell of each level's frame.
        cells: of all frames, for one image.
    """

    shapes: list[Size]
    rows: Tensor
    starts: list[int]
    cells: int
    batch: int
    heads: int

    @staticmethod
    def around(shapes: list[Size], value: Tensor) -> _Frames:
        batch, _, heads, channels = value.shape
        starts = [1]  # a cell before the first frame and one after the last, for the same reason
        for height, width in shapes:
            starts.append(starts[-1] + (height + 4) * (width + 2))
        cells = starts.pop() + 1
        # bf16 sums of 64 terms lose half of their digits: add up in float32.
        exact = torch.promote_types(value.dtype, torch.float32)
        rows = value.new_zeros(batch, cells, heads, channels, dtype=exact)
        frames = _Frames(shapes, rows.view(-1, channels), starts, cells, batch, heads)
        areas = [height * width for height, width in shapes]
        for level, cells_of_level in enumerate(value.split(areas, dim=1)):
            frames.window(rows, level).copy_(cells_of_level.unflatten(1, shapes[level]))
        return frames

    def window(self, rows: Tensor, level: int, down: int = 0, right: int = 0) -> Tensor:
        """(B, h, w, H, D), a level's map in (B, cells, H, D) rows, moved by so many cells."""
        height, width = self.shapes[level]
        start, area = self.starts[level], (height + 4) * (width + 2)
        frame = rows[:, start : start + area].unflatten(1, (height + 4, width + 2))
        return frame.narrow(1, 2 + down, height).narrow(2, 1 + right, width)


@dataclass
class _Samples:
    """Where each sample's upper left corner is, and how far it is from there.

    N = B * Q * H rows with S = levels * P samples each.

    Attributes:
        cells: (N, S) rows of the frames, int.
        down, right: (N, S) way from the cell's centre, in cells; in [0, 1).
        weights: (N, S).
        below: (S,) distance to the next line of the map, in rows of the frames.
        sizes: (S, 2) width and height of the sample's map.
    """

    cells: Tensor
    right: Tensor
    down: Tensor
    weights: Tensor
    below: Tensor
    sizes: Tensor
    heads: int

    @staticmethod
    def at(locations: Tensor, weights: Tensor, frames: _Frames) -> _Samples:
        batch, queries, heads, levels, points, _ = locations.shape
        exact, device = frames.rows.dtype, frames.rows.device
        # Constants are as wide as the rows they meet: broadcasting over short rows is slow.
        sizes = _constant([(w, h) for h, w in frames.shapes], points, exact, device)  # (S, 2)
        flat = locations.to(exact).reshape(-1, 2 * levels * points)
        at = torch.addcmul(sizes.new_full((), -0.5), flat, sizes.flatten())
        at = torch.minimum(at.clamp_(min=LEFT_OUT), sizes.flatten())
        corner = at.nan_to_num(nan=LEFT_OUT).floor_()
        way = at.sub_(corner).unflatten(1, (-1, 2))

        index = torch.int32 if len(frames.rows) < 2**31 else torch.int64
        strides = [(width + 2) * heads for _, width in frames.shapes]
        below = _constant(strides, points, index, device)
        firsts = [
            (start + 2 * (width + 2) + 1) * heads
            for start, (_, width) in zip(frames.starts, frames.shapes, strict=True)
        ]
        first = _constant(firsts, points, index, device)
        image = torch.arange(batch, dtype=index, device=device) * (frames.cells * heads)
        head = torch.arange(heads, dtype=index, device=device)
        origin = image[:, None, None, None] + head[:, None] + first  # (B, 1, H, S)
        x, y = corner.to(index).view(batch, queries, heads, -1, 2).unbind(-1)
        cells = torch.mul(y, below).add_(x, alpha=heads).add_(origin)
        return _Samples(
            cells=cells.flatten(0, 2),
            right=way[..., 0],
            down=way[..., 1],
            weights=weights.to(exact).reshape(cells.shape).flatten(0, 2),
            below=below,
            sizes=sizes,
            heads=heads,
        )

    def corners(self) -> Tensor:
        """(N, 4, S) rows of the frames: upper left, upper right, lower left, lower right."""
        right = torch.full_like(self.below, self.heads)
        steps = torch.stack((torch.zeros_like(right), right, self.below, self.below + right))
        return self.cells[:, None] + steps

    def shares(self) -> Tensor:
        """(N, 4, S), what each corner counts for: bilinear weight times attention."""
        shares = self.weights.new_empty(len(self.cells), 4, self.cells.shape[1])
        lower = self.weights * self.down
        upper = self.weights - lower
        for first, row in ((0, upper), (2, lower)):
            torch.mul(row, self.right, out=shares[:, first + 1])
            torch.sub(row, shares[:, first + 1], out=shares[:, first])
        return shares


def _constant(per_level: list, points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(levels * P, ...), each level's number for each of its points."""
    return tensor_on(device, per_level, dtype).repeat_interleave(points, dim=0)


def _gradient_of_value(grad: Tensor, samples: _Samples, frames: _Frames) -> Tensor:
    """(B, T, H, D): each cell gathers from the corners that lie on it, once these are sorted.

    Sorting samples by their upper left corner serves all four corners, for the others lie one cell
    right and below: a quarter of the sorting, but four passes over all cells. Where samples are
    fewer than cells, as a decoder's on a large map, it is the passes that take the time.
    """
    shares = samples.shares()
    if samples.cells.numel() < len(frames.rows):
        keys, parts = samples.corners(), {(0, 0): shares}
    else:
        keys = samples.cells
        parts = {divmod(corner, 2): shares[:, corner] for corner in range(4)}
    cells, order = keys.flatten().sort(stable=True)
    sources = order.div(keys[0].numel(), rounding_mode="floor").to(cells.dtype)
    every = torch.arange(len(frames.rows), dtype=cells.dtype, device=cells.device)
    begins = torch.searchsorted(cells, every, out_int32=cells.dtype == torch.int32)

    areas = [height * width for height, width in frames.shapes]
    result = grad.new_zeros(frames.batch, sum(areas), frames.heads, grad.shape[1])
    for (down, right), part in parts.items():
        gathered = functional.embedding_bag(
            sources,
            grad,
            begins,
            mode="sum",
            per_sample_weights=part.flatten().index_select(0, order),
        ).view(frames.batch, frames.cells, frames.heads, -1)
        for level, of_level in enumerate(result.split(areas, dim=1)):
            of_level.unflatten(1, frames.shapes[level]).add_(
                frames.window(gathered, level, -down, -right)
            )
    return result


def _gradients_of_samples(
    grad: Tensor, samples: _Samples, frames: _Frames
) -> tuple[Tensor, Tensor]:
    """(N, S, 2) of the locations and (N, S) of the weights."""
    corners = samples.corners().flatten(1)
    ends = torch.arange(
        0, corners.numel() + 1, corners.shape[1], dtype=corners.dtype, device=corners.device
    )
    shape = (len(corners), len(frames.rows))
    nothing = grad.new_zeros(corners.numel())
    places = torch.sparse_csr_tensor(
        ends, corners.flatten(), nothing, shape, check_invariants=False
    )
    products = torch.sparse.sampled_addmm(places, grad, frames.rows.t(), beta=0.0).values()
    upper_left, upper_right, lower_left, lower_right = products.view(len(grad), 4, -1).unbind(1)

    upper = torch.lerp(upper_left, upper_right, samples.right)
    lower = torch.lerp(lower_left, lower_right, samples.right)
    of_weights = torch.lerp(upper, lower, samples.down)
    across = torch.lerp(upper_right - upper_left, lower_right - lower_left, samples.down)
    of_locations = torch.stack((across, lower - upper), dim=-1)
    return of_locations * samples.weights[..., None] * samples.sizes, of_weights
