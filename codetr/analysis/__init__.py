"""Why it works: one file for each figure with which the paper argues.

:data:`CATALOGUE` says what there is, without importing torch; :func:`analysis` fetches one.
:mod:`codetr.analysis.frame` has what they share, and how they are run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codetr.config import ConfigError, nearest

if TYPE_CHECKING:
    from codetr.analysis.frame import Analysis


@dataclass(frozen=True)
class About:
    """What is known of an analysis before it is run.

    Attributes:
        question: that it answers, in a line.
        figure: of the paper.
        heads: auxiliary heads that a detector must have for it.
        checkpoints: so many are needed at least.
    """

    question: str
    figure: str
    heads: int = 0
    checkpoints: int = 1


CATALOGUE = {
    "discriminability": About("Where are the encoder's features strong?", "equation 7, figure 3"),
    "iof-iob": About(
        "How much foreground do features and decoder attention cover, how much background?",
        "equation 8, figure 2",
    ),
    "conflicts": About(
        "How far apart do the heads look?", "equations 9-12, figures 6, 8 and 9", heads=1
    ),
    "instability": About(
        "How many objects change their matched query from epoch to epoch?",
        "figure 5",
        checkpoints=2,
    ),
    "queries": About("Where do positive queries lie?", "figure 7", heads=1),
}


def require_known(name: str, source: str) -> About:
    """What is known of the analysis of that name.

    Raises:
        ConfigError: there is none; names ``source`` and the nearest.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"{source}: no analysis '{name}'; {nearest(name, [*CATALOGUE])}")
    return CATALOGUE[name]


def analysis(name: str) -> type[Analysis]:
    """The analysis of that name in the catalogue; imports torch."""
    from codetr.analysis.conflicts import Conflicts
    from codetr.analysis.discriminability import Discriminability
    from codetr.analysis.instability import Instability
    from codetr.analysis.iof_iob import IofIob
    from codetr.analysis.queries import Queries

    classes: tuple[type[Analysis], ...] = (
        Discriminability,
        IofIob,
        Conflicts,
        Instability,
        Queries,
    )
    return {one.name: one for one in classes}[name]
