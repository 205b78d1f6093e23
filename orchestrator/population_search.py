"""Trains the population of :mod:`orchestrator.population` from one exchange to the next.

Each member's way between two exchanges is a Ray Train job of its own. So any number of members
share whatever places there are, and nobody occupies one while it waits for the others.
"""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.board import Progress
from orchestrator.files import read_json, write_whole
from orchestrator.jobs import Fault, Halted, Loop, result_on_disk
from orchestrator.plan import Trial
from orchestrator.population import Member, Turn, exchange, exchanges, found
from orchestrator.search import Entry, Searcher, train_leased
from orchestrator.storage import Storage
from orchestrator.sweep import Sweep
from orchestrator.wording import one_line
from orchestrator.worker import STOPPED

POPULATION = "population.json"
"""In the sweep's folder: its members, and the epoch after which they have exchanged last."""

_POLL_SECONDS = 0.5
_ADVICE = (
    "remove it: the exchanges are made again, from what the trials have measured, and what is "
    "trained is not trained again; or give --name"
)


class PopulationSearcher(Searcher):
    """As a Ray actor it trains a population, and is the foreman of its members' jobs."""

    def __init__(self, sweep: Sweep, loop: Loop, slots: int) -> None:
        super().__init__(sweep, loop, slots)
        self.faults: dict[str, Fault] = {}

    def search(self) -> None:
        """Train the population to its end, from its last exchange.

        Raises:
            Halted: it cannot exchange; the same command goes on there.
        """
        import ray

        me, sweep = ray.get_runtime_context().current_actor, self.sweep
        with self.leases:
            last, members = read_population(sweep.folder) or (0, self._found())
            for epoch in exchanges(sweep.epochs, sweep.interval):
                if epoch <= last:
                    continue
                self._train(members, epoch, me)
                if self.leaving:
                    return
                members = self._exchange(members, epoch)
            self._train(members, sweep.epochs, me)
        if not self.leaving:
            self.ledger.close()

    def _found(self) -> list[Member]:
        search = self.sweep.search
        return found(search.space, search.samples, search.seed)

    # ------------------------------------------------------------------------------------ training

    def _train(self, members: list[Member], until: int, me: Any) -> None:
        """Train all of them to that epoch, as many at a time as there are places."""
        import ray

        waiting, running = deque(members), set[Any]()
        while running or (waiting and not self.leaving):
            while waiting and len(running) < self.slots and not self.leaving:
                member = waiting.popleft()
                if self._enter(member).state != "finished":
                    running.add(me.train_member.remote(member, until))
            ended = ray.wait([*running], timeout=_POLL_SECONDS)[0] if running else []
            for reference in ended:
                running.remove(reference)
                ray.get(reference)  # raises what is nobody's failure but ours

    def train_member(self, member: Member, until: int) -> None:
        """Train a member to that epoch, and note what came of it."""
        import ray

        trial, entry = self._trial(member), self._entry(member)
        me = ray.get_runtime_context().current_actor
        reason = train_leased(self.sweep, trial, me, self.loop, until=until)
        if reason == STOPPED and self.leaving:
            return
        self.leases.release(trial.id)
        try:
            if reason is None and self._score(trial, until) is None:
                reason = f"{self.sweep.search.metric} was not measured"
        except RuntimeError as error:
            reason = Fault(str(error))
        if isinstance(reason, Fault):
            self.faults[entry.tune_id] = reason
        if reason == STOPPED:
            self._end(entry, "interrupted")
        elif reason is not None:
            self._end(entry, "failed", reason)
        elif until == self.sweep.epochs:
            self._end(entry, "finished")
        else:
            self.show(trial.id, Progress("waiting for the others", until))
        if reason is None and member.turns:
            # Others of its own have come after the one that was handed over to it. To tidy up is
            # worth no failure; each file system raises its own.
            with suppress(Exception):
                Storage.of(self.sweep.plan).forget(trial.name, _place(trial, member.turns[-1]))

    def _trial(self, member: Member) -> Trial:
        return self.sweep.trial(member.suggestion, member.turns)

    def _enter(self, member: Member, origin: str = "") -> Entry:
        """The member's entry in the ledger: it begins, or is taken up again."""
        trial, entry = self._trial(member), self.ledger.entries.get(self._key(member))
        # What has ended so did it in an invocation before this one; what was replaced in an
        # exchange that was killed before it counted.
        if entry is None or entry.state in ("failed", "interrupted", "stopped"):
            own = member.suggestion
            more = {"member": member.number, "turns": member.turns, "origin": origin, "named": own}
            self.ledger.claim(self._key(member), own, trial.id, **more)
            self.begin(self._key(member), trial)
        return self._entry(member)

    def _entry(self, member: Member) -> Entry:
        return self.ledger.entries[self._key(member)]

    def _key(self, member: Member) -> str:
        return f"member {member.number}, {self._trial(member).id}"

    def _end(self, entry: Entry, state: Any, reason: str = "") -> None:
        self.ledger.end(entry.tune_id, state, reason)
        self.news.append(replace(entry))

    # ------------------------------------------------------------------------------------ exchange

    def _exchange(self, members: list[Member], epoch: int) -> list[Member]:
        """Who goes on from whom after that epoch. It counts once it is written down; killed before
        that, the same comes of the same metrics.

        Raises:
            Halted: it would be another one than without a fault, or there is nobody to go on from;
                nothing has been written.
        """
        search, places = self.sweep.search, {member.number: member for member in members}
        scores = self._scores(members, epoch)
        after = exchange(search.space, search.seed, epoch, scores)
        for new in after:
            if new not in members and new.donor is not None:
                self._replace(places[new.number], places[new.donor], new, epoch)
        content = {"after_epoch": epoch, "members": [asdict(member) for member in after]}
        write_whole(self.sweep.folder / POPULATION, json.dumps(content, indent=1))
        return after

    def _scores(self, members: list[Member], epoch: int) -> list[tuple[Member, float | None]]:
        """What each has reached; None for one that has failed of itself, or was asked to stop."""
        scores: list[tuple[Member, float | None]] = []
        for member in members:
            entry, score = self._entry(member), None
            try:
                if entry.tune_id in self.faults:
                    raise RuntimeError(self.faults[entry.tune_id])
                if entry.state not in ("failed", "interrupted"):
                    score = self._score(self._trial(member), epoch)
            except RuntimeError as error:
                raise Halted(
                    f"#{entry.number} has not come to the exchange after epoch {epoch}: {error}. "
                    "That says nothing of its values, so nobody has exchanged: the same command "
                    "goes on there"
                ) from None
            scores.append((member, score))
        if all(score is None for _, score in scores):
            entry = self._entry(members[0])
            raise Halted(
                f"nobody has come to the exchange after epoch {epoch} (#{entry.number}: "
                f"{entry.reason or STOPPED}): the same command tries all of them again"
            )
        return scores

    def _replace(self, old: Member, donor: Member, new: Member, epoch: int) -> None:
        source, before = f"#{self._entry(donor).number}", self._entry(old)
        problem = self._hand_over(self._trial(donor), self._trial(new), epoch)
        entry = self._enter(new, f"{source} after epoch {epoch}{problem}")
        if before.state in ("open", "interrupted"):
            reason = f"replaced by #{entry.number}, from {source}, after epoch {epoch}"
            self._end(before, "stopped", reason)

    def _score(self, trial: Trial, epoch: int) -> float | None:
        """What the trial has reached after that epoch; None: it was not measured.

        Raises:
            RuntimeError: that cannot be read, which is no reason to exchange other members.
        """
        result = result_on_disk(self.sweep.plan, trial)
        if len(result.history) < epoch:
            raise RuntimeError(result.reason or f"ended after {len(result.history)} epochs")
        return result.history[epoch - 1].values.get(f"val/{self.sweep.search.metric}")

    def _hand_over(self, donor: Trial, heir: Trial, epoch: int) -> str:
        """Give the heir what the donor has computed: up to that epoch they are the same training.
        Without it the heir trains from the beginning, to the same end; returns why, in words."""
        place = (epoch, epoch * donor.steps_per_epoch)
        try:
            storage = Storage.of(self.sweep.plan)
            done = storage.hand_over(donor.name, place, heir.name)
        except Exception as error:  # each file system raises its own
            return f", trained again from the beginning: {one_line(error)}"
        return "" if done else ", trained again from the beginning: its checkpoint is gone"


def _place(trial: Trial, turn: Turn) -> tuple[int, int]:
    return turn.after_epoch, turn.after_epoch * trial.steps_per_epoch


def read_population(folder: Path) -> tuple[int, list[Member]] | None:
    """The epoch of the last exchange, and the population since; None before the first, and where
    nobody was left, as older versions had it: the exchanges are made again.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / POPULATION
    if not file.exists():
        return None
    content = read_json(file, _ADVICE)
    members = [
        Member(**{**row, "turns": tuple(Turn(**turn) for turn in row["turns"])})
        for row in content["members"]
    ]
    return (content["after_epoch"], members) if members else None
