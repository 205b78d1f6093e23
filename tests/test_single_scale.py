"""Single-scale detectors: dense encoder, conditional attention, the heads' pyramid of one map."""

from __future__ import annotations

import pytest
import torch
from test_detector import images, objects
from tiny_training import tiny_detector
from torch import nn
from torch.nn import functional

from codetr.backbones import SingleScaleAdapter
from codetr.config import TransformerConfig
from codetr.detector import CoDETR
from codetr.structures import Memory
from codetr.transformer.conditional import ConditionalCrossAttention, ConditionalSelfAttention

SIZES = TransformerConfig(embed_dim=16, attention_heads=2, group_norm_groups=4)
STRIDES = (8, 16, 32, 64, 128)


@pytest.mark.parametrize("stride", STRIDES)
def test_one_map_becomes_a_pyramid(stride: int) -> None:
    """Of the strides' resolutions, made step by step from the map, which is in it unchanged."""
    torch.manual_seed(0)
    adapter = SingleScaleAdapter(stride, STRIDES, SIZES)
    own = torch.randn(2, 16, 3, 5)
    pyramid = adapter([own])
    index = STRIDES.index(stride)
    assert pyramid[index] is own
    for finer, level in enumerate(pyramid[:index]):
        factor = 2 ** (index - finer)
        assert level.shape == (2, 16, 3 * factor, 5 * factor)
    for number, level in enumerate(pyramid[index + 1 :], start=1):
        assert level.shape == (2, 16, -(-3 // 2**number), -(-5 // 2**number))
    assert len([*adapter.upwards, *adapter.downwards]) == len(STRIDES) - 1


def test_upwards_is_interpolation_and_convolution() -> None:
    torch.manual_seed(0)
    adapter = SingleScaleAdapter(16, (8, 16), SIZES)
    own = torch.randn(1, 16, 3, 5)
    convolution, norm = adapter.upwards[0]
    # Bilinear interpolation by two, written out: a quarter of a cell from the nearer one.
    padded = functional.pad(own, (1, 1, 1, 1), mode="replicate")
    upper = 0.25 * padded[:, :, :-2] + 0.75 * padded[:, :, 1:-1]
    lower = 0.75 * padded[:, :, 1:-1] + 0.25 * padded[:, :, 2:]
    tall = torch.stack((upper, lower), dim=3).flatten(2, 3)
    left = 0.25 * tall[..., :-2] + 0.75 * tall[..., 1:-1]
    right = 0.75 * tall[..., 1:-1] + 0.25 * tall[..., 2:]
    finer = torch.stack((left, right), dim=4).flatten(3, 4)
    torch.testing.assert_close(adapter([own])[0], norm(convolution(finer)))


@pytest.mark.parametrize("kind", ["conditional", "dab"])
def test_heads_read_strides_8_to_128(kind: str) -> None:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", kind=kind))
    memory = model.encode(images([(100, 130), (64, 64)]))
    assert memory.shapes == [(4, 5)]
    shapes = [tuple(level.shape[-2:]) for level in model.memory_pyramid(memory)]
    assert shapes == [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]


def test_heads_read_the_same_strides_of_a_dilated_map() -> None:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", kind="dab-dc5"))
    memory = model.encode(images([(100, 130), (64, 64)]))
    assert memory.shapes == [(7, 9)]  # of stride 16
    shapes = [tuple(level.shape[-2:]) for level in model.memory_pyramid(memory)]
    assert shapes == [(14, 18), (7, 9), (4, 5), (2, 3), (1, 2)]


def test_each_place_asks_with_each_pattern() -> None:
    """All places with the first, then all with the second: as DAB-DETR's own code has them."""
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(kind="dab-dc5"))
    group = model.queries(model.encode(images([(64, 64), (64, 48)]))).group
    queries = model.config.queries
    assert group.content.shape == (2, queries.total, 32) == (2, 12, 32)
    for number in range(queries.total):
        pattern, place = divmod(number, queries.count)
        assert torch.equal(group.content[1, number], model.queries.patterns.weight[pattern])
        assert torch.equal(
            group.reference[1, number], model.queries.anchors.weight[place].sigmoid()
        )


def test_anchors_beyond_the_image_are_no_candidates() -> None:
    """The finest map of an image of 100 x 130 has 16 x 20 cells, of which 13 x 17 have their
    centre in it."""
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", kind="conditional"))
    batch = images([(100, 130)])
    pyramid = model.memory_pyramid(model.encode(batch))
    anchors = model.heads[0].predict(pyramid).anchors
    valid = anchors.valid(batch.sizes)[0, : anchors.counts[0]].view(16, 20)
    assert valid[:13, :17].all()
    assert valid.sum() == 13 * 17


def test_self_attention_is_torchs_where_projections_agree() -> None:
    """With equal projections of content and position it is attention of their sum, masked alike."""
    torch.manual_seed(0)
    ours, theirs = ConditionalSelfAttention(16, 2), nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        for number, name in enumerate(("query", "key")):
            rows = slice(16 * number, 16 * number + 16)
            content, position = getattr(ours, f"{name}_content"), getattr(ours, f"{name}_position")
            for layer in (content, position):
                layer.weight.copy_(theirs.in_proj_weight[rows])
                layer.bias.zero_()
        ours.value.weight.copy_(theirs.in_proj_weight[32:])
        ours.value.bias.zero_()
        ours.output.load_state_dict(theirs.out_proj.state_dict())
    content, position = torch.randn(2, 3, 5, 16)
    for blocked in (None, torch.rand(5, 5) > 0.7, torch.rand(6, 5, 5) > 0.7):
        if blocked is not None:
            blocked[..., torch.arange(5), torch.arange(5)] = False
        query = content + position
        expected, _ = theirs(query, query, content, attn_mask=blocked, need_weights=False)
        torch.testing.assert_close(ours(content, position, blocked), expected)


@pytest.mark.parametrize("first", [True, False])
def test_cross_attention_by_its_definition(first: bool) -> None:
    """Head by head: content . content + place . place, scaled by the width of both, softmax over
    what is no padding (Conditional DETR, equation 2)."""
    torch.manual_seed(0)
    layer = ConditionalCrossAttention(16, 2, first=first).double()
    content, position, place = torch.randn(3, 2, 4, 16, dtype=torch.double)
    tokens, where = torch.randn(2, 2, 6, 16, dtype=torch.double)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    memory = Memory(tokens, [(2, 3)], padding, torch.ones(2, 1, 2), where)
    query, key = layer.query_content(content), layer.key_content(tokens)
    key_place = layer.key_position(where)
    if first:
        query, key = query + layer.query_position(position), key + key_place
    query_place, value = layer.query_place(place), layer.value(tokens)
    found = []
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        scores = torch.einsum("bqc,btc->bqt", query[..., own], key[..., own])
        scores += torch.einsum("bqc,btc->bqt", query_place[..., own], key_place[..., own])
        scores = (scores / 16**0.5).masked_fill(padding[:, None], -torch.inf)
        found.append(scores.softmax(-1) @ value[..., own])
    expected = layer.output(torch.cat(found, dim=-1))
    torch.testing.assert_close(layer(content, position, place, memory), expected)


@pytest.mark.parametrize("kind", ["conditional", "dab"])
def test_one_decoder_layer_leaves_no_parameter_without_gradient(kind: str) -> None:
    """The first layer transforms no place: what would do so is not there."""
    model = CoDETR(tiny_detector(kind=kind, transformer={"decoder_layers": 1})).train()
    model(images([(64, 96)]), [objects(2, (64, 96))]).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["conditional", "dab"])
def test_recomputed_encoder_layers_change_nothing(kind: str) -> None:
    results = []
    for recompute in (False, True):
        config = tiny_detector(kind=kind, transformer={"checkpoint_encoder": recompute})
        torch.manual_seed(0)
        model = CoDETR(config).train()
        model(images([(64, 96)]), [objects(2, (64, 96))]).total.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)
