"""Which encoder tokens become queries."""

from __future__ import annotations

import pytest
import torch
from tiny_training import tiny_detector

from codetr.queries import TwoStageQueries
from codetr.structures import Memory

SHAPES = [(8, 8), (4, 4), (2, 2)]


def a_memory() -> Memory:
    tokens = torch.randn(2, 84, 32)
    return Memory(tokens, SHAPES, torch.zeros(2, 84, dtype=torch.bool), torch.ones(2, 3, 2))


def selector(*, dino: bool) -> TwoStageQueries:
    made = TwoStageQueries(tiny_detector(two_stage=True, dino=dino))
    for parameter in (*made.classify.parameters(), *made.regress.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("dino", [False, True])
def test_tokens_are_ranked_as_configured(dino: bool) -> None:
    """By the best class in DINO, else by class 0; the golden tensors cannot tell one from the
    other, because there the same tokens lead in both."""
    torch.manual_seed(0)
    queries, memory = selector(dino=dino), a_memory()
    selection = queries(memory)
    logits, _ = queries._propose(memory)
    by_class_0 = logits[..., 0].sort(dim=1, descending=True).indices[:, :12]
    by_best = logits.max(-1).values.sort(dim=1, descending=True).indices[:, :12]
    assert not torch.equal(by_class_0, by_best)
    assert torch.equal(selection.tokens, by_best if dino else by_class_0)


def test_the_loss_of_dinos_encoder_is_that_of_the_selected_tokens() -> None:
    torch.manual_seed(0)
    queries, memory = selector(dino=True), a_memory()
    selection = queries(memory)
    logits, unactivated = queries._propose(memory)
    assert selection.proposals is not None
    for image, tokens in enumerate(selection.tokens):
        torch.testing.assert_close(selection.proposals.logits[0, image], logits[image, tokens])
        boxes = unactivated[image, tokens].sigmoid()
        torch.testing.assert_close(selection.proposals.boxes[0, image], boxes)
        torch.testing.assert_close(selection.group.reference[image], boxes)
    assert selection.proposals.boxes.requires_grad
    assert not selection.group.reference.requires_grad
    assert selection.group.position is None


def test_fewer_tokens_than_queries() -> None:
    torch.manual_seed(0)
    queries = selector(dino=True)
    memory = Memory(
        torch.randn(1, 5, 32),
        [(2, 2), (1, 1)],
        torch.zeros(1, 5, dtype=torch.bool),
        torch.ones(1, 2, 2),
    )
    selection = queries(memory)
    assert selection.group.count == 5
    assert torch.equal(selection.group.content[0], queries.content.weight[:5])
