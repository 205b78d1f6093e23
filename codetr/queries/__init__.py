"""One file for each kind of query group."""

from codetr.queries.positive import PositiveQueries
from codetr.queries.selection import LearnedQueries, TwoStageQueries

__all__ = ["LearnedQueries", "PositiveQueries", "TwoStageQueries"]
