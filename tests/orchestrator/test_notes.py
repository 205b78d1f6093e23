"""What befalls a trial without ending it: memory that is too small, and how it is told."""

import dataclasses

import pytest
import ray.exceptions
import torch
from trial_samples import sample_plan, sample_results

from orchestrator.board import Board, Epoch
from orchestrator.callback import is_out_of_memory
from orchestrator.console import ended_text
from orchestrator.report import markdown


def test_a_batch_is_computed_in_twice_the_parts_each_time_memory_was_too_small():
    board = Board()
    assert board.parts("a", 1) == 1
    board.out_of_memory("a")
    assert board.parts("a", 1) == 2
    assert board.parts("a", 2) == 2
    board.out_of_memory("a")
    assert board.parts("a", 2) == 4
    assert board.parts("b", 3) == 3


class Wrapped(Exception):  # noqa: N818 - as Ray's
    """As Ray Train hands over what a worker raised."""

    def __init__(self, base: BaseException) -> None:
        super().__init__("worker failed")
        self._base_exc = base


def allocation_refused_on_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_every_way_to_say_that_memory_was_too_small():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        ray.exceptions.OutOfMemoryError("killed by the memory monitor"),
        allocation_refused_on_the_cpu(),
    ):
        assert is_out_of_memory(error)
        assert is_out_of_memory(Wrapped(error))
    assert not is_out_of_memory(Wrapped(RuntimeError("connection closed by peer")))
    assert not is_out_of_memory(None)


def test_an_epochs_notes_are_kept_and_told(tmp_path):
    plan = sample_plan(tmp_path)
    results = sample_results(plan)
    noted = dataclasses.replace(results[0].history[1], notes=("a disk broke",))
    assert Epoch.read(dataclasses.asdict(noted)) == noted
    results[0].history[1] = noted
    assert results[0].notes == ["a disk broke"]
    assert "a disk broke" in ended_text(results[0])
    assert "a disk broke" in markdown(plan, results)
    assert "a disk broke" not in ended_text(results[1])
