"""Where the decoder looks, heard without touching it."""

from __future__ import annotations

import pytest
import torch
from analysis_samples import model, random_memory
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_batch
from torch import nn

from codetr.analysis.attention import (
    CrossAttention,
    attention_maps,
    dense_attention,
    sampling,
    splat,
)
from codetr.ops import deformable_attention
from codetr.structures import Memory
from codetr.transformer.attention import DeformableAttention, SamplingFrame
from codetr.transformer.conditional import ConditionalCrossAttention

SHAPES = [(4, 5), (2, 3)]
TOKENS = 26


def samples(low: float, high: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, three queries, two heads, two points on each level."""
    generator = torch.Generator().manual_seed(seed)
    locations = low + (high - low) * torch.rand(2, 3, 2, 2, 2, 2, generator=generator)
    weights = torch.rand(2, 3, 2, 4, generator=generator).softmax(-1).unflatten(-1, (2, 2))
    return locations, weights


@given(st.integers(0, 999))
def test_splat_is_the_adjoint_of_sampling(seed: int) -> None:
    """What a cell is given is the derivative of all that was read by the cell's value."""
    locations, weights = samples(-0.4, 1.4, seed)
    value = torch.zeros(2, TOKENS, 2, 1, requires_grad=True)
    deformable_attention(value, SHAPES, locations, weights).sum().backward()
    wanted = value.grad.sum((2, 3)) / (3 * 2)  # of all heads; the mean over queries and heads
    torch.testing.assert_close(splat(locations, weights, SHAPES), wanted)


@given(st.integers(0, 999))
def test_splatted_attention_sums_to_one(seed: int) -> None:
    locations, weights = samples(0.25, 0.75, seed)  # no sample within half a cell of a border
    found = splat(locations, weights, SHAPES)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    memory = random_memory(SHAPES, [SHAPES, SHAPES])
    for map_, outside in attention_maps(found, memory, [(16, 20), (17, 19)]):
        torch.testing.assert_close(map_.sum(), torch.tensor(1.0))
        assert abs(outside) < 1e-6


def test_what_falls_beyond_the_image_is_counted() -> None:
    locations, weights = samples(0.25, 0.75)
    locations[0, 0, 0, 0, 0] = torch.tensor([3.0, 0.5])
    found = splat(locations, weights, SHAPES)
    lost = float(weights[0, 0, 0, 0, 0]) / 6
    memory = random_memory(SHAPES, [SHAPES, SHAPES])
    (first, outside), (_, nothing) = attention_maps(found, memory, [(8, 10), (8, 10)])
    assert abs(outside - lost) < 1e-6
    assert abs(nothing) < 1e-6
    torch.testing.assert_close(first.sum(), torch.tensor(1.0))


def test_a_cell_keeps_its_share_of_the_image() -> None:
    """Each level by itself: a coarse cell's attention is spread over more pixels."""
    memory = random_memory(SHAPES, [SHAPES])
    attention = torch.zeros(1, TOKENS)
    attention[0, :20] = 0.75 / 20
    attention[0, 20:] = 0.25 / 6
    ((map_, _),) = attention_maps(attention, memory, [(8, 10)])
    torch.testing.assert_close(map_, torch.full((8, 10), 1 / 80))


def test_samples_are_those_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, heads=2, levels=2, points=2)
    nn.init.normal_(layer.sampling_offsets.weight)
    nn.init.normal_(layer.attention_weights.weight)
    memory = random_memory(SHAPES, [SHAPES, [(3, 5), (2, 3)]], channels=8)
    query, boxes = torch.randn(2, 3, 8), torch.rand(2, 3, 4)
    frame = SamplingFrame.of_boxes(boxes, None, memory, 2)
    locations, weights = sampling(layer, query, frame)
    value = layer.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
    read = deformable_attention(value.unflatten(-1, (2, 4)), SHAPES, locations, weights)
    torch.testing.assert_close(layer.output_proj(read), layer(query, frame, memory))


@pytest.mark.parametrize("first", [True, False])
def test_dense_attention_is_that_of_the_layer(first: bool) -> None:
    """With the tokens' numbers, one-hot, for values, the layer gives its weights."""
    torch.manual_seed(0)
    layer = ConditionalCrossAttention(8, 2, first=first)
    memory = random_memory([(4, 6)], [[(4, 6)], [(3, 5)]], channels=8)
    memory.position = torch.randn(2, 24, 8)
    queries = [3 * torch.randn(2, 5, 8) for _ in range(3)]
    found = dense_attention(layer, *queries, memory)
    numbers = torch.eye(24).repeat(1, 2).expand(2, -1, -1)  # each of two heads reads all of them
    layer.value.register_forward_hook(lambda *_: numbers)
    layer.output = nn.Identity()
    wanted = layer(*queries, memory).unflatten(-1, (2, 24)).mean((1, 2))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert (found[memory.padding] == 0).all()


def test_listening_changes_nothing_and_ends() -> None:
    detector = model()
    batch, _ = tiny_batch([1, 2], [1, 1])
    with torch.no_grad():
        memory = detector.encode(batch)
        group = detector.queries(memory).group
        silent = detector.decoder([group], memory)["query"]
        with CrossAttention(detector.decoder) as attention:
            heard = detector.decoder([group], memory)["query"]
        assert torch.equal(silent.logits, heard.logits)
        assert torch.equal(silent.boxes, heard.boxes)
        assert [tuple(layer.shape) for layer in attention.layers] == [(2, 84), (2, 84)]
        detector.decoder([group], memory)
    assert len(attention.layers) == 2
    assert (attention.mean().sum(1) <= 1 + 1e-5).all()
    assert not any(layer.cross_attention._forward_pre_hooks for layer in detector.decoder.layers)


def test_padding_is_given_nothing() -> None:
    detector = model()
    memory = random_memory([(8, 8), (4, 4), (2, 2)], [[(4, 8), (2, 4), (1, 2)]], channels=32)
    source = Memory(memory.tokens, memory.shapes, memory.padding, memory.valid_ratios)
    with torch.no_grad(), CrossAttention(detector.decoder) as attention:
        detector.decoder([detector.queries(source).group], source)
    assert (attention.mean()[memory.padding] == 0).all()
