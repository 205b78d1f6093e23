"""Federated loss: the classes that an image's queries are trained on (CenterNet2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codetr.config import FederatedLossConfig
from codetr.sampling import draw_generator
from codetr.structures import Targets


class FederatedClasses(nn.Module):
    """Draws each image's classes: those of its objects, and further ones without replacement,
    with probabilities proportional to a power of their frequency.

    CenterNet2 and ViTDet draw on each GPU for its images together; the original's GPUs have one
    image of LVIS each. Drawing by the image, from its own seed, is that whatever the batch and the
    number of workers.
    """

    weights: Tensor

    def __init__(self, config: FederatedLossConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        # Known from the training data whenever there is any; no part of a trained detector.
        self.register_buffer("weights", torch.full((num_classes,), torch.nan), persistent=False)
        self._known = False

    def learn(self, class_images: Sequence[int]) -> None:
        """Take the frequencies of the classes.

        Args:
            class_images: (classes,) number of training images that have the class.
        """
        counts = torch.as_tensor(class_images, dtype=torch.float32, device=self.weights.device)
        # To the power 0 classes without any image would be drawn as often as others.
        self.weights.copy_(counts**self.config.power * (counts > 0))
        self._known = True

    @torch.no_grad()
    def forward(self, targets: Sequence[Targets]) -> Tensor:
        """(B, classes) bool, the classes with a loss of each image.

        Raises:
            RuntimeError: the frequencies are not known.
        """
        if not self._known:
            raise RuntimeError(
                "query_loss.federated needs the classes' frequencies: start the training with "
                "TrainingState.start(…, class_images=dataset.table.class_images())"
            )
        # A race: the first of independent exponential arrivals, each class at the rate of its
        # weight, are a weighted draw without replacement. Classes with an object start at zero.
        noise = [self._exponential(t) for t in targets]
        arrivals = torch.stack(noise).to(self.weights.device) / self.weights
        for row, t in zip(arrivals, targets, strict=True):
            row[t.labels] = 0.0
        count = min(self.config.classes, arrivals.shape[1])
        last = arrivals.kthvalue(count, dim=1, keepdim=True).values
        return (arrivals <= last) & arrivals.isfinite()

    def _exponential(self, targets: Targets) -> Tensor:
        generator = draw_generator(targets, "federated")
        return torch.empty(len(self.weights)).exponential_(generator=generator)
