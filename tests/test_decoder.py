"""Query groups in one pass of the decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codetr.config import QueryConfig, TransformerConfig
from codetr.structures import Memory, QueryGroup
from codetr.transformer import Decoder
from codetr.transformer.decoder import attention_mask

SIZES = TransformerConfig(
    embed_dim=16,
    ffn_dim=32,
    attention_heads=2,
    sampling_points=2,
    decoder_layers=3,
    levels=2,
    group_norm_groups=4,
)


def memory() -> Memory:
    shapes = [(4, 5), (2, 3)]
    tokens = torch.randn(2, 26, 16)
    padding = torch.zeros(2, 26, dtype=torch.bool)
    return Memory(tokens, shapes, padding, torch.tensor([[[1.0, 1.0]] * 2, [[0.6, 0.75]] * 2]))


def group(name: str, count: int, **others: object) -> QueryGroup:
    reference = torch.rand(2, count, 4) * 0.5 + 0.2
    if others.get("points"):
        reference[..., 2:] = 0.5
    return QueryGroup(
        name, torch.randn(2, count, 16), torch.randn(2, count, 16), reference, **others
    )  # type: ignore[arg-type]


DINO = QueryConfig(count=5, dynamic_anchors=True, norm_states=True, logit_eps=1e-3)


def decoder(
    *, two_stage: bool = True, refine: bool = True, queries: QueryConfig | None = None
) -> Decoder:
    queries = queries or QueryConfig(count=5, two_stage=two_stage, box_refinement=refine)
    made = Decoder(SIZES, queries, num_classes=3)
    for parameter in made.parameters():  # no branch may start at zero, or it could not be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return made.double()


def as_double(value: QueryGroup | Memory) -> QueryGroup | Memory:
    for name, item in vars(value).items():
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            setattr(value, name, item.double())
    return value


@pytest.mark.parametrize("refine", [True, False])
def test_one_pass_is_a_pass_for_each_group(refine: bool) -> None:
    """The block mask isolates the groups, whatever their kinds of reference."""
    torch.manual_seed(0)
    groups = [group("query", 5, points=not refine), group("positive/a", 3), group("positive/b", 4)]
    groups[2].valid = torch.tensor([[True] * 4, [True, True, False, False]])
    groups = [as_double(g) for g in groups]  # type: ignore[misc]
    model, of_memory = decoder(two_stage=refine, refine=refine), as_double(memory())
    together = model(groups, of_memory)
    for one in groups:
        alone = model([one], of_memory)[one.name]
        torch.testing.assert_close(together[one.name].boxes, alone.boxes)
        torch.testing.assert_close(together[one.name].logits, alone.logits)


def test_dynamic_anchors_take_no_position_but_the_boxes() -> None:
    """DINO's decoder isolates groups as well, and ignores positions that a group brings along."""
    torch.manual_seed(0)
    groups = [as_double(group("query", 5)), as_double(group("positive/a", 3))]
    model, of_memory = decoder(queries=DINO), as_double(memory())
    together = model(groups, of_memory)
    for one in groups:
        alone = model([replace(one, position=None)], of_memory)[one.name]
        torch.testing.assert_close(together[one.name].boxes, alone.boxes)


def test_dino_reads_normed_states_and_refines_with_plain_ones() -> None:
    """Layer by layer from the definition (method.md 18, 22), for the first two layers."""
    torch.manual_seed(0)
    one, of_memory = as_double(group("query", 5)), as_double(memory())
    model = decoder(queries=DINO)
    states, frames = [], []

    def remember(_: object, inputs: tuple, output: torch.Tensor) -> None:
        states.append(output)
        frames.append(inputs[2])

    for layer in model.layers:
        layer.register_forward_hook(remember)
    prediction = model([one], of_memory)["query"]

    def logit(boxes: torch.Tensor) -> torch.Tensor:
        return (boxes.clamp(1e-3) / (1 - boxes).clamp(1e-3)).log()

    read = (logit(one.reference) + model.regress[0](model.norm(states[0])).float()).sigmoid()
    torch.testing.assert_close(prediction.boxes[0], read)
    refined = (logit(one.reference) + model.regress[0](states[0]).float()).sigmoid()
    centers = refined[:, :, None, :2] * of_memory.valid_ratios[:, None]
    torch.testing.assert_close(frames[1].centers, centers)
    second = (logit(refined) + model.regress[1](model.norm(states[1])).float()).sigmoid()
    torch.testing.assert_close(prediction.boxes[1], second)
    assert not torch.allclose(read, refined)


@pytest.mark.parametrize(("count", "parts"), [(6, 3), (4, 4), (0, 1), (5, 1)])
def test_parts_of_a_group_do_not_see_one_another(count: int, parts: int) -> None:
    """Against a loop over all pairs of queries."""
    groups = [group("query", 2), group("denoising", count, sees=("query",), parts=parts)]
    owners = [("query", 0)] * 2
    owners += [("denoising", i // (count // parts)) for i in range(count)]
    blocked = attention_mask(groups, heads=2)
    assert blocked is not None
    for i, one in enumerate(owners):
        for j, other in enumerate(owners):
            visible = one == other or (one[0], other[0]) == ("denoising", "query")
            assert blocked[i, j].item() is not visible


def test_a_lone_group_of_parts_needs_a_mask() -> None:
    blocked = attention_mask([group("denoising", 2, parts=2)], heads=2)
    assert blocked is not None
    assert blocked.tolist() == [[False, True], [True, False]]


def test_mask_of_groups_that_see_others() -> None:
    groups = [group("query", 2), group("denoising", 1, sees=("query",))]
    blocked = attention_mask(groups, heads=2)
    assert blocked is not None
    assert blocked.tolist() == [[False, False, True], [False, False, True], [False] * 3]


def test_nobody_sees_padding_but_itself() -> None:
    one = group("positive/a", 3, valid=torch.tensor([[True] * 3, [True, False, False]]))
    blocked = attention_mask([one], heads=2)
    assert blocked is not None
    assert blocked.shape == (4, 3, 3)
    assert not blocked[:2].any()
    expected = [[False, True, True], [False, False, True], [False, True, False]]
    assert blocked[2].tolist() == blocked[3].tolist() == expected


def test_a_lone_group_needs_no_mask() -> None:
    assert attention_mask([group("query", 4)], heads=2) is None


def test_look_forward_twice_only_adds_gradients() -> None:
    torch.manual_seed(0)
    of_memory, one = memory(), group("query", 5)
    results = {}
    for twice in (True, False):
        torch.manual_seed(1)
        model = Decoder(SIZES, QueryConfig(look_forward_twice=twice), num_classes=3)
        boxes = model([one], of_memory)["query"].boxes
        boxes[1].sum().backward()
        results[twice] = boxes.detach(), model.regress[0][-1].bias.grad  # type: ignore[index]
    torch.testing.assert_close(results[True][0], results[False][0])
    assert results[True][1].abs().sum() > 0
    assert results[False][1].abs().sum() == 0
