"""Settings of the queries: where each group comes from, its losses, and what it detects;
:mod:`codetr.config` has the rest.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from codetr.strict import Strict


class QueryConfig(Strict):
    """The one-to-one queries and how they are refined (method.md 14-23)."""

    count: PositiveInt = 300
    patterns: PositiveInt | None = None
    """One-stage only. So many learned contents, and a query for each of them at every one of
    ``count`` places, which makes ``total`` queries (Anchor DETR, section 3.3; DAB-DETR)."""
    two_stage: bool = True
    """Queries start from the best encoder tokens; False: from learned embeddings (one stage)."""
    mixed_selection: bool = True
    """Two-stage only. Content of the queries is learned, only their positions are selected."""
    box_refinement: bool = True
    """Each decoder layer refines the boxes of the one before."""
    look_forward_twice: bool = True
    """The gradient of a layer's boxes also reaches the layer before it (DINO, section 3.5)."""
    rank_by: Literal["objectness", "best_class"] = "objectness"
    """Which encoder tokens become queries. ``objectness``: by the logit of class 0, which the
    encoder's loss trains as "any object" at all tokens (Deformable DETR). ``best_class``: by the
    highest logit; the encoder's loss trains the chosen tokens with their own classes (DINO)."""
    dynamic_anchors: bool = False
    """Positions are computed anew at each layer, from the boxes as they are there (DAB-DETR, DINO);
    False: each query keeps one position. One-stage queries then start from learned boxes."""
    learned_content: bool = True
    """One-stage only; False: contents start at zero (Conditional DETR, DAB-DETR)."""
    shared_branches: bool = False
    """One pair of branches reads classes and boxes in all layers (DAB-DETR), as it always does
    without ``box_refinement``."""
    size_modulation: bool = False
    """Conditional attention weighs x by the box's width and y by its height (DAB-DETR, section
    4.4)."""
    norm_states: bool = False
    """A layer's classes and boxes are read from its layer-normalised state, while the next layer
    starts from boxes refined by the plain one (DINO; method.md 22)."""
    logit_eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    """Odds of box coordinates are at least this before their logarithm is taken; DINO: 0.001."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement: set box_refinement=true")
        if self.rank_by == "best_class" and not self.two_stage:
            raise ValueError("rank_by=best_class ranks encoder tokens: set two_stage=true")
        if self.dynamic_anchors and not self.box_refinement:
            raise ValueError("dynamic_anchors are boxes under way: set box_refinement=true")
        if self.dynamic_anchors and self.two_stage and not self.mixed_selection:
            raise ValueError("dynamic_anchors need learned content: set mixed_selection=true")
        if self.two_stage and not self.learned_content:
            raise ValueError(
                "learned_content=false is for one-stage queries: set two_stage=false, or, for "
                "content from the selected boxes, mixed_selection=false"
            )
        if self.patterns is not None and (self.two_stage or self.learned_content):
            raise ValueError(
                "patterns are the contents of one-stage queries: set two_stage=false and "
                "learned_content=false"
            )
        if self.size_modulation and not self.dynamic_anchors:
            raise ValueError("size_modulation needs boxes with sizes: set dynamic_anchors=true")
        return self

    @property
    def total(self) -> int:
        """How many queries there are."""
        return self.count * (self.patterns or 1)


class DenoisingConfig(Strict):
    """Denoising: noisy objects as further queries (DINO, section 3.3; DN-DETR; method.md 24)."""

    enabled: bool = False
    contrastive: bool = True
    """Each object is copied in pairs of a near and a far one, whose target is background (DINO);
    False: near copies alone, moved by centre and size, and empty slots have no loss (DN-DETR)."""
    queries: PositiveInt = 100
    """Noisy copies of the objects, pairs counted once: there are as many groups as fit, and at
    least one, where each holds the image with most objects of the batch."""
    groups: PositiveInt | None = None
    """So many groups, however many objects there are (DN-DETR: 5), instead of ``queries``."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Half of it is the probability that a label is replaced by a random one."""
    box_noise: Annotated[float, Field(ge=0, le=1)] = 1.0
    """A corner moves by less than this share of half the box, and by that much more in the far
    copy; not contrastive: the centre moves by less than that, a side changes by less than this
    share."""


class OneToManyConfig(Strict):
    """Further groups of queries of which several may find the same object. They exist in training
    only. H-DETR: one group, repeated objects; Group-DETR with G groups: G - 1 groups here."""

    groups: NonNegativeInt = 0
    """How many; 0: none. They do not see one another, and each is matched on its own."""
    queries: PositiveInt = 300
    """In each group; H-DETR: 1500."""
    repeat: PositiveInt = 1
    """Each object is matched with so many queries of a group; H-DETR: 6."""
    weight: NonNegativeFloat = 1.0
    """Of each group's losses beside those of the one-to-one queries."""
    average: bool = False
    """The loss is the mean over the one-to-one queries and the groups, not their sum (Group-DETR,
    whose public code divides by the objects of all groups)."""
    tokens: Literal["same", "next"] = "same"
    """Two-stage only. Boxes to start from: those of the one-to-one queries, or of the encoder
    tokens that rank after them (H-DETR)."""


class BoxLossConfig(Strict):
    """Weights of classification, L1 and GIoU: of the query losses, or of the matching cost."""

    cls: NonNegativeFloat = 2.0
    l1: NonNegativeFloat = 5.0
    giou: NonNegativeFloat = 2.0

    def weights(self) -> dict[str, float]:
        """Weight of each term by its name."""
        return {term: getattr(self, term) for term in BoxLossConfig.model_fields}


class FederatedLossConfig(Strict):
    """Federated loss (CenterNet2): for each image, only so many classes have a
    classification loss: those of its objects, and others at random. Where images are annotated for
    some classes alone, as LVIS's, and where few images have a class, most of the rest would only
    teach that there is none of it. It holds for all queries and the encoder's proposals, as the
    original has one classification loss for them; auxiliary heads keep theirs."""

    enabled: bool = False
    classes: PositiveInt = 50
    """Classes for each image, those of its objects included; more, if its objects have more."""
    power: NonNegativeFloat = 0.5
    """The others are drawn with a probability proportional to their number of training images to
    this power."""


class QueryLossConfig(BoxLossConfig):
    """The losses of the decoder's queries, and of the encoder's proposals (method.md 34)."""

    classification: Literal["focal", "quality_focal"] = "focal"
    """``quality_focal``: the target of the right class is the IoU of the predicted box (GFL,
    equation 2); Co-DINO, where ``cls`` is 1."""
    federated: FederatedLossConfig = FederatedLossConfig()


class PositiveQueryConfig(Strict):
    """Customised positive queries (section 3.3, equation 4; method.md 47-56)."""

    enabled: bool = True
    max: PositiveInt = 300
    """At most this many of one head's positives become queries, a random subset of them."""
    min: PositiveInt = 9
    padding: Literal["negatives", "mask", "zeros"] = "negatives"
    """What brings an image with fewer positives to the batch's number of queries: random negatives;
    queries that nobody sees; or, as the original Co-DINO can be set to, queries with empty boxes
    that all others see. The last two have no loss of their own (method.md 49, 50)."""
    features: bool = True
    """Add the feature term of equation 4 to the content."""
    decoder_passes: Literal["one", "per_head"] = "one"
    """All groups of queries go through the decoder together, isolated by a mask; or each group that
    no other sees on its own: the same losses, smaller attention maps, more launches."""
    official_defects: bool = False
    """Reproduce the original's defects: one scalar for each head as head embedding, and padding
    queries with all-zero boxes where ATSS rejected an anchor (method.md 49, 53)."""


class SoftNmsConfig(Strict):
    """Linear Soft-NMS on the decoder's detections, class by class (method.md 58)."""

    enabled: bool = False
    """It chooses among the ``queries.count`` best pairs of query and class. Without it the best
    pairs are the detections."""
    iou: Annotated[float, Field(gt=0, le=1)] = 0.8
    """From this overlap on with a better box, a score is multiplied by 1 - IoU."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Detections whose score falls below it are dropped."""
