"""What came of a trial, and the rows of the table that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from orchestrator.board import Epoch, History
from orchestrator.plan import Trial

State = Literal["finished", "failed", "interrupted", "not started"]
RunningState = State | Literal["running"]

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
LVIS_METRICS = ("APr", "APc", "APf")
QUERY = "query"
"""The branch that detects; the others are auxiliary heads, by their names."""
Value = float | int | str | None


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        history: of its finished epochs.
        reason: why it failed.
        best: folder with what was written beside the checkpoint of the highest AP.
        weights: the folder of that checkpoint itself, or its URL.
        unread: that is all that is known here: what it has left could not be read.
    """

    trial: Trial
    state: State
    history: History
    reason: str | None = None
    best: Path | None = None
    weights: str | None = None
    unread: bool = False

    @property
    def notes(self) -> list[str]:
        """What befell the trial and did not end it."""
        return [note for epoch in self.history for note in epoch.notes]

    @property
    def evaluated(self) -> list[Epoch]:
        """The epochs after which the detector was evaluated."""
        return [epoch for epoch in self.history if "val/AP" in epoch.values]

    def metric(self, name: str) -> float | None:
        """The metric of the last evaluation in percent; None if it is undefined."""
        if not self.evaluated:
            return None
        value = self.evaluated[-1].values.get(f"val/{name}")
        return None if value is None else 100 * value

    def branch_ap(self, branch: str) -> float | None:
        """AP of one branch on its own after the last evaluation, in percent; None if it was not
        measured."""
        if branch == QUERY:
            return self.metric("AP")
        value = self.evaluated[-1].values.get(f"branch/{branch}/AP") if self.evaluated else None
        return None if value is None else 100 * value

    def paper_branch_ap(self, branch: str) -> float | None:
        """What the paper reports for it."""
        trial = self.trial
        return trial.paper_ap if branch == QUERY else trial.paper_branch_aps.get(branch)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that are measured in the end."""
        return (QUERY, *(self.trial.detector.head_names if self.trial.measures_branches else ()))

    def mean(self, path: str) -> float | None:
        """Mean over the epochs of what was measured in each."""
        values = [epoch.values[path] for epoch in self.history if path in epoch.values]
        return fmean(values) if values else None

    def final(self, path: str) -> float | None:
        """The value after the last epoch."""
        return self.history[-1].values.get(path) if self.history else None


def row(result: TrialResult) -> dict[str, Value]:
    """One line of ``results.csv``; AP in percent."""
    trial = result.trial
    metrics = [*METRICS, *(m for m in LVIS_METRICS if result.metric(m) is not None)]
    parameters = {
        f"parameters_{when}": result.final(f"cost/parameters_{when}")
        for when in ("training", "inference")
    }
    return {
        "arm": trial.arm,
        "k": trial.detector.k,
        "heads": "+".join(trial.detector.head_names),
        "seed": trial.seed,
        **{name: _rounded(result.metric(name), 2) for name in metrics},
        "core_hours": _rounded(result.final("cost/core_hours"), 4),
        "gpu_hours": _rounded(result.final("cost/gpu_hours"), 4),
        "seconds_per_step": _rounded(result.mean("cost/seconds_per_step"), 4),
        "images_per_second": _rounded(result.mean("cost/images_per_second"), 2),
        "peak_memory_mb": _rounded(result.final("cost/peak_memory_mb"), 0),
        **{name: None if value is None else int(value) for name, value in parameters.items()},
        "paper_AP": trial.paper_ap,
        **_branch_cells(result),
        "epochs": len(result.history),
        "status": result.state,
        "trial_id": trial.id,
    }


def _branch_cells(result: TrialResult) -> dict[str, Value]:
    """AP of each auxiliary head on its own, beside the paper's."""
    cells: dict[str, Value] = {}
    for branch in result.branches[1:]:
        cells[f"{branch}_AP"] = _rounded(result.branch_ap(branch), 2)
        cells[f"paper_{branch}_AP"] = result.paper_branch_ap(branch)
    return cells


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds, by one of its branches; AP in percent.

    Attributes:
        aps: of each seed that was evaluated.
        gain: of the mean over the reference's.
        gains: over the reference's trial of the same seed. Seeds differ more than arms may do.
        paper_gain: the same difference in the paper.
    """

    arm: str
    aps: tuple[float, ...]
    gain: float | None
    gains: tuple[float, ...]
    paper_ap: float | None
    paper_gain: float | None

    @property
    def ap(self) -> float | None:
        return fmean(self.aps) if self.aps else None


def measured_branches(results: list[TrialResult]) -> tuple[str, ...]:
    """The branches of all arms, each once."""
    return tuple(dict.fromkeys(branch for result in results for branch in result.branches))


def summarise(results: list[TrialResult], branch: str = QUERY) -> list[ArmSummary]:
    """Every arm that has the branch, over its seeds, against :func:`reference`."""
    results = [result for result in results if branch in result.branches]
    by_arm: dict[str, dict[int, float]] = {}
    for result in results:
        seeds = by_arm.setdefault(result.trial.arm, {})
        if (ap := result.branch_ap(branch)) is not None:
            seeds[result.trial.seed] = ap
    papers = {result.trial.arm: result.paper_branch_ap(branch) for result in results}
    summaries: list[ArmSummary] = []
    base_arm = reference(results) if results else ""
    for arm, aps in by_arm.items():
        base, paper_base = by_arm[base_arm], papers[base_arm]
        if arm == base_arm:
            base, paper_base = {}, None
        summaries.append(
            ArmSummary(
                arm,
                aps=tuple(aps.values()),
                gain=fmean(aps.values()) - fmean(base.values()) if aps and base else None,
                gains=tuple(ap - base[seed] for seed, ap in aps.items() if seed in base),
                paper_ap=papers[arm],
                paper_gain=_difference(papers[arm], paper_base),
            )
        )
    return summaries


def reference(results: Sequence[TrialResult]) -> str:
    """The arm over which gains are told: that which the experiment names, or, where it names none
    or that is not among them, the first."""
    named = [result for result in results if result.trial.is_reference]
    return (named or results)[0].trial.arm


def _difference(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _rounded(value: float | None, digits: int) -> float | int | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)
