"""The detector as a whole, at tiny sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import FASTER_RCNN, KINDS, MASK_RCNN, tiny_detector
from torch import Tensor

from codetr.config import DenoisingConfig, DetectorConfig, OneToManyConfig
from codetr.detector import CoDETR, best_pairs
from codetr.sampling import draw_generator, sample_balanced
from codetr.structures import Detections, GroupPrediction, ImageBatch, LossOutput, Targets

HEAD_LISTS = [
    [],
    ["atss"],
    [FASTER_RCNN],
    ["retinanet"],
    ["fcos"],
    ["paa"],
    ["gfl"],
    [MASK_RCNN],
    ["atss", FASTER_RCNN],
    ["atss", "atss"],
    ["atss"] * 6,
    ["atss", FASTER_RCNN, "paa", "retinanet", "fcos", "gfl"],  # table 7
]
EVERY = [(kind, heads) for kind in ("one-stage", "two-stage", "dino") for heads in HEAD_LISTS]
EVERY += [
    (kind, heads)
    for kind in KINDS
    for heads in ([], ["atss"], ["atss", FASTER_RCNN])
    if (kind, heads) not in EVERY
]
"""Kinds of detector and lists of heads: each kind with K = 0, 1 and 2."""


def ids(value: str | list) -> str:
    heads = [value] if isinstance(value, str) else value
    return "+".join(head if isinstance(head, str) else head["type"] for head in heads) or "none"


def images(sizes: list[tuple[int, int]]) -> ImageBatch:
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(pixels, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(h * w))
    return ImageBatch(pixels, sizes)


def objects(count: int, size: tuple[int, int], image_id: int = 0) -> Targets:
    draw = torch.Generator().manual_seed(count + image_id)
    corner = torch.rand(count, 2, generator=draw) * 0.6
    boxes = torch.cat((corner, corner + 0.1 + 0.3 * torch.rand(count, 2, generator=draw)), 1)
    boxes = boxes * torch.tensor([size[1], size[0]] * 2)
    labels = torch.randint(3, (count,), generator=draw)
    masks = torch.rand(count, *size, generator=draw) < 0.5
    return Targets(boxes, labels, image_id, size, seed=image_id, masks=masks)


def train_losses(config: DetectorConfig, batch: ImageBatch, targets: list[Targets]) -> LossOutput:
    torch.manual_seed(0)
    model = CoDETR(config).train()
    torch.manual_seed(1)
    return model(batch, targets)


variants = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(("kind", "heads"), EVERY, ids=ids)
@pytest.mark.parametrize("counts", [(3, 2), (2, 0), (0, 0)], ids=["full", "one empty", "empty"])
def test_every_trainable_parameter_gets_a_gradient(
    kind: str, heads: list, counts: tuple[int, int]
) -> None:
    batch = images([(64, 96), (48, 64)])
    targets = [objects(n, s, i) for i, (n, s) in enumerate(zip(counts, batch.sizes, strict=True))]
    model = CoDETR(tiny_detector(*heads, kind=kind)).train()
    output = model(batch, targets)
    output.total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("kind", "heads"), EVERY, ids=ids)
def test_loss_terms_are_those_of_the_plan(kind: str, heads: list) -> None:
    """Names agree with the configuration's weights, and the total is their weighted sum."""
    config = tiny_detector(*heads, kind=kind)
    batch = images([(64, 64)])
    output = train_losses(config, batch, [objects(3, (64, 64))])
    weights = config.loss_weights()
    assert output.losses.keys() == weights.keys()
    total = sum(weights[name] * value for name, value in output.losses.items())
    torch.testing.assert_close(output.total, total)


def test_arms_start_from_the_same_detector() -> None:
    """A head neither changes the initial weights of the rest nor those of other heads."""
    states = []
    for heads in ([], ["atss"], [FASTER_RCNN, "atss"]):
        torch.manual_seed(3)
        states.append(CoDETR(tiny_detector(*heads)).state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())
    assert all(
        torch.equal(value, states[2][name.replace("heads.0", "heads.1")])
        for name, value in states[1].items()
        if name.startswith("heads.0")
    )


def test_denoising_changes_no_other_loss() -> None:
    """No other query sees the noisy objects; theirs are the only terms that are added."""
    batch = images([(64, 96), (48, 64)])
    targets = [objects(4, (64, 96)), objects(1, (48, 64), 1)]
    config = tiny_detector("atss", dino=True)
    without = config.model_copy(update={"denoising": DenoisingConfig()})
    losses, others = (train_losses(c, batch, targets).losses for c in (config, without))
    assert {name for name in losses if name not in others} == {
        f"denoising/{layer}/{term}" for layer in range(2) for term in ("cls", "l1", "giou")
    }
    for name, value in others.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def test_soft_nms_lowers_the_scores_of_overlapping_detections() -> None:
    config = tiny_detector(dino=True)
    batch = images([(64, 96)])
    found = {}
    for enabled in (True, False):
        torch.manual_seed(0)
        soft_nms = config.soft_nms.model_copy(update={"enabled": enabled, "iou": 0.1})
        model = CoDETR(config.model_copy(update={"soft_nms": soft_nms})).eval()
        model.decoder.regress[-1][-1].bias.data[2:] += 2.0  # untrained boxes are too small to meet
        (found[enabled],) = model(batch)
    assert len(found[True]) <= config.queries.count < len(found[False])
    pairs = found[False].scores[: config.queries.count]
    assert found[True].scores[0] == pairs[0]
    assert found[True].scores.sum() < pairs.sum()


@pytest.mark.parametrize("seed", [0, None], ids=["seeded", "without seeds"])
def test_losses_of_a_head_do_not_depend_on_other_heads(seed: int | None) -> None:
    """Nor does its start, nor do its positive queries: of all kinds, side by side and alone."""
    batch, targets = images([(64, 96)]), [replace(objects(4, (64, 96)), seed=seed)]
    every = ["gfl", FASTER_RCNN, "paa", "atss", MASK_RCNN, "fcos", "retinanet"]
    beside = train_losses(tiny_detector(*every), batch, targets).losses
    for head in every:
        alone = train_losses(tiny_detector(head), batch, targets).losses
        assert len(alone) > 2 * 3
        for name, value in alone.items():
            torch.testing.assert_close(beside[name], value, msg=name)


def test_images_without_seeds_draw_anew_at_each_step() -> None:
    """Each image and each step its own, and torch's global generator is asked the same."""
    batch, targets = images([(64, 64)]), [replace(objects(3, (64, 64)), seed=None)]
    totals, next_draws = [], []
    for heads in ([], [FASTER_RCNN]):
        torch.manual_seed(0)
        model = CoDETR(tiny_detector(*heads)).train()
        torch.manual_seed(1)
        totals.append([model(batch, targets).total.item() for _ in range(2)])
        next_draws.append(torch.rand(3))
    assert totals[0][0] == totals[0][1]
    assert totals[1][0] != totals[1][1]
    assert torch.equal(*next_draws)


@pytest.mark.parametrize(
    "heads", [[FASTER_RCNN, FASTER_RCNN], [MASK_RCNN, FASTER_RCNN]], ids=["twice", "with masks"]
)
def test_heads_of_one_family_draw_samples_of_their_own(heads: list) -> None:
    targets = [objects(20, (64, 96))]
    first, second = CoDETR(tiny_detector(*heads)).heads
    assigned = torch.full((1, 4000), -1)
    anchors = [head.rpn.sample(assigned, targets)[0][1] for head in (first, second)]
    assert not torch.equal(*anchors)
    proposals = [torch.rand(4000, 4) * 8 + torch.tensor([64.0, 64, 72, 72])]
    regions = [head.rcnn.sample(proposals, targets)[0].boxes for head in (first, second)]
    assert not torch.equal(*regions)


def test_faster_rcnn_draws_what_it_drew_when_it_was_the_only_one() -> None:
    """Numbers of trainings with it, finished and going on, stay."""
    targets = objects(3, (64, 96))
    assigned = torch.full((1, 4000), -1)
    head = CoDETR(tiny_detector(MASK_RCNN, FASTER_RCNN)).heads[1]
    generator = draw_generator(targets, "rpn")
    _, expected = sample_balanced(assigned[0], head.rpn.config.samples, 0.5, generator)
    assert torch.equal(head.rpn.sample(assigned, [targets])[0][1], expected)


def test_repeated_heads_start_from_weights_of_their_own() -> None:
    model = CoDETR(tiny_detector("fcos", "fcos"))
    first, second = (head.state_dict() for head in model.heads)
    assert not torch.equal(first["cls.weight"], second["cls.weight"])


@variants
def test_what_training_adds_costs_nothing_at_inference(kind: str) -> None:
    """Neither heads nor denoising nor further groups change detections or the parameters that
    inference uses."""
    torch.manual_seed(0)
    config = tiny_detector(kind=kind)
    nothing = {"denoising": DenoisingConfig(), "one_to_many": OneToManyConfig()}
    plain = CoDETR(config.model_copy(update=nothing)).eval()
    torch.manual_seed(0)
    collaborative = CoDETR(tiny_detector("atss", FASTER_RCNN, kind=kind)).eval()
    batch = images([(64, 96), (48, 64)])
    for one, other in zip(plain(batch), collaborative(batch), strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
    counts = [sum(p.numel() for p in m.inference_parameters()) for m in (plain, collaborative)]
    assert counts[0] == counts[1] == sum(p.numel() for p in plain.parameters())


@variants
def test_what_lies_in_the_padding_is_never_read(kind: str) -> None:
    """An image's memory and queries are the same alone and beside a larger image."""
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(kind=kind)).eval().double()
    sizes = [(64, 64), (64, 128)]
    strides = model.config.strides
    maps = [torch.randn(2, 32, 64 // s, 128 // s, dtype=torch.double) for s in strides]
    together = model.encoder(maps, images(sizes))
    alone = model.encoder([m[:1, :, :, : m.shape[3] // 2] for m in maps], images(sizes[:1]))
    valid = ~together.padding[0]
    torch.testing.assert_close(together.tokens[:1, valid], alone.tokens)

    if (
        model.config.queries.two_stage
    ):  # tokens in the padding may be selected, but do not change the others' scores
        logits = [model.queries._propose(memory)[0][0] for memory in (together, alone)]
        torch.testing.assert_close(logits[0][valid], logits[1])
        return
    selections = [model.queries(memory) for memory in (together, alone)]
    boxes = [
        model.decoder([selection.group], memory)["query"].boxes[:, 0]
        for selection, memory in zip(selections, (together, alone), strict=True)
    ]
    torch.testing.assert_close(boxes[0], boxes[1])


EVERY_HEAD = [FASTER_RCNN, MASK_RCNN, "atss", "retinanet", "fcos", "paa", "gfl"]


@variants
def test_every_branch_detects_within_the_image(kind: str) -> None:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector(*EVERY_HEAD, kind=kind)).eval()
    batch = images([(64, 96), (48, 64)])
    for branch in ("query", *model.config.head_names):
        for found, (height, width) in zip(model.detect(batch, branch), batch.sizes, strict=True):
            assert isinstance(found, Detections), branch
            assert len(found) > 0, branch
            assert (found.boxes >= 0).all(), branch
            assert (found.boxes <= torch.tensor([width, height, width, height])).all(), branch
            assert (found.scores.diff() <= 0).all(), branch


def test_unknown_branch_names_the_nearest() -> None:
    model = CoDETR(tiny_detector("atss")).eval()
    with pytest.raises(ValueError, match="did you mean 'atss'"):
        model.detect(images([(32, 32)]), "ats")


def test_training_needs_targets() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        CoDETR(tiny_detector()).train()(images([(32, 32)]))


@pytest.mark.parametrize("padding", ["negatives", "mask", "zeros"])
def test_images_with_fewer_positives_are_filled(padding: str) -> None:
    """All ways of filling give the batch one number of queries, and gradients to all."""
    config = tiny_detector(*EVERY_HEAD)
    positive = config.positive_queries.model_copy(update={"padding": padding})
    config = config.model_copy(update={"positive_queries": positive})
    batch = images([(64, 96), (48, 64)])
    output = train_losses(config, batch, [objects(5, (64, 96)), objects(0, (48, 64), 1)])
    assert output.total.isfinite()


def test_positive_queries_can_be_off() -> None:
    config = tiny_detector("atss")
    off = config.positive_queries.model_copy(update={"enabled": False})
    config = config.model_copy(update={"positive_queries": off})
    batch, targets = images([(64, 64)]), [objects(2, (64, 64))]
    losses = train_losses(config, batch, targets).losses
    assert losses.keys() == config.loss_weights().keys()
    assert not any(name.startswith("positive/") for name in losses)


@variants
def test_one_pass_of_the_decoder_is_one_for_each_head(kind: str) -> None:
    """The block mask isolates the groups: with a pass for each, losses and gradients are equal."""
    batch = images([(64, 96), (48, 64)])
    targets = [objects(4, (64, 96)), objects(1, (48, 64), 1)]
    results = []
    for passes in ("one", "per_head"):
        # Masked positives: then padding differs between the images as well.
        positive = {"decoder_passes": passes, "padding": "mask"}
        config = tiny_detector("atss", FASTER_RCNN, kind=kind, positive_queries=positive)
        torch.manual_seed(0)
        model = CoDETR(config).train()
        calls = []
        model.decoder.register_forward_pre_hook(lambda _, args, to=calls: to.append(args[0]))
        output = model(batch, targets)
        output.total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((calls, output.losses, gradients))
    (one, losses, gradients), (several, others, other_gradients) = results
    assert len(one) == 1
    names = [[group.name for group in groups] for groups in several]
    assert ["positive/atss"] in names
    assert ["positive/faster_rcnn"] in names
    assert sorted(n for of_pass in names for n in of_pass) == sorted(g.name for g in one[0])
    assert losses.keys() == others.keys()
    for name, value in losses.items():
        torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, gradient in gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert (other_gradients[name] - gradient).abs().max() < 1e-3 * scale, name


def kept_by_the_decoder(kind: str, passes: str) -> int:
    """Bytes that the decoder keeps for the backward pass of 100 queries and 100 positives of each
    of two heads."""
    positive = {"decoder_passes": passes, "padding": "mask", "min": 100, "max": 100}
    config = tiny_detector(
        "atss", FASTER_RCNN, kind=kind, positive_queries=positive, queries={"count": 100}
    )
    torch.manual_seed(0)
    model = CoDETR(config).train()
    decode, kept = model.decoder.forward, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address is used twice
        return tensor

    def watched(*inputs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return decode(*inputs)

    model.decoder.forward = watched  # type: ignore[method-assign]
    model(images([(64, 96), (48, 64)]), [objects(4, (64, 96)), objects(1, (48, 64), 1)])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["two-stage", "dino", "conditional"])
def test_a_pass_for_each_head_keeps_less_for_the_backward_pass(kind: str) -> None:
    """By a quarter at least: masks and attention maps are a third as large in all."""
    one, per_head = (kept_by_the_decoder(kind, passes) for passes in ("one", "per_head"))
    assert per_head < 0.75 * one


def test_positive_queries_without_the_losses_of_their_head() -> None:
    """Table 9, third row: the head's own terms leave the total, and nothing else changes."""
    batch, targets = images([(64, 96)]), [objects(3, (64, 96))]
    both, queries = (
        train_losses(tiny_detector("atss", head_losses=losses), batch, targets)
        for losses in (True, False)
    )
    assert both.losses.keys() == queries.losses.keys()
    for name, value in both.losses.items():
        torch.testing.assert_close(queries.losses[name], value)
    weights = tiny_detector("atss").loss_weights()
    own = sum(
        weights[name] * value for name, value in both.losses.items() if name.startswith("atss/")
    )
    torch.testing.assert_close(both.total - queries.total, own)


def test_heads_without_losses_are_not_trained_but_have_gradients() -> None:
    torch.manual_seed(0)
    model = CoDETR(tiny_detector("atss", FASTER_RCNN, head_losses=False)).train()
    model(images([(64, 96)]), [objects(3, (64, 96))]).total.backward()
    assert all((p.grad == 0).all() for p in model.heads.parameters())  # type: ignore[union-attr]
    transforms = model.positive_queries.parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in transforms)


@variants
def test_bf16_autocast(kind: str) -> None:
    batch, targets = images([(64, 96)]), [objects(3, (64, 96))]
    config = tiny_detector("atss", FASTER_RCNN, kind=kind)
    exact = train_losses(config, batch, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = train_losses(config, batch, targets)
    rough.total.backward()
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.total, exact.total, rtol=0.1, atol=0.0)


@variants
def test_draws_belong_to_the_image(kind: str) -> None:
    """The same image gives the same queries in whatever batch it is."""
    config = tiny_detector(FASTER_RCNN, kind=kind)
    batch, targets = images([(64, 64)]), [objects(3, (64, 64))]
    torch.manual_seed(5)
    model = CoDETR(config).train()
    losses = [model(batch, targets).total for _ in range(2)]
    other = model(batch, [replace(targets[0], seed=99)]).total
    assert losses[0] == losses[1]
    assert losses[0] != other


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 40))
def test_best_pairs_are_the_highest_scores(queries: int, classes: int, count: int) -> None:
    draw = torch.Generator().manual_seed(queries * classes)
    logits = torch.randn(2, 1, queries, classes, generator=draw)
    boxes = torch.rand(2, 1, queries, 4, generator=draw)
    (found,) = best_pairs(GroupPrediction(logits, boxes), [(20, 30)], count)
    every = logits[-1, 0].sigmoid().flatten().sort(descending=True).values
    torch.testing.assert_close(found.scores, every[:count])
    assert len(found) == min(count, queries * classes)
    best = logits[-1, 0].flatten().argmax()
    assert found.labels[0] == best % classes


def test_positive_queries_of_several_anchors_per_cell_read_their_own_cell() -> None:
    """RetinaNet has nine candidates for each feature: the content of a query depends on the memory
    at its anchor's cell, and on no other."""
    model = CoDETR(tiny_detector("retinanet"))
    pyramid = [torch.randn(1, 32, 64 // s, 96 // s, requires_grad=True) for s in (8, 16, 32)]
    pyramid.append(torch.randn(1, 32, 1, 2, requires_grad=True))
    targets, sizes = [objects(2, (64, 96))], [(64, 96)]
    (positives,) = model.heads[0](pyramid, sizes, targets).positives
    group = model.positive_queries[0]("retinanet", [positives], sizes, targets)
    gradients = torch.autograd.grad(group.content[0, 0, 0], pyramid)
    touched = torch.cat([g.abs().sum(1).flatten() for g in gradients]).nonzero().flatten().tolist()
    assert len(touched) == 1
    centre = group.reference[0, 0, :2] * torch.tensor([96.0, 64.0])
    cells = [(x * s, y * s) for s in (8, 16, 32) for y in range(64 // s) for x in range(96 // s)]
    cells += [(64 * x, 0) for x in range(2)]
    torch.testing.assert_close(centre, torch.tensor(cells[touched[0]]).float())
