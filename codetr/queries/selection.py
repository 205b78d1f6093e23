"""The one-to-one queries: learned, or selected among the encoder's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codetr.config import DetectorConfig
from codetr.structures import GroupPrediction, Memory, QueryGroup
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
    """

    group: QueryGroup
    proposals: GroupPrediction | None = None
    tokens: Tensor | None = None


class LearnedQueries(nn.Module):
    """One-stage queries: content, position and reference point are learned (Deformable DETR)."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        channels = config.transformer.embed_dim
        self.position = nn.Embedding(config.queries.count, channels)
        self.content = nn.Embedding(config.queries.count, channels)
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory) -> Selection:
        batch = len(memory.tokens)
        points = self.reference_points(self.position.weight).float().sigmoid()
        # A width and height of one half have logit zero: the first layer's boxes are then what
        # the box branch says alone.
        reference = torch.cat((points, torch.full_like(points, 0.5)), dim=-1)
        group = QueryGroup(
            name=QUERY,
            content=self.content.weight.expand(batch, -1, -1),
            position=self.position.weight.expand(batch, -1, -1),
            reference=reference.expand(batch, -1, -1),
            points=True,
        )
        return Selection(group)


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
        scores = logits[..., 0] if objectness else logits.amax(-1)
        tokens = scores.topk(count, dim=1).indices
        selected = unactivated.gather(1, tokens[..., None].expand(-1, -1, 4))
        reference = selected.detach().sigmoid()
        content, position = self._embed(reference, memory)
        group = QueryGroup(QUERY, content=content, position=position, reference=reference)
        if objectness:
            proposals = GroupPrediction(logits[None], unactivated.sigmoid()[None])
        else:
            of_selected = tokens[..., None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, of_selected)
            proposals = GroupPrediction(logits[None], selected.sigmoid()[None])
        return Selection(group, proposals, tokens)

    def _embed(self, boxes: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Content of the selected boxes (B, Q, 4), and position unless the decoder computes it."""
        position = None
        if not self.config.dynamic_anchors:
            encoding = encode_boxes(boxes, self.project.out_features // 2)
            embedded = self.position_norm(self.position(encoding.to(memory.tokens.dtype)))
            position, content = embedded.chunk(2, dim=-1)
        if self.config.mixed_selection:
            batch, count, _ = boxes.shape
            content = self.content.weight[:count].expand(batch, -1, -1)
        return content, position

    def _propose(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Class logits (B, T, classes) and box logits (B, T, 4) of every token; the memory of
        tokens without a proposal counts as zero (method.md 14)."""
        proposals = token_proposals(memory)
        tokens = memory.tokens.masked_fill(proposals[..., :1].isinf(), 0.0)
        hidden = self.project_norm(self.project(tokens))
        return self.classify(hidden), self.regress(hidden).float() + proposals


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
