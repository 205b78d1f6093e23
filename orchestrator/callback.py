"""From Ray Train's controller to the board; imports Ray, so import it late."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from orchestrator.board import Epoch


class ReportToBoard(UserCallback):  # type: ignore[misc]
    """Passes on every report that Ray Train has accepted, with its checkpoint in safety.

    Called once for each epoch; rank 0 itself would tell of an epoch again after it was repeated.
    """

    def __init__(self, board: Any, trial: str) -> None:
        self.board, self.trial = board, trial

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002 - the signature is Ray's
        metrics: list[dict[str, Any]],
        checkpoint: Any,  # noqa: ARG002
    ) -> None:
        history = [Epoch.read(row) for row in metrics[0]["history"]]
        self.board.report.remote(self.trial, history)
