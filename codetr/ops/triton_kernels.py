"""Multi-scale deformable attention as Triton kernels, forward and backward.

One program computes one head of a block of queries. A thread holds a few neighbouring channels, so
that a corner of a sample is read in one piece; what is said of a sample (its place, its share) is
the same for all threads of a query. Sums are in float32 (float64 for a float64 value).

Nothing here is on the way of plain PyTorch: only ``codetr.ops`` imports it, at its first call.
"""

# ruff: noqa: N803, N806, PLR0124, PLR0915, PLR0917 - constants of a kernel are in capitals; NaN is
# what differs from itself; kernels are long and called with tuples of arguments
# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from codetr.structures import Size

VARYING = [
    "tokens",
    "queries",
    *(f"{frame}_{axis}" for frame in ("centers", "scales") for axis in ("image", "query", "level")),
]
"""Integers that differ from batch to batch, which kernels are not to be compiled anew for."""


@triton.jit
def _place(at, size):
    """The cell before a coordinate, and the way from that cell's centre to it, in [0, 1).

    Coordinates far outside, infinite ones too, are moved to where no corner is in the map. NaN has
    no corner in the map either, and the way to it is NaN.
    """
    moved = tl.where(at >= -2.0, at, -2.0)
    moved = tl.where(moved <= size, moved, size)
    first = tl.floor(moved)
    return first.to(tl.int32), tl.where(at == at, moved, at) - first


@triton.jit
def _sizes_of_level(sizes, LEVEL: tl.constexpr):
    height = tl.full((), sizes[2 * LEVEL], tl.int32)
    width = tl.full((), sizes[2 * LEVEL + 1], tl.int32)
    return height, width


@triton.jit
def _mask(inside, channel, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = inside[:, None]
    if CHANNELS < BLOCK_D:
        mask = mask & (channel < CHANNELS)[None, :]
    return mask


@triton.jit
def _coordinates(
    places,
    centers,
    scales,
    active,
    height,
    width,
    FUSED: tl.constexpr,
    ACC: tl.constexpr,
):
    """(x, y) of a sample in cells, counted from the centre of the first, for each query.

    ``places`` points at locations, or at offsets where FUSED; the other two at the level's entry.
    """
    x = tl.load(places, mask=active, other=0.0).to(ACC)
    y = tl.load(places + 1, mask=active, other=0.0).to(ACC)
    if FUSED:
        x = tl.load(centers, mask=active, other=0.0).to(ACC) + x * tl.load(
            scales, mask=active, other=0.0
        ).to(ACC)
        y = tl.load(centers + 1, mask=active, other=0.0).to(ACC) + y * tl.load(
            scales + 1, mask=active, other=0.0
        ).to(ACC)
    return x * width.to(ACC) - 0.5, y * height.to(ACC) - 0.5


@triton.jit
def _corners(
    places,
    centers,
    scales,
    active,
    start,
    height,
    width,
    channel,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Where the upper left corner of a sample is read; the way from it to the sample, right and
    down; which of upper left, upper right, lower left and lower right are in the map."""
    x, y = _coordinates(places, centers, scales, active, height, width, FUSED, ACC)
    left, right = _place(x, width.to(ACC))
    top, down = _place(y, height.to(ACC))
    is_left = (left >= 0) & (left < width) & active
    is_right = (left >= -1) & (left < width - 1) & active
    is_top = (top >= 0) & (top < height)
    is_bottom = (top >= -1) & (top < height - 1)
    return (
        ((start + top * width + left) * STEP)[:, None] + channel[None, :],
        right,
        down,
        _mask(is_top & is_left, channel, CHANNELS, BLOCK_D),
        _mask(is_top & is_right, channel, CHANNELS, BLOCK_D),
        _mask(is_bottom & is_left, channel, CHANNELS, BLOCK_D),
        _mask(is_bottom & is_right, channel, CHANNELS, BLOCK_D),
    )


@triton.jit
def _shares(weight, right, down):
    """What each of the four corners counts for."""
    lower = weight * down
    upper = weight - lower
    return upper - upper * right, upper * right, lower - lower * right, lower * right


@triton.jit
def _softmax_terms(logits, active):
    """The largest logit of each query, and one over the sum of all exp(logit - largest)."""
    largest = tl.where(active, tl.max(logits, axis=1), 0.0)
    total = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
    return largest, 1.0 / tl.where(active, total, 1.0)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    value,  # (B, T, H, D)
    places,  # (B, Q, H, L, P, 2): locations, or offsets where FUSED
    scores,  # (B, Q, H, L, P): weights, or logits where FUSED
    centers,  # (B, Q, L, 2), where FUSED
    scales,  # (B, Q, L, 2), where FUSED
    result,  # (B, Q, H, D)
    sizes,  # height and width of every level
    tokens,
    queries,
    centers_image,
    centers_query,
    centers_level,
    scales_image,
    scales_query,
    scales_level,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    SAMPLES: tl.constexpr = LEVELS * POINTS
    STEP: tl.constexpr = HEADS * CHANNELS  # from one cell of the map to the next
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    active = query < queries

    value += (image * tokens * HEADS + head) * CHANNELS
    row = query * HEADS + head
    places += image * queries * HEADS * SAMPLES * 2 + row * SAMPLES * 2
    scores += image * queries * HEADS * SAMPLES + row * SAMPLES
    result += image * queries * HEADS * CHANNELS
    if FUSED:
        centers += image * centers_image + query * centers_query
        scales += image * scales_image + query * scales_query
        column = tl.arange(0, BLOCK_W)
        is_score = active[:, None] & (column < SAMPLES)[None, :]
        logits = tl.load(scores[:, None] + column[None, :], mask=is_score, other=float("-inf"))
        largest, inverse = _softmax_terms(logits.to(ACC), active)

    attended = tl.zeros((BLOCK_Q, BLOCK_D), dtype=ACC)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = _sizes_of_level(sizes, level)
        for point in range(POINTS):
            cell, right, down, mask_0, mask_1, mask_2, mask_3 = _corners(
                places + 2 * (level * POINTS + point),
                centers + level * centers_level,
                scales + level * scales_level,
                active,
                start,
                height,
                width,
                channel,
                STEP,
                CHANNELS,
                BLOCK_D,
                FUSED,
                ACC,
            )
            weight = tl.load(scores + level * POINTS + point, mask=active, other=0.0).to(ACC)
            if FUSED:
                weight = tl.exp(weight - largest)
            share_0, share_1, share_2, share_3 = _shares(weight, right, down)
            cells = tl.load(value + cell, mask=mask_0, other=0.0).to(ACC)
            attended += share_0[:, None] * cells
            cells = tl.load(value + cell + STEP, mask=mask_1, other=0.0).to(ACC)
            attended += share_1[:, None] * cells
            below = cell + width * STEP
            cells = tl.load(value + below, mask=mask_2, other=0.0).to(ACC)
            attended += share_2[:, None] * cells
            cells = tl.load(value + below + STEP, mask=mask_3, other=0.0).to(ACC)
            attended += share_3[:, None] * cells
        start += height * width

    if FUSED:
        attended *= inverse[:, None]
    where = result + (row * CHANNELS)[:, None] + channel[None, :]
    mask = _mask(active, channel, CHANNELS, BLOCK_D)
    tl.store(where, attended.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _corner(rows, mask, of_rows, grad, share, SCATTER: tl.constexpr, ACC: tl.constexpr):
    """Inner product of a corner with ``grad``; where SCATTER, its share of ``grad`` is added."""
    cells = tl.load(rows, mask=mask, other=0.0).to(ACC)
    if SCATTER:
        tl.atomic_add(of_rows, share[:, None] * grad, mask=mask, sem="relaxed")
    return tl.sum(cells * grad, axis=1)


@triton.jit
def _with_column(tile, column, index, values):
    """``tile`` (queries, columns) with ``values`` (queries,) in the column that has this index."""
    return tl.where((column == index)[None, :], values[:, None], tile)


@triton.jit
def _store(rows, column, tile, active, WIDTH: tl.constexpr):
    """Write those columns of ``tile`` that rows of this width have."""
    mask = active[:, None] & (column < WIDTH)[None, :]
    where = rows[:, None] + column[None, :]
    tl.store(where, tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _store_pairs(rows, column, tile, tile_2, active, SAMPLES: tl.constexpr, BLOCK_W: tl.constexpr):
    """Write (x, y) of all samples, which one tile holds, or two."""
    _store(rows, column, tile, active, 2 * SAMPLES)
    if BLOCK_W < 2 * SAMPLES:
        _store(rows, column + BLOCK_W, tile_2, active, 2 * SAMPLES)


@triton.jit
def _scale(
    scales,
    column,
    scales_level,
    active,
    SAMPLES: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """What an offset of one moves, for each column of offsets: (x, y) of the sample's level."""
    mask = active[:, None] & (column < 2 * SAMPLES)[None, :]
    where = scales[:, None] + (column // (2 * POINTS) * scales_level + column % 2)[None, :]
    return tl.load(where, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad,  # (B, Q, H, D), of the result
    value,
    places,
    scores,
    centers,
    scales,
    of_value,  # (B, T, H, D) of ACC, where SCATTER: added to
    of_places,  # (B, Q, H, L, P, 2)
    of_scores,  # (B, Q, H, L, P)
    of_locations,  # (B, Q, H, L, P, 2), where FRAME: of the locations that FUSED computes
    sizes,
    tokens,
    queries,
    centers_image,
    centers_query,
    centers_level,
    scales_image,
    scales_query,
    scales_level,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FUSED: tl.constexpr,
    SCATTER: tl.constexpr,
    FRAME: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    SAMPLES: tl.constexpr = LEVELS * POINTS
    STEP: tl.constexpr = HEADS * CHANNELS  # from one cell of the map to the next
    TWO: tl.constexpr = BLOCK_W < 2 * SAMPLES  # tiles for (x, y), as wide as that for weights
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    active = query < queries

    value += (image * tokens * HEADS + head) * CHANNELS
    of_value += (image * tokens * HEADS + head) * CHANNELS
    row = query * HEADS + head
    first = image * queries * HEADS * SAMPLES
    places += first * 2 + row * SAMPLES * 2
    of_places += first * 2 + row * SAMPLES * 2
    of_locations += first * 2 + row * SAMPLES * 2
    scores += first + row * SAMPLES
    of_scores += first + row * SAMPLES

    where = image * queries * HEADS * CHANNELS + (row * CHANNELS)[:, None] + channel[None, :]
    is_result = _mask(active, channel, CHANNELS, BLOCK_D)
    column = tl.arange(0, BLOCK_W)
    is_score = active[:, None] & (column < SAMPLES)[None, :]
    above = tl.load(grad + where, mask=is_result, other=0.0).to(ACC)
    if FUSED:
        centers += image * centers_image + query * centers_query
        scales += image * scales_image + query * scales_query
        logits = tl.load(scores[:, None] + column[None, :], mask=is_score, other=float("-inf"))
        logits = logits.to(ACC)
        largest, inverse = _softmax_terms(logits, active)
    mean = tl.zeros((BLOCK_Q,), dtype=ACC)
    # Gathered in registers and stored as whole rows: (x, y) of all samples, and their weights.
    locations = tl.zeros((BLOCK_Q, BLOCK_W), dtype=ACC)
    locations_2 = locations
    all_weights = tl.zeros((BLOCK_Q, BLOCK_W), dtype=ACC)

    start = 0
    for level in tl.static_range(LEVELS):
        height, width = _sizes_of_level(sizes, level)
        for point in range(POINTS):
            cell, right, down, mask_0, mask_1, mask_2, mask_3 = _corners(
                places + 2 * (level * POINTS + point),
                centers + level * centers_level,
                scales + level * scales_level,
                active,
                start,
                height,
                width,
                channel,
                STEP,
                CHANNELS,
                BLOCK_D,
                FUSED,
                ACC,
            )
            weight = tl.load(scores + level * POINTS + point, mask=active, other=0.0).to(ACC)
            if FUSED:
                weight = tl.exp(weight - largest) * inverse
            share_0, share_1, share_2, share_3 = _shares(weight, right, down)
            below = cell + width * STEP
            upper_left = _corner(
                value + cell,
                mask_0,
                of_value + cell,
                above,
                share_0,
                SCATTER,
                ACC,
            )
            upper_right = _corner(
                value + cell + STEP,
                mask_1,
                of_value + cell + STEP,
                above,
                share_1,
                SCATTER,
                ACC,
            )
            lower_left = _corner(
                value + below,
                mask_2,
                of_value + below,
                above,
                share_2,
                SCATTER,
                ACC,
            )
            lower_right = _corner(
                value + below + STEP,
                mask_3,
                of_value + below + STEP,
                above,
                share_3,
                SCATTER,
                ACC,
            )

            across_top, across_bottom = upper_right - upper_left, lower_right - lower_left
            on_top = upper_left + across_top * right
            on_bottom = lower_left + across_bottom * right
            of_weight = on_top + (on_bottom - on_top) * down
            across = across_top + (across_bottom - across_top) * down
            of_x = across * weight * width.to(ACC)
            of_y = (on_bottom - on_top) * weight * height.to(ACC)
            mean += weight * of_weight
            sample = level * POINTS + point
            locations = _with_column(locations, column, 2 * sample, of_x)
            locations = _with_column(locations, column, 2 * sample + 1, of_y)
            if TWO:
                locations_2 = _with_column(locations_2, column + BLOCK_W, 2 * sample, of_x)
                locations_2 = _with_column(locations_2, column + BLOCK_W, 2 * sample + 1, of_y)
            all_weights = _with_column(all_weights, column, sample, of_weight)
        start += height * width

    if FRAME:
        _store_pairs(of_locations, column, locations, locations_2, active, SAMPLES, BLOCK_W)
    if FUSED:
        weights = tl.exp(logits - largest[:, None]) * inverse[:, None]
        all_weights = weights * (all_weights - mean[:, None])
        locations *= _scale(scales, column, scales_level, active, SAMPLES, POINTS, ACC)
        if TWO:
            locations_2 *= _scale(
                scales, column + BLOCK_W, scales_level, active, SAMPLES, POINTS, ACC
            )
    _store_pairs(of_places, column, locations, locations_2, active, SAMPLES, BLOCK_W)
    _store(of_scores, column, all_weights, active, SAMPLES)


WARPS = 4


def forward(value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """As of ``codetr.ops.deformable_attention``."""
    return _attend(value, shapes, locations, weights, None)


def fused_forward(
    value: Tensor,
    shapes: list[Size],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """As of ``codetr.ops.deformable_attention_fused``; ``scales`` (B, Q, levels, 2)."""
    return _attend(value, shapes, offsets, logits, (centers, scales))


def backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[Size],
    locations: Tensor,
    weights: Tensor,
    *,
    with_value: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of value, None unless ``with_value``, of locations and of weights."""
    of_value, of_locations, of_weights, _ = _differentiate(
        grad, value, shapes, locations, weights, None, with_value=with_value, with_frame=False
    )
    return of_value, of_locations, of_weights


def fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[Size],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *,
    with_value: bool,
    with_frame: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of value, offsets, logits and, ``with_frame``, of the locations they make."""
    return _differentiate(
        grad,
        value,
        shapes,
        offsets,
        logits,
        (centers, scales),
        with_value=with_value,
        with_frame=with_frame,
    )


def _attend(
    value: Tensor,
    shapes: list[Size],
    places: Tensor,
    scores: Tensor,
    frame: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, queries, heads = places.shape[:3]
    shape = (batch, queries, heads * value.shape[-1])
    if not (places.numel() and value.shape[-1]):
        return value.new_zeros(shape)
    value, places, scores = value.contiguous(), places.contiguous(), scores.contiguous()
    frame = _pairs_together(frame)
    result = value.new_empty(shape)  # the kernel writes every element
    grid, constants = _plan(value, places, value.element_size())
    with torch.cuda.device_of(value):
        _forward[grid](
            value,
            places,
            scores,
            *_pointers(frame, places),
            result,
            *_layout(value, shapes, places, frame),
            FUSED=frame is not None,
            **constants,
        )
    return result


def _differentiate(
    grad: Tensor,
    value: Tensor,
    shapes: list[Size],
    places: Tensor,
    scores: Tensor,
    frame: tuple[Tensor, Tensor] | None,
    *,
    with_value: bool,
    with_frame: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    exact = torch.promote_types(value.dtype, torch.float32)
    grad, value = grad.contiguous(), value.contiguous()
    places, scores = places.contiguous(), scores.contiguous()
    frame = _pairs_together(frame)
    launched = grad.numel() and places.numel()
    # The kernel adds to the gradient of value, and writes every element of the others.
    like = torch.empty_like if launched else torch.zeros_like
    of_value = torch.zeros_like(value, dtype=exact) if with_value else None
    of_places, of_scores = like(places), like(scores)
    of_locations = like(places, dtype=exact) if with_frame else None
    if launched:
        # Atomic additions are what a backward waits for: a thread adds 16 bytes of them at once.
        grid, constants = _plan(value, places, exact.itemsize)
        with torch.cuda.device_of(value):
            _backward[grid](
                grad,
                value,
                places,
                scores,
                *_pointers(frame, places),
                value if of_value is None else of_value,
                of_places,
                of_scores,
                places if of_locations is None else of_locations,
                *_layout(value, shapes, places, frame),
                FUSED=frame is not None,
                SCATTER=with_value,
                FRAME=with_frame,
                **constants,
            )
    return (
        None if of_value is None else of_value.to(value.dtype),
        of_places,
        of_scores,
        of_locations,
    )


def _pairs_together(frame: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """``frame`` with x beside y in memory, as the kernels read them; other strides may be any."""
    if frame is None:
        return None
    centers, scales = (t if t.stride(-1) == 1 else _copied_once(t) for t in frame)
    return centers, scales


def _copied_once(tensor: Tensor) -> Tensor:
    """A contiguous copy, but of what is repeated along all but the last dimension, a single one."""
    once = [slice(1) if stride == 0 else slice(None) for stride in tensor.stride()[:-1]]
    return tensor[tuple(once)].contiguous().expand(tensor.shape)


def _pointers(frame: tuple[Tensor, Tensor] | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if frame is None else frame


def _plan(
    value: Tensor, places: Tensor, bytes_each: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid, and constants such that each thread holds 16 bytes of channels of one query."""
    batch, queries, heads, levels, points, _ = places.shape
    channels = value.shape[-1]
    block_d = triton.next_power_of_2(channels)
    block_q = max(1, WARPS * 32 * 16 // bytes_each // block_d)
    constants = {
        "HEADS": heads,
        "CHANNELS": channels,
        "LEVELS": levels,
        "POINTS": points,
        "ACC": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
        # As wide as the channels where it can be: tiles of one shape need no exchange of threads.
        "BLOCK_W": max(block_d, triton.next_power_of_2(levels * points)),
        "num_warps": WARPS,
    }
    return (triton.cdiv(queries, block_q), heads, batch), constants


def _layout(
    value: Tensor,
    shapes: list[Size],
    places: Tensor,
    frame: tuple[Tensor, Tensor] | None,
) -> tuple[Any, ...]:
    """Sizes of levels, numbers of tokens and queries, strides of the frame."""
    tokens, queries = value.shape[1], places.shape[1]
    if max(value[:1].numel(), places[:1].numel()) >= 2**31:
        raise ValueError("one image has more than 2**31 values or locations: split the queries")
    # As floats: for an integer, Triton would compile anew when it is 1 or a multiple of 16, and a
    # tensor would have to be copied to the device. Exact up to 2**24.
    sizes = tuple(float(side) for shape in shapes for side in shape)
    strides = (0,) * 6 if frame is None else tuple(n for t in frame for n in t.stride()[:3])
    return sizes, tokens, queries, *strides
