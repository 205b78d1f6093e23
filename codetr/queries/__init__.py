"""One file for each kind of query group."""

from codetr.queries.denoising import DenoisingQueries
from codetr.queries.positive import PositiveQueries
from codetr.queries.selection import LearnedQueries, TwoStageQueries

__all__ = ["DenoisingQueries", "LearnedQueries", "PositiveQueries", "TwoStageQueries"]
