"""Population based training (Jaderberg et al., 2017), as functions of what its members reach.

A population trains side by side. Every few epochs the worst of it *exploit* the best, that is, go
on from their weights, and *explore* other settings. A member is therefore known by the settings it
began with and the turns it has taken since: it is a trial with a schedule, which can be trained
from the beginning to the same weights.

Ray Tune has a scheduler for this, which is not used. It keeps its population in memory alone: a
restored search has forgotten who stands where, and may wait for ever. And a search of fewer trials
at a time than it has members trains one member to its end before it begins the next, so that there
is no population. Here what comes next follows from the seed and the members' metrics: the same on
any number of places, and again after everything was killed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from codetr.config import ConfigError
from orchestrator.schedule import changeable_key
from orchestrator.space import Dimension, Scalar, Space, Suggestion

QUANTILE = 0.25
"""The worst and the best of the population, of which those exploit these."""

RESAMPLE = 0.25
"""Chance that a setting is drawn anew; else it goes a step up or down."""

STEPS = (0.8, 1.2)
"""Factors of such a step in a range; in a list it is the next value."""

_ATTEMPTS = 100


@dataclass(frozen=True)
class Turn:
    """After that epoch a member has gone on with these values, one for each dimension."""

    after_epoch: int
    suggestion: Suggestion


@dataclass(frozen=True)
class Member:
    """A place in the population, and what is trained there.

    Attributes:
        number: the place, from 1.
        suggestion: the values at the beginning.
        turns: what it has changed since, or has taken over from others who had.
        donor: the place of the member from whose weights it has gone on, the last time.
    """

    number: int
    suggestion: Suggestion
    turns: tuple[Turn, ...] = ()
    donor: int | None = None

    @property
    def latest(self) -> Suggestion:
        """The values that hold now."""
        return self.turns[-1].suggestion if self.turns else self.suggestion


def default_interval(epochs: int, evaluate_every: int) -> int:
    """Epochs between two exchanges: a quarter of them, rounded up to what is evaluated."""
    return evaluate_every * max(1, math.ceil(epochs / 4 / evaluate_every))


def exchanges(epochs: int, interval: int) -> list[int]:
    """The epochs after which the members exchange: not after the last, which nobody would use."""
    return [*range(interval, epochs, interval)]


def require_population(space: Space) -> None:
    """See that a population can explore the space.

    Raises:
        ConfigError: names the dimension that cannot change in the middle of a training.
    """
    for dimension in space.dimensions:
        where = f"pbt: {dimension.name}"
        if dimension.setting is None or dimension.when:
            raise ConfigError(
                f"{where}: members change all their settings in the middle of a training: "
                "conditions make no sense there"
            )
        try:
            changeable_key(dimension.setting)
        except ConfigError as error:
            raise ConfigError(f"pbt: {error}; search it with asha, and the rest with pbt") from None
        if not all(_is_number(value) for value in dimension.choices):
            raise ConfigError(f"{where}: give numbers, or a range of numbers")


def found(space: Space, size: int, seed: int) -> list[Member]:
    """The first population: ``size`` different members.

    Raises:
        ConfigError: the space has fewer.
    """
    draws = _Draws(_randomness(seed, "beginning"))
    members: list[Member] = []
    for number in range(1, size + 1):
        taken = [member.suggestion for member in members]
        new = next((s for _ in range(_ATTEMPTS) if (s := space(draws)) not in taken), None)
        if new is None and space.is_finite:  # its last points are seldom drawn
            new = next((s for s in space.grid() if s not in taken), None)
        if new is None:
            raise ConfigError(
                f"pbt: the space has no {size} different members to begin with, only "
                f"{number - 1}: give more values, or fewer --samples"
            )
        members.append(Member(number, new))
    return members


def exchange(
    space: Space, seed: int, epoch: int, scores: Sequence[tuple[Member, float | None]]
) -> list[Member]:
    """The population after that epoch: who was among the worst now goes on from one of the best.

    Args:
        scores: every member's, higher is better; None for one that has failed, which is worse than
            all others.

    Returns:
        As many members, in the same places. No two are alike: where nothing is left to explore from
        a donor, the member goes on as it is, or leaves if it has failed.
    """
    by_score = sorted(
        (score, -member.number, member) for member, score in scores if score is not None
    )
    alive = [member for _, _, member in by_score]
    count = min(math.ceil(len(alive) * QUANTILE), len(alive) // 2)
    worst, best = alive[:count], alive[len(alive) - count :] or alive
    after: list[Member] = []
    for member, score in scores:
        chance, new = _randomness(seed, f"{epoch}/{member.number}"), None
        if best and (score is None or member in worst):
            donor = chance.choice(best)
            turns = _explored(space, chance, epoch, donor, after)
            new = turns and Member(member.number, donor.suggestion, turns, donor.number)
        if new:
            after.append(new)
        elif score is not None:
            after.append(member)
    return after


def _explored(
    space: Space,
    chance: random.Random,
    epoch: int,
    donor: Member,
    others: Sequence[Member],
) -> tuple[Turn, ...] | None:
    """The donor's turns with one to other values, and not to those of another who has taken it."""
    taken = [(other.suggestion, other.turns) for other in others]
    for _ in range(_ATTEMPTS):
        values = {d.name: _step(d, donor.latest[d.name], chance) for d in space.dimensions}
        if values == donor.latest:
            continue
        turns = (*donor.turns, Turn(epoch, values))
        if (donor.suggestion, turns) not in taken:
            return turns
    return None


def _step(dimension: Dimension, value: Scalar, chance: random.Random) -> Scalar:
    if chance.random() < RESAMPLE:
        return dimension.draw(_Draws(chance))
    if dimension.low is None or dimension.high is None:
        choices = dimension.choices
        place = choices.index(value) + chance.choice((-1, 1))
        return choices[min(max(place, 0), len(choices) - 1)]
    moved = float(value or 0) * chance.choice(STEPS)
    return dimension.number(min(max(moved, dimension.low), dimension.high))


class _Draws:
    """Draws blindly, in Optuna's terms."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar:  # noqa: ARG002
        return self.chance.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:  # noqa: ARG002
        if log:
            return math.exp(self.chance.uniform(math.log(low), math.log(high)))
        return self.chance.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        if log:
            return round(self.suggest_float(name, low, high, log=True))
        return self.chance.randint(low, high)


def _randomness(seed: int, what: str) -> random.Random:
    """For each thing to decide a stream of its own: what was decided before does not matter."""
    return random.Random(f"{seed}/{what}")


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
