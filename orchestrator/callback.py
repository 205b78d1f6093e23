"""From Ray Train's controller to the board; imports Ray, so import it late."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.train import UserCallback

from orchestrator.board import Epoch


class ReportToBoard(UserCallback):  # type: ignore[misc]
    """Passes on every report that Ray Train has accepted, with its checkpoint in safety.

    Called once for each; rank 0 itself would tell of an epoch again after it was repeated.
    """

    def __init__(self, board: Any, trial: str) -> None:
        self.board, self.trial = board, trial

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002 - the signature is Ray's
        metrics: list[dict[str, Any]],
        checkpoint: Any,  # noqa: ARG002
    ) -> None:
        last = metrics[0]
        history = [Epoch.read(row) for row in last["history"]]
        step = last.get("step", history[-1].step if history else 0)
        news = [] if last.get("within_epoch") else history
        self.board.report.remote(self.trial, news, step)

    def after_exception(
        self,
        run_context: Any,  # noqa: ARG002
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Where memory was too small, have the workers that Ray starts next use less of it."""
        if any(is_out_of_memory(error) for error in worker_exceptions.values()):
            # Waited for: the new workers ask.
            ray.get(self.board.out_of_memory.remote(self.trial))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's or the machine's memory was too small, by its own error or Ray's for it."""
    if error is None:
        return False
    own = (MemoryError, torch.OutOfMemoryError, ray.exceptions.OutOfMemoryError)
    # torch has no class of its own for it on the CPU.
    if isinstance(error, own) or "DefaultCPUAllocator: can't allocate" in str(error):
        return True
    causes = ("_base_exc", "health_check_failure", "cause", "__cause__")
    return any(is_out_of_memory(getattr(error, cause, None)) for cause in causes)
