"""Further groups of queries: what they are made of, what they are matched with, what they weigh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_detector import images, objects
from tiny_training import tiny_detector
from torch import Tensor

from codetr.config import BoxLossConfig, DetectorConfig
from codetr.criterion import box_losses, group_losses, match, match_parts
from codetr.detector import CoDETR
from codetr.queries import TwoStageQueries
from codetr.structures import GroupPrediction, QueryGroup, Targets
from codetr.transformer.decoder import attention_mask

SIZES = [(64, 96), (48, 64)]
COST = BoxLossConfig()


def some_prediction(queries: int, seed: int) -> GroupPrediction:
    draw = torch.Generator().manual_seed(seed)
    boxes = 0.2 + 0.4 * torch.rand(2, 2, queries, 4, generator=draw)
    return GroupPrediction(torch.randn(2, 2, queries, 3, generator=draw), boxes)


def some_targets(counts: tuple[int, int], seed: int = 0) -> list[Targets]:
    return [objects(n, s, seed + i) for i, (n, s) in enumerate(zip(counts, SIZES, strict=True))]


def part_of(prediction: GroupPrediction, part: int, size: int) -> GroupPrediction:
    own = slice(part * size, (part + 1) * size)
    return GroupPrediction(prediction.logits[:, :, own], prediction.boxes[:, :, own])


def group_of(prediction: GroupPrediction, **settings: int) -> QueryGroup:
    """A group of as many queries; the criterion reads nothing of it but its settings."""
    nothing = torch.zeros(2, prediction.logits.shape[2], 4)
    return QueryGroup("one_to_many", nothing, None, nothing, **settings)  # type: ignore[arg-type]


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(0, 99)
)
def test_each_part_is_matched_on_its_own(
    parts: int, size: int, first: int, second: int, seed: int
) -> None:
    """As if it were the only one, for every layer and image."""
    prediction, targets = some_prediction(parts * size, seed), some_targets((first, second), seed)
    together = match_parts(prediction, targets, SIZES, COST, parts=parts)
    for part in range(parts):
        own = slice(part * size, (part + 1) * size)
        alone = match(part_of(prediction, part, size), targets, SIZES, COST)
        for layer, of_layer in zip(together, alone, strict=True):
            assert torch.equal(layer.labels[:, own], of_layer.labels)
            assert torch.equal(layer.boxes[:, own], of_layer.boxes)


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))
def test_each_object_is_found_as_often_as_it_is_repeated(
    repeat: int, first: int, second: int, seed: int
) -> None:
    """By different queries, where there are enough of them; the cheapest assignment of all."""
    targets = some_targets((first, second), seed)
    for found in match_parts(some_prediction(16, seed), targets, SIZES, COST, repeat=repeat):
        for image, of_image in enumerate(targets):
            wanted = sorted(of_image.labels.tolist() * repeat)
            assert sorted(found.labels[image][found.labels[image] < 3].tolist()) == wanted
            distinct = {tuple(box) for box in found.boxes[image].tolist() if any(box)}
            assert len(distinct) == len(of_image)


def test_a_few_queries_share_many_objects() -> None:
    (found, _) = match_parts(some_prediction(4, 0), some_targets((3, 0)), SIZES, COST, repeat=6)
    assert (found.labels[0] < 3).all()
    assert (found.labels[1] == 3).all()


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_equal_groups_weigh_as_often_as_they_are(groups: int, counts: tuple[int, int]) -> None:
    """G equal groups give G times the loss of a single one, in the total of the detector."""
    config = tiny_detector(kind="grouped").model_dump()

    def weighted(number: int) -> Tensor:
        one = some_prediction(12, 7)
        repeated = GroupPrediction(*(rows.repeat(1, 1, number, 1) for rows in vars(one).values()))
        config["one_to_many"]["groups"] = number
        detector = DetectorConfig.model_validate(config)
        group = group_of(repeated, parts=number)
        losses = group_losses(group, repeated, some_targets(counts), SIZES, detector)
        weights = detector.loss_weights()
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    torch.testing.assert_close(weighted(groups), groups * weighted(1))


def test_groups_of_which_the_loss_is_the_mean() -> None:
    """Group-DETR: query and groups weigh one part of eleven; heads and their positives all."""
    config = tiny_detector("atss", kind="grouped").model_dump()
    config["one_to_many"] |= {"groups": 10}
    summed = DetectorConfig.model_validate(config).loss_weights()
    config["one_to_many"]["average"] = True
    averaged = DetectorConfig.model_validate(config).loss_weights()
    for name, weight in summed.items():
        shared = name.startswith(("query/", "one_to_many/"))
        assert averaged[name] == pytest.approx(weight / 11 if shared else weight), name


def test_different_groups_weigh_as_much_as_each_alone() -> None:
    """The loss is the mean of what each part's would be."""
    prediction, targets = some_prediction(18, 3), some_targets((3, 1))
    config = tiny_detector()
    together = match_parts(prediction, targets, SIZES, COST, parts=3)
    losses = box_losses(prediction, together, SIZES, config, parts=3)
    alone = []
    for part in range(3):
        own = part_of(prediction, part, 6)
        alone.append(box_losses(own, match(own, targets, SIZES, COST), SIZES, config))
    for term, value in losses.items():
        torch.testing.assert_close(value, torch.stack([a[term] for a in alone]).mean(0))


def groups_of(config: DetectorConfig) -> tuple[CoDETR, list[QueryGroup]]:
    """A detector, and the groups that its decoder is given in training."""
    torch.manual_seed(0)
    model = CoDETR(config).train()
    seen: list[QueryGroup] = []
    model.decoder.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    model(images(SIZES), some_targets((3, 1)))
    return model, seen


@pytest.mark.parametrize("kind", ["hybrid", "grouped", "grouped conditional"])
def test_groups_do_not_see_one_another(kind: str) -> None:
    """Nor anything else: against a loop over all pairs of queries."""
    _, groups = groups_of(tiny_detector("atss", kind=kind))
    owners = [
        (group.name, number // (group.count // group.parts))
        for group in groups
        for number in range(group.count)
    ]
    blocked = attention_mask(groups, heads=4)
    assert blocked is not None
    visible = torch.tensor([[one == other for other in owners] for one in owners])
    assert torch.equal(~blocked, visible)
    assert "one_to_many" in {name for name, _ in owners}


@pytest.mark.parametrize("kind", ["hybrid", "grouped", "grouped conditional"])
def test_further_groups_change_no_other_loss(kind: str) -> None:
    config = tiny_detector("atss", kind=kind)
    without = config.model_copy(
        update={"one_to_many": config.one_to_many.model_copy(update={"groups": 0})}
    )
    losses, others = (
        (torch.manual_seed(0), CoDETR(c).train()(images(SIZES), some_targets((3, 1))).losses)[1]
        for c in (config, without)
    )
    assert all(name.startswith("one_to_many/") for name in losses.keys() - others.keys())
    assert losses.keys() > others.keys()
    for name, value in others.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def two_stage(tokens: str, groups: int, queries: int) -> tuple[CoDETR, list[QueryGroup], Tensor]:
    many = {"tokens": tokens, "groups": groups, "queries": queries}
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(kind="hybrid", one_to_many=many)).train()
    for parameter in (*model.queries.classify.parameters(), *model.queries.regress.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)  # no two tokens rank alike
    memory = model.encode(images(SIZES))
    selection = model.queries(memory)
    group = model.one_to_many(model.queries, selection, memory)
    _, box_logits = model.queries._propose(memory)
    assert selection.ranking is not None
    ranked = selection.ranking.sort(dim=1, descending=True).indices
    boxes = box_logits.sigmoid().gather(1, ranked[..., None].expand(-1, -1, 4))
    return model, [selection.group, group], boxes


def test_hybrid_queries_start_at_the_next_tokens() -> None:
    _, (one, many), boxes = two_stage("next", 1, 20)
    torch.testing.assert_close(torch.cat((one.reference, many.reference), dim=1), boxes[:, :32])


def test_several_groups_take_turns_at_the_next_tokens() -> None:
    """So that each starts as well as the others."""
    _, (_, many), boxes = two_stage("next", 2, 10)
    assert many.parts == 2
    torch.testing.assert_close(many.reference[:, :10], boxes[:, 12:32:2])
    torch.testing.assert_close(many.reference[:, 10:], boxes[:, 13:32:2])


def test_groups_of_the_same_tokens_differ_in_content() -> None:
    model, (one, many), boxes = two_stage("same", 2, 12)
    torch.testing.assert_close(many.reference, boxes[:, :12].repeat(1, 2, 1))
    torch.testing.assert_close(many.position, one.position.repeat(1, 2, 1))  # type: ignore[union-attr]
    content = torch.cat((one.content, many.content), dim=1)[0]
    assert len(content.unique(dim=0)) == 36
    assert torch.equal(many.content[0], model.one_to_many.content.weight)


@pytest.mark.parametrize(("tokens", "each"), [("next", 36), ("same", 12)])
def test_fewer_tokens_than_queries(tokens: str, each: int) -> None:
    """126 tokens - 12 of the one-to-one queries, or 12, in 3 equal groups."""
    model, (_, many), _ = two_stage(tokens, 3, 50 if tokens == "next" else 12)
    assert sum(h * w for h, w in model.encode(images(SIZES)).shapes) == 126
    assert many.count == (3 * 38 if tokens == "next" else 36)
    assert many.count // many.parts == (38 if tokens == "next" else each)
    wide = model.one_to_many.content.weight.unflatten(0, (3, -1))[:, : many.count // 3]
    assert torch.equal(many.content[0], wide.flatten(0, 1))


def test_no_token_is_left_for_further_queries() -> None:
    """All parameters still get a gradient."""
    model = CoDETR(tiny_detector(kind="hybrid", queries={"count": 126})).train()
    output = model(images(SIZES), some_targets((3, 1)))
    output.total.backward()
    assert output.total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_stage_groups_share_the_layer_that_makes_points() -> None:
    model, groups = groups_of(tiny_detector(kind="grouped conditional"))
    many = groups[1]
    points = model.queries.reference_points(model.one_to_many.position.weight).sigmoid()
    torch.testing.assert_close(many.reference[0, :, :2], points)
    assert many.points
    assert not [name for name, _ in model.one_to_many.named_parameters() if "reference" in name]


def test_nothing_is_learned_where_contents_are_selected() -> None:
    config = tiny_detector(kind="hybrid", queries={"mixed_selection": False})
    model, groups = groups_of(config)
    assert [*model.one_to_many.parameters()] == []
    assert isinstance(model.queries, TwoStageQueries)
    assert len(groups[1].content[0].unique(dim=0)) == groups[1].count


def test_matching_repeated_objects_changes_no_target() -> None:
    targets = some_targets((2, 1))
    before = [replace(t) for t in targets]
    match_parts(some_prediction(8, 0), targets, SIZES, COST, repeat=3)
    assert [len(t) for t in targets] == [len(t) for t in before] == [2, 1]
