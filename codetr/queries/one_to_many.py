"""One-to-many queries: groups beside the one-to-one queries, matched in their own right."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from codetr.config import DetectorConfig
from codetr.queries.selection import LearnedQueries, QueryEmbeddings, Selection, TwoStageQueries
from codetr.structures import Memory, QueryGroup

ONE_TO_MANY = "one_to_many"
"""Name of the groups of further queries, which exist in training only."""


class OneToManyQueries(QueryEmbeddings):
    """Makes the group ``one_to_many``: all its parts end to end (H-DETR; Group-DETR).

    They are made as the one-to-one queries are, by the same layers, with learned contents,
    positions or boxes of their own.
    """

    def __init__(self, config: DetectorConfig) -> None:
        many = config.one_to_many
        super().__init__(config, many.groups * many.queries)
        self.config = many

    def forward(
        self, queries: LearnedQueries | TwoStageQueries, selection: Selection, memory: Memory
    ) -> QueryGroup:
        """The group of all images.

        Args:
            queries: what made the one-to-one queries.
            selection: what it made.
            memory: of the encoder.
        """
        if isinstance(queries, LearnedQueries):
            group = queries.group(ONE_TO_MANY, self, memory)
        else:
            assert selection.box_logits is not None
            tokens = self._tokens(selection)
            each = tokens.shape[1] // self.config.groups
            learned = None if self.content is None else self._first(each, self.content.weight)
            group = queries.group(ONE_TO_MANY, tokens, selection.box_logits, learned, memory)
        return replace(group, parts=self.config.groups, repeat=self.config.repeat)

    def _tokens(self, selection: Selection) -> Tensor:
        """(B, groups * n) where each query starts: at the same tokens as the one-to-one queries, or
        by turns at the tokens that rank after those, as far as there are any."""
        assert selection.tokens is not None
        assert selection.ranking is not None
        groups, count = self.config.groups, selection.tokens.shape[1]
        if self.config.tokens == "same":
            return selection.tokens.repeat(1, groups)
        beyond = selection.ranking.shape[1] - count
        each = min(self.config.queries, beyond // groups)
        ranked = selection.ranking.topk(count + groups * each, dim=1).indices
        by_turns = ranked[:, count:].unflatten(1, (each, groups))
        return by_turns.transpose(1, 2).flatten(1)

    def _first(self, each: int, contents: Tensor) -> Tensor:
        """(groups * each, C): the first contents of every group."""
        return contents.unflatten(0, (self.config.groups, -1))[:, :each].flatten(0, 1)
