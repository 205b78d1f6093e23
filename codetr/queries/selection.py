"""The one-to-one queries: learned, or selected among the encoder's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from codetr.config import DetectorConfig
from codetr.structures import GroupPrediction, Memory, QueryGroup
from codetr.transformer.attention import perceptron
from codetr.transformer.decoder import box_branch, classification_branch
from codetr.transformer.encoder import cell_centers
from codetr.transformer.positions import encode_boxes

QUERY = "query"
"""Name of the group of one-to-one queries, the only one at inference."""


@dataclass
class Selection:
    """The one-to-one queries and what the encoder itself proposed.

    Attributes:
        group: the queries; their targets are found by Hungarian matching.
        proposals: what the encoder's loss trains, as one layer: logits (1, B, n, classes) and boxes
            (1, B, n, 4) normalised cxcywh, at every token or, where tokens are ranked by their best
            class, at the selected ones; None in one-stage detectors.
        tokens: (B, Q) which tokens became queries, best first; None in one-stage detectors.
        ranking: (B, T) by which tokens are ranked; None in one-stage detectors.
        box_logits: (B, T, 4) of the box at every token; None in one-stage detectors.
    """

    group: QueryGroup
    proposals: GroupPrediction | None = None
    tokens: Tensor | None = None
    ranking: Tensor | None = None
    box_logits: Tensor | None = None


class QueryEmbeddings(nn.Module):
    """What is learned for each of ``count`` queries: position (or, with ``dynamic_anchors``, a box)
    in one-stage detectors, and content unless it is selected or zero."""

    def __init__(self, config: DetectorConfig, count: int) -> None:
        super().__init__()
        queries, channels = config.queries, config.transformer.embed_dim
        self.count, self.channels = count, channels
        one_stage, boxes = not queries.two_stage, queries.dynamic_anchors
        has_content = queries.learned_content if one_stage else queries.mixed_selection
        self.position = nn.Embedding(count, channels) if one_stage and not boxes else None
        self.anchors = nn.Embedding(count, 4) if one_stage and boxes else None  # logits of cxcywh
        self.content = nn.Embedding(count, channels) if has_content else None


class LearnedQueries(QueryEmbeddings):
    """One-stage queries: content, position and reference point are learned (Deformable DETR), or
    content and box (DAB-DETR); or each place asks with each of a few contents, the patterns."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config, config.queries.count)
        patterns = config.queries.patterns
        self.patterns = None if patterns is None else nn.Embedding(patterns, self.channels)
        if config.queries.dynamic_anchors:
            return
        if config.transformer.attention == "conditional":
            self.reference_points: nn.Module = perceptron(self.channels, self.channels, 2)
        else:
            self.reference_points = nn.Linear(self.channels, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory) -> Selection:
        group = self.group(QUERY, self, memory)
        return Selection(group if self.patterns is None else self._repeated(group, self.patterns))

    def _repeated(self, group: QueryGroup, patterns: nn.Embedding) -> QueryGroup:
        """All the places with the first pattern, all with the second, and so on."""
        times = patterns.num_embeddings
        content = patterns.weight.repeat_interleave(self.count, dim=0)
        return replace(
            group,
            content=content.expand(len(group.content), -1, -1),
            position=None if group.position is None else group.position.repeat(1, times, 1),
            reference=group.reference.repeat(1, times, 1),
        )

    def group(self, name: str, learned: QueryEmbeddings, memory: Memory) -> QueryGroup:
        """The queries of ``learned`` for each image of the memory."""
        batch = len(memory.tokens)
        position = None
        if learned.anchors is not None:
            reference = learned.anchors.weight.float().sigmoid()
        else:
            assert learned.position is not None
            points = self.reference_points(learned.position.weight).float().sigmoid()
            # A width and height of one half have logit zero: the first layer's boxes are then what
            # the box branch says alone.
            reference = torch.cat((points, torch.full_like(points, 0.5)), dim=-1)
            position = learned.position.weight.expand(batch, -1, -1)
        if learned.content is not None:
            content = learned.content.weight.expand(batch, -1, -1)
        else:
            content = memory.tokens.new_zeros(batch, learned.count, learned.channels)
        return QueryGroup(
            name=name,
            content=content,
            position=position,
            reference=reference.expand(batch, -1, -1),
            points=position is not None,
        )


class TwoStageQueries(nn.Module):
    """Queries start from the encoder tokens most likely to hold an object (method.md 14-18)."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config.queries
        channels = config.transformer.embed_dim
        self.project = nn.Linear(channels, channels)
        self.project_norm = nn.LayerNorm(channels)
        self.classify = classification_branch(channels, config.num_classes)
        self.regress = box_branch(channels)
        layers = [self.project]
        if not self.config.dynamic_anchors:
            self.position = nn.Linear(2 * channels, 2 * channels)
            self.position_norm = nn.LayerNorm(2 * channels)
            layers.append(self.position)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        if self.config.mixed_selection:
            self.content = nn.Embedding(self.config.count, channels)

    def forward(self, memory: Memory) -> Selection:
        logits, unactivated = self._propose(memory)
        count = min(self.config.count, logits.shape[1])
        objectness = self.config.rank_by == "objectness"
        ranking = logits[..., 0] if objectness else logits.amax(-1)
        tokens = ranking.topk(count, dim=1).indices
        learned = self.content.weight[:count] if self.config.mixed_selection else None
        group = self.group(QUERY, tokens, unactivated, learned, memory)
        if objectness:
            proposals = GroupPrediction(logits[None], unactivated.sigmoid()[None])
        else:
            selected = _at(unactivated, tokens).sigmoid()
            proposals = GroupPrediction(_at(logits, tokens)[None], selected[None])
        return Selection(group, proposals, tokens, ranking, unactivated)

    def group(
        self,
        name: str,
        tokens: Tensor,
        box_logits: Tensor,
        learned: Tensor | None,
        memory: Memory,
    ) -> QueryGroup:
        """Queries that start from the boxes at ``tokens`` (B, Q).

        Args:
            name: of the group.
            tokens: of each query.
            box_logits: (B, T, 4) of the boxes at all tokens.
            learned: (Q, C) contents; None: they are selected as well.
            memory: of the encoder; only its type is read.
        """
        reference = _at(box_logits, tokens).detach().sigmoid()
        content, position = self._embed(reference, memory)
        if learned is not None:
            content = learned.expand(len(tokens), -1, -1)
        assert content is not None, "without content of their own, queries have that of their boxes"
        return QueryGroup(name, content=content, position=position, reference=reference)

    def _embed(self, boxes: Tensor, memory: Memory) -> tuple[Tensor | None, Tensor | None]:
        """Content and position of the selected boxes (B, Q, 4), (B, Q, C) each; None and None where
        the decoder computes positions."""
        if self.config.dynamic_anchors:
            return None, None
        encoding = encode_boxes(boxes, self.project.out_features // 2)
        embedded = self.position_norm(self.position(encoding.to(memory.tokens.dtype)))
        position, content = embedded.chunk(2, dim=-1)
        return content, position

    def _propose(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Class logits (B, T, classes) and box logits (B, T, 4) of every token; the memory of
        tokens without a proposal counts as zero (method.md 14)."""
        proposals = token_proposals(memory)
        tokens = memory.tokens.masked_fill(proposals[..., :1].isinf(), 0.0)
        hidden = self.project_norm(self.project(tokens))
        return self.classify(hidden), self.regress(hidden).float() + proposals


def _at(rows: Tensor, tokens: Tensor) -> Tensor:
    """(B, Q, D): the ``rows`` (B, T, D) of ``tokens`` (B, Q)."""
    return rows.gather(1, tokens[..., None].expand(-1, -1, rows.shape[-1]))


def token_proposals(memory: Memory) -> Tensor:
    """Logits (B, T, 4) of a normalised cxcywh box of side 0.05 * 2**level around each token.

    A token in the padding, or whose box comes too close to the border, keeps its place in the
    ranking, but its logits are infinite (method.md 14).
    """
    centers = cell_centers(memory)
    sides = [
        centers.new_full((height * width, 2), 0.05 * 2**level)
        for level, (height, width) in enumerate(memory.shapes)
    ]
    boxes = torch.cat((centers, torch.cat(sides).expand_as(centers)), dim=-1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.padding
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid[..., None], torch.inf)
