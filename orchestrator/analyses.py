"""Analyses of a run's trained detectors: as Ray tasks when all of them are trained.

What was found in a trial lies in ``analysis/`` beside its checkpoints, and is not looked for again;
the pages that compare the arms lie in the experiment's own ``analysis/``. An analysis that fails is
told, and costs nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codetr.analysis import CATALOGUE
from orchestrator.console import View, label
from orchestrator.files import as_far_as_possible
from orchestrator.interrupt import Interrupts
from orchestrator.plan import Plan, Trial
from orchestrator.recorder import Recorder
from orchestrator.results import TrialResult
from orchestrator.wording import one_line

if TYPE_CHECKING:
    from codetr.analysis.frame import Measurement
    from codetr.analysis.instability import Course

FOLDER = "analysis"

IMAGES = 500
"""At most so many validation images are looked at, evenly spread: enough for means, and a small
part of the time that training takes."""

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Look:
    """One analysis of one trial.

    Attributes:
        checkpoint: its folder, or its URL: the last one, of which the tables tell.
    """

    analysis: str
    trial: Trial
    checkpoint: str


def possible_looks(
    plan: Plan, results: Iterable[TrialResult], failed: Callable[[str, Exception], None]
) -> list[Look]:
    """What of the plan's analyses can be made of these trials.

    Those that compare a training's epochs are not: of these the trials tell while they train.

    Args:
        failed: is told of a trial whose checkpoints cannot be listed, and why; the others can be
            looked at.
    """
    from orchestrator.storage import Patience, Storage

    names = [name for name in plan.analyses if CATALOGUE[name].checkpoints == 1]
    looks, patience = [], Patience()
    for result in results:
        if result.state != "finished" or not names:
            continue
        try:
            storage, heads = Storage.of(plan), result.trial.detector.k
            places = patience(partial(storage.checkpoints, result.trial.name))
        except Exception as error:  # each file system raises its own
            failed(f"the analyses of {label(result.trial)}", error)
            continue
        looks += [
            Look(name, result.trial, storage.address(places[-1]))
            for name in names
            if places and heads >= CATALOGUE[name].heads
        ]
    return looks


def found_before(plan: Plan, look: Look) -> Measurement | None:
    """What was found in the same checkpoint before."""
    from codetr.analysis.frame import Measurement

    before = Measurement.load(folder_of(plan, look.trial), look.analysis)
    same = before is not None and before.facts.get("checkpoint") == look.checkpoint
    return before if same else None


def folder_of(plan: Plan, trial: Trial) -> Path:
    return plan.store / trial.name / FOLDER


def measure_trial(look: Look, cpus: int) -> Measurement:
    """Look at the trial's detector on ``cpus`` threads of this machine, or on its GPU."""
    from codetr.analysis import analysis
    from codetr.analysis.frame import Subject, measure
    from codetr.checkpoint import load_checkpoint
    from codetr.data import open_dataset
    from codetr.training import limit_threads
    from orchestrator.storage import local_checkpoint
    from orchestrator.use import device

    limit_threads(cores=cpus)
    with local_checkpoint(look.checkpoint) as path:
        checkpoint = replace(load_checkpoint(path), source=look.checkpoint)
    trial = look.trial
    subject = Subject.of(checkpoint, device(), label(trial), trial.arm)
    kind = analysis(look.analysis)
    masks = kind.trains_heads and trial.detector.needs_masks
    dataset = open_dataset(trial.data, "val", seed=trial.seed, masks=masks)
    batch = min(8, trial.training.batch_size)
    return measure(kind, subject, dataset, batch_size=batch, images=IMAGES)


def metrics(measurement: Measurement) -> dict[str, float]:
    """A measurement's numbers as MLflow has them."""
    return {f"analysis/{measurement.analysis}/{k}": v for k, v in measurement.numbers.items()}


class Analyses:
    """What a run does once its trials are trained.

    Args:
        results: by trial, as far as they are known; the run adds to them.
    """

    def __init__(
        self,
        plan: Plan,
        view: View,
        interrupts: Interrupts,
        results: Mapping[str, TrialResult],
    ) -> None:
        self.plan, self.view, self.interrupts, self.results = plan, view, interrupts, results
        self.failures: list[str] = []

    def missing(self, results: Iterable[TrialResult]) -> list[Look]:
        """What has to be looked for yet in these trials."""
        return [
            look
            for look in possible_looks(self.plan, results, self._failed)
            if found_before(self.plan, look) is None
        ]

    # ------------------------------------------------------------------------------------- looking

    def look(self, recorder: Recorder, slots: int) -> None:
        """Look at the trained detectors, as far as that was not done before.

        Args:
            recorder: is told of what was found, now or before.
            slots: so many at a time.
        """
        try:
            looks = possible_looks(self.plan, self.results.values(), self._failed)
            waiting: deque[Look] = deque()
            for look in looks:
                if (before := found_before(self.plan, look)) is None:
                    waiting.append(look)
                else:
                    recorder.measure(look.trial, metrics(before), before.facts["epoch"])
            self._work_off(waiting, recorder, slots)
        except Exception as error:  # whatever it was, the training is done
            self._failed("looking at the detectors", error)

    def _work_off(self, waiting: deque[Look], recorder: Recorder, slots: int) -> None:
        import ray

        total, resources = len(waiting), self.plan.resources
        task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)
        running: dict[Any, Look] = {}
        while waiting or running:
            with self.interrupts.shield():  # Ray's calls cannot bear an exception in their middle
                while waiting and len(running) < slots:
                    look = waiting.popleft()
                    reference = task(measure_trial).remote(look, resources.cpus_per_worker)
                    running[reference] = look
                self.view.stage("analysing", f"{total - len(waiting) - len(running)}/{total}")
                for reference in ray.wait([*running], timeout=_POLL_SECONDS)[0]:
                    self._looked(running.pop(reference), reference, recorder)

    def _looked(self, look: Look, reference: Any, recorder: Recorder) -> None:
        """Keep what was found; what failed is told, and is looked for again next time."""
        import ray

        try:
            measurement = ray.get(reference)
        except Exception as error:
            self._failed(f"{look.analysis} of {label(look.trial)}", error)
            return
        recorder.measure(look.trial, metrics(measurement), measurement.facts["epoch"])
        recorder.attach(
            look.trial, as_far_as_possible(self.view.say, self._keep, look, measurement)
        )

    def _keep(self, look: Look, measurement: Measurement) -> list[Path]:
        return measurement.save(folder_of(self.plan, look.trial))

    def _failed(self, what: str, error: Exception) -> None:
        """Note a failure once, in a line, without Ray's traceback."""
        cause = getattr(error, "cause", None) or error
        failure = f"{what}: {type(cause).__name__}: {one_line(cause)}"
        if failure not in self.failures:
            self.failures.append(failure)
            self.view.say(f"analysis failed: {failure}")

    # ------------------------------------------------------------------------------------- writing

    def write(self, plan: Plan, results: Sequence[TrialResult]) -> list[Path]:
        """Pages and pictures that compare the arms, in the experiment's ``analysis/``; returns
        their paths, the overview first."""
        from orchestrator.analysis_overview import write_overview

        if not plan.analyses:
            return []
        looks = possible_looks(plan, results, self._failed)
        every = [m for look in looks if (m := found_before(plan, look))]
        pages: list[Path] = []
        files: list[Path] = []
        for name in plan.analyses:
            try:
                written = _report(plan, name, [m for m in every if m.analysis == name], results)
            except Exception as error:  # a picture must not be the end of a run
                self._failed(f"the page of {name}", error)
                continue
            pages += written[:1]
            files += written
        try:
            return [*write_overview(plan, results, every, pages, self.failures), *files]
        except Exception as error:
            self._failed("the overview", error)
            return files


def _report(
    plan: Plan, name: str, measurements: list[Measurement], results: Sequence[TrialResult]
) -> list[Path]:
    from codetr.analysis import analysis
    from codetr.analysis.instability import report_courses
    from orchestrator.experiment import paper_tables

    folder = plan.folder / FOLDER
    if CATALOGUE[name].checkpoints > 1:
        recorded = courses(results)
        images = plan.trials[0].facts.val_images
        about = f"Recorded at each evaluation while training, on {images} validation images."
        return report_courses(recorded, about, folder, plan.arms) if recorded else []
    if not measurements:
        return []
    return analysis(name).report(measurements, folder, paper_tables(), plan.arms)


def courses(results: Sequence[TrialResult]) -> list[Course]:
    """How each trial's matching changed, as it was recorded while it trained."""
    from codetr.analysis.instability import Course
    from codetr.analysis.stability import Instability

    recorded = []
    for result in results:
        changes = {
            epoch.epoch: Instability(
                epoch.values["matching/changed"], epoch.values["matching/per_image"]
            )
            for epoch in result.history
            if "matching/changed" in epoch.values
        }
        if changes:
            recorded.append(Course(label(result.trial), result.trial.arm, changes))
    return recorded
