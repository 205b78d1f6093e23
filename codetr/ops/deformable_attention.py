"""Multi-scale deformable attention: one function, computed by plain PyTorch or by Triton kernels.

Both implementations are operators of ``torch.library``: torch.compile and torch.export see one node
with a known shape. Each decides when it runs who computes it, and obeys the switch.
"""

# ruff: noqa: ARG001, PLR0917 - an operator and its fake have one signature, of many tensors

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from codetr.ops import definition
from codetr.ops.switch import VARIABLE, uses_triton
from codetr.structures import Size


def deformable_attention(
    value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of ``value`` (Deformable DETR, equation 3).

    Samples outside a map read zeros, as beyond an edge padded with zeros; a location of (0, 0) is
    the outer corner of the first cell and (1, 1) that of the last. An infinite location is outside.
    A location that is NaN makes the result of its query and head NaN, so that a loss shows it; the
    gradient of ``value`` gets nothing from it.

    Autocast changes no type here: what comes in bf16 is read, and goes out, in bf16. Gradients are
    of first order. On a GPU the gradient of ``value`` is added up in no fixed order, unless
    ``torch.use_deterministic_algorithms(True)``.

    Args:
        value: (B, T, H, D), the maps of all levels flattened and laid end to end; H heads.
        shapes: (height, width) in cells of each of the levels; their areas add up to T.
        locations: (B, Q, H, levels, P, 2), (x, y) in fractions of each map.
        weights: (B, Q, H, levels, P), which sum to one over levels and points.

    Returns:
        (B, Q, H * D) of ``value``'s dtype; sampled and added up in float32 at least.

    Raises:
        ValueError: the arguments' sizes contradict one another.
        RuntimeError: a kernel fails; the message names the switch to plain PyTorch.
    """
    _check(value, shapes, locations, weights)
    return _attention(value, _flat(shapes), locations, weights)


def deformable_attention_fused(
    value: Tensor,
    shapes: list[Size],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """:func:`deformable_attention` at ``centers + offsets * scales``, weighted by softmax.

    The kernels compute locations and softmax on their way and store neither; plain PyTorch computes
    them first, in float32 at least.

    Args:
        value: (B, T, H, D), as of :func:`deformable_attention`, like ``shapes``.
        centers: (B, Q, levels, 2), (x, y) in fractions of each map.
        scales: (B, Q, levels, 2), or broadcastable to it: what an offset of one moves.
        offsets: (B, Q, H, levels, P, 2).
        logits: (B, Q, H, levels, P), of a softmax over levels and points jointly.

    Returns, raises:
        As :func:`deformable_attention`.
    """
    _check(value, shapes, offsets, logits)
    batch, queries, _, levels, _, _ = offsets.shape
    if centers.shape != (batch, queries, levels, 2):
        raise ValueError(
            f"centers {tuple(centers.shape)} do not fit offsets {tuple(offsets.shape)}"
        )
    if uses_triton(value.device):
        return _fused(value, _flat(shapes), centers, scales.expand(centers.shape), offsets, logits)
    locations, weights = _samples(value, centers, scales, offsets, logits)
    return _attention(value, _flat(shapes), locations, weights)


def _samples(
    value: Tensor, centers: Tensor, scales: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations and weights of :func:`deformable_attention`, in float32 at least."""
    exact = torch.promote_types(value.dtype, torch.float32)
    weights = logits.flatten(3).softmax(-1, dtype=exact).unflatten(3, logits.shape[3:])
    return _locations(centers, scales, offsets, exact), weights


def _locations(centers: Tensor, scales: Tensor, offsets: Tensor, exact: torch.dtype) -> Tensor:
    """(B, Q, H, levels, P, 2): centers + offsets * scales."""
    levels, points, _ = offsets.shape[3:]

    def wide(frame: Tensor) -> Tensor:
        """(..., 1, levels * P * 2): rows as long as those of the offsets broadcast faster."""
        frame = frame.to(exact).expand(*frame.shape[:-2], levels, 2)
        return frame[..., None, :].expand(*frame.shape[:-1], points, 2).flatten(-3).unsqueeze(-2)

    flat = torch.addcmul(wide(centers), offsets.to(exact).flatten(3), wide(scales))
    return flat.unflatten(3, (levels, points, 2))


def _check(value: Tensor, shapes: list[Size], places: Tensor, scores: Tensor) -> None:
    """The kernels trust what they are given: an index out of bounds would be read."""
    tokens = sum(height * width for height, width in shapes)
    if value.dim() != 4 or value.shape[1] != tokens:
        raise ValueError(
            f"value {tuple(value.shape)} is no (B, T, H, D) with T = {tokens}, the cells of the "
            f"maps {shapes}"
        )
    batch, _, heads, _ = value.shape
    if places.dim() != 6 or (places.shape[0], *places.shape[2:4], places.shape[5]) != (
        batch,
        heads,
        len(shapes),
        2,
    ):
        raise ValueError(
            f"locations or offsets {tuple(places.shape)} are no (B, Q, H, levels, P, 2) for value "
            f"{tuple(value.shape)} and {len(shapes)} levels"
        )
    if scores.shape != places.shape[:-1]:
        raise ValueError(
            f"weights or logits {tuple(scores.shape)} are not one for each of locations or offsets "
            f"{tuple(places.shape)}"
        )


def _flat(shapes: list[Size]) -> list[int]:
    return [side for shape in shapes for side in shape]


def _pairs(sizes: list[int]) -> list[Size]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@contextmanager
def _named() -> Iterator[Any]:
    """The kernels; what fails in them names the switch."""
    try:
        from codetr.ops import triton_kernels

        yield triton_kernels
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel of deformable attention failed ({type(error).__name__}: {error}); "
            f"{VARIABLE}=reference computes it in plain PyTorch, several times slower"
        ) from error


# The operators ------------------------------------------------------------------------------------


@torch.library.custom_op("codetr::deformable_attention", mutates_args=())
def _attention(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    if not uses_triton(value.device):
        return definition.attend(value, _pairs(sizes), locations, weights)
    with _named() as kernels:
        return kernels.forward(value, _pairs(sizes), locations, weights)


@torch.library.custom_op("codetr::deformable_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    locations: Tensor,
    weights: Tensor,
    with_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, empty unless with_value, of locations and of weights."""
    inputs = (grad, value, _pairs(sizes), locations, weights)
    if not uses_triton(value.device):
        of_value, of_locations, of_weights = definition.gradients(*inputs, with_value=with_value)
    else:
        deterministic = torch.are_deterministic_algorithms_enabled()
        with _named() as kernels:
            of_value, of_locations, of_weights = kernels.backward(
                *inputs, with_value=with_value and not deterministic
            )
        if with_value and deterministic:
            of_value = definition.gradient_of_value(*inputs)
    return value.new_empty(0) if of_value is None else of_value, of_locations, of_weights


@torch.library.custom_op("codetr::deformable_attention_fused", mutates_args=())
def _fused(
    value: Tensor,
    sizes: list[int],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    shapes = _pairs(sizes)
    if not uses_triton(value.device):  # a program that was traced where they are
        locations, weights = _samples(value, centers, scales, offsets, logits)
        return definition.attend(value, shapes, locations, weights)
    with _named() as kernels:
        return kernels.fused_forward(value, shapes, centers, scales, offsets, logits)


@torch.library.custom_op("codetr::deformable_attention_fused_backward", mutates_args=())
def _fused_backward(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
    with_value: bool,
    with_frame: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, centers, scales, offsets and logits.

    That of value is empty unless with_value, those of centers and scales unless with_frame.
    """
    inputs = (grad, value, _pairs(sizes), centers, scales, offsets, logits)
    if not uses_triton(value.device):
        of_value, of_offsets, of_logits, of_locations = _fused_gradients(*inputs, with_value)
    else:
        deterministic = torch.are_deterministic_algorithms_enabled()
        with _named() as kernels:
            of_value, of_offsets, of_logits, of_locations = kernels.fused_backward(
                *inputs, with_value=with_value and not deterministic, with_frame=with_frame
            )
        if with_value and deterministic:
            samples = _samples(value, centers, scales, offsets, logits)
            of_value = definition.gradient_of_value(grad, value, _pairs(sizes), *samples)
    if of_value is None:
        of_value = value.new_empty(0)
    if with_frame:
        of_centers = of_locations.sum((2, 4)).to(centers.dtype)
        of_scales = (of_locations * offsets).sum((2, 4)).to(scales.dtype)
    else:
        of_centers, of_scales = centers.new_empty(0), scales.new_empty(0)
    return of_value, of_centers, of_scales, of_offsets, of_logits


def _fused_gradients(
    grad: Tensor,
    value: Tensor,
    shapes: list[Size],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
    with_value: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """As of the kernels: gradients of value, offsets, logits and locations, in plain PyTorch."""
    locations, weights = _samples(value, centers, scales, offsets, logits)
    of_value, of_locations, of_weights = definition.gradients(
        grad, value, shapes, locations, weights, with_value=with_value
    )
    of_offsets = of_locations * scales[:, :, None, :, None]
    mean = (weights * of_weights).sum((3, 4), keepdim=True)
    of_logits = weights * (of_weights - mean)
    return of_value, of_offsets.to(offsets.dtype), of_logits.to(logits.dtype), of_locations


# What tracing, autograd and autocast need to know of them -----------------------------------------


def _fake_forward(value: Tensor, sizes: list[int], *others: Tensor) -> Tensor:
    """Locations or offsets are the last but one."""
    queries = others[-2].shape[1]
    return value.new_empty(value.shape[0], queries, value.shape[2] * value.shape[3])


_attention.register_fake(_fake_forward)
_fused.register_fake(_fake_forward)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    locations: Tensor,
    weights: Tensor,
    with_value: bool,
) -> tuple[Tensor, ...]:
    return (_gradient(value, with_value), _gradient(locations), _gradient(weights))


@_fused_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    centers: Tensor,
    scales: Tensor,
    offsets: Tensor,
    logits: Tensor,
    with_value: bool,
    with_frame: bool,
) -> tuple[Tensor, ...]:
    frame = [_gradient(tensor, with_frame) for tensor in (centers, scales)]
    return (_gradient(value, with_value), *frame, _gradient(offsets), _gradient(logits))


def _gradient(tensor: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return tensor.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, *others = inputs
    ctx.save_for_backward(value, *others)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    with_value = ctx.needs_input_grad[0]
    of_value, of_locations, of_weights = _attention_backward(
        grad, value, ctx.sizes, locations, weights, with_value
    )
    return of_value if with_value else None, None, of_locations, of_weights


def _differentiate_fused(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    with_value, with_frame = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:4])
    of_value, *of_frame, of_offsets, of_logits = _fused_backward(
        grad, value, ctx.sizes, *others, with_value, with_frame
    )
    if not with_frame:
        of_frame = [None, None]
    return of_value if with_value else None, None, *of_frame, of_offsets, of_logits


_attention.register_autograd(_differentiate, setup_context=_keep)
_fused.register_autograd(_differentiate_fused, setup_context=_keep)
