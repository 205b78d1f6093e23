"""Workers whose number is a range: what may be asked for, and who gets how many."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from codetr.config import ConfigError, parse
from orchestrator import room as room_module
from orchestrator.experiment import Resources
from orchestrator.room import Room

BATCH = 8


def test_a_range_is_read_from_text():
    assert Resources(workers="2-8").least == 2
    assert Resources(workers="2-8").workers == 8
    assert Resources(workers="2-8").is_elastic
    assert Resources(workers="3").least == Resources(workers=3).workers == 3
    assert not Resources(workers="4-4").is_elastic
    again = Resources.model_validate(Resources(workers="2-8").model_dump())
    assert (again.least, again.workers) == (2, 8)


@pytest.mark.parametrize("text", ["0", "8-2", "0-3", "two", "1-2-3", "-2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match=f"workers: '{text}' is neither a number"):
        parse(Resources, {"workers": text}, "resources")


def test_workers_share_a_batch_evenly():
    assert Resources(workers="1-8").worker_counts(8) == [1, 2, 4, 8]
    assert Resources(workers="2-8").worker_counts(12) == [2, 3, 4, 6]
    assert Resources(workers=4).worker_counts(8) == [4]


@dataclass(eq=False)
class Group:
    """A placement group."""

    workers: int


class Machine:
    """So many places, taken by placement groups in the order of their requests, as Ray does."""

    def __init__(self) -> None:
        self.places, self.waiting, self.placed = 0, [], []

    def place(self) -> None:
        for group in [*self.waiting]:
            if group.workers <= self.free:
                self.waiting.remove(group)
                self.placed.append(group)

    @property
    def free(self) -> int:
        return self.places - sum(group.workers for group in self.placed)

    def request(self, workers: int) -> Group:
        group = Group(workers)
        self.waiting.append(group)
        self.place()
        return group

    def remove(self, group: Group) -> None:
        for groups in (self.waiting, self.placed):
            if group in groups:
                groups.remove(group)
        self.place()


@pytest.fixture
def machine(monkeypatch):
    return simulate(monkeypatch.setattr)


def simulate(set_attribute):
    machine = Machine()

    class Probe:
        def __init__(self, trial, workers):
            self.trial, self.workers = trial, workers
            self.group = machine.request(workers)

        @classmethod
        def of(cls, trial, _resources, workers):
            return cls(trial, workers)

        @property
        def is_placed(self):
            return self.group in machine.placed

        def remove(self):
            machine.remove(self.group)

    set_attribute(room_module, "_Probe", Probe)
    set_attribute(room_module, "free_workers", lambda _resources: machine.free)
    set_attribute(room_module, "_SETTLE_SECONDS", 0.0)
    return machine


def test_it_starts_with_what_there_is_and_grows_when_there_is_more(machine):
    room = Room(Resources(workers="2-8"))
    machine.places = 1
    assert room.take("a", BATCH) is None
    machine.places = 5
    machine.place()
    assert room.take("a", BATCH) == 4
    group = machine.request(4)
    room.placed("a")
    assert not room.can_grow("a", BATCH)
    machine.places = 9
    machine.place()
    assert room.can_grow("a", BATCH)
    machine.remove(group)  # it saves and ends, to start again
    assert room.take("a", BATCH) == 8


def test_what_is_promised_to_one_is_not_given_to_another(machine):
    room = Room(Resources(workers="1-4"))
    machine.places = 6
    assert room.take("a", BATCH) == 4
    assert room.take("b", BATCH) == 2
    assert room.take("c", BATCH) is None
    room.leave("a")
    assert room.take("c", BATCH) is not None


def test_a_trial_waits_a_moment_for_the_places_it_has_just_left(machine, monkeypatch):
    monkeypatch.setattr(room_module, "_SETTLE_SECONDS", 3600.0)
    room = Room(Resources(workers="1-2"))
    machine.places = 2
    assert room.take("a", BATCH) == 2
    group = machine.request(2)
    room.placed("a")
    machine.places = 3  # a worker was killed; Ray has not yet taken back the places of both
    assert room.take("a", BATCH) is None
    machine.remove(group)
    assert room.take("a", BATCH) == 2


class Trials(RuleBasedStateMachine):
    """Trials start, fail, grow and end while nodes come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.machine = simulate(self.patch.setattr)
        self.room = Room(Resources(workers="2-8"))
        self.groups, self.promised = {}, {}

    def teardown(self) -> None:
        self.patch.undo()

    names = st.sampled_from("abc")

    @rule(change=st.integers(-6, 6))
    def nodes_come_or_go(self, change):
        unused = self.machine.free - sum(self.promised.values())
        self.machine.places += max(change, -unused)
        self.machine.place()

    @rule(name=names)
    def start(self, name):
        if name in self.groups or name in self.promised:
            return
        workers = self.room.take(name, BATCH)
        if workers is not None:
            assert workers in (2, 4, 8)
            self.promised[name] = workers

    @precondition(lambda self: self.promised)
    @rule()
    def placed(self):
        name, workers = self.promised.popitem()
        self.groups[name] = self.machine.request(workers)
        assert self.groups[name] in self.machine.placed, "a promise was not kept"
        self.room.placed(name)

    @rule(name=names)
    def fail_or_resize(self, name):
        if name in self.groups:
            self.room.can_grow(name, BATCH)
            self.machine.remove(self.groups.pop(name))

    @rule(name=names)
    def end(self, name):
        self.promised.pop(name, None)
        if name in self.groups:
            self.machine.remove(self.groups.pop(name))
        self.room.leave(name)

    @invariant()
    def no_more_is_given_than_there_is(self):
        assert sum(self.promised.values()) <= self.machine.places

    @invariant()
    def at_most_one_waits_for_room(self):
        groups = [*self.machine.waiting, *self.machine.placed]
        assert len([g for g in groups if g not in self.groups.values()]) <= 1


Trials.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTrials = Trials.TestCase
