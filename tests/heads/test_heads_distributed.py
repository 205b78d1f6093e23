"""Two ranks compute what one process computes on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_heads import CONFIGS, SIZE, random_pyramid, random_targets, small_head
from torch import Tensor, distributed, multiprocessing

from codetr.distributed import normaliser, world_max, world_size, world_sum

COUNTS = [3, 0, 2, 0]
"""Objects per image; rank 1 gets the second and the last image, which have none."""


def gradients(name: str, images: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and gradients of the parameters, of some images of the batch."""
    head = small_head(name)
    pyramid = [level[images] for level in random_pyramid(len(COUNTS))]
    targets = [random_targets(COUNTS)[i] for i in images]
    losses = head(pyramid, [SIZE] * len(images), targets).losses
    torch.stack([*losses.values()]).sum().backward()
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    assert len(grads) == len([*head.parameters()])
    return [value.detach() for value in losses.values()], grads


def as_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        assert world_size() == 2
        assert world_max(rank * 5) == 5
        assert world_sum(torch.tensor([rank, 1])).tolist() == [1, 2]
        assert normaliser(torch.tensor([0.0, 3.0])).tolist() == [0.5, 3.0]
        results = {name: gradients(name, [rank, rank + 2]) for name in CONFIGS}
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(as_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_mean_over_ranks_is_the_whole_batch(name: str, ranks: list[dict]) -> None:
    losses, grads = gradients(name, [0, 1, 2, 3])
    for kind, whole in ((0, losses), (1, grads)):
        for of_rank0, of_rank1, expected in zip(
            ranks[0][name][kind], ranks[1][name][kind], whole, strict=True
        ):
            mean = (of_rank0 + of_rank1) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_one_process_needs_no_group() -> None:
    assert world_size() == 1
    assert world_max(3) == 3
    assert normaliser(0.0).item() == 1
    assert normaliser(torch.tensor([0, 4])).tolist() == [1, 4]
