"""Ours and transformers' detector at the same sizes: a training step, and inference.

Our step is :func:`codetr.training.train_epoch` on one batch: with the seeding, the search for
values that are not finite, and the reports that every training has. Theirs is the plain loop:
forward with losses, backward, clip, AdamW. Both sides freeze the stem, the first stage and the
norms of the backbone, use the fused AdamW, and train every decoder layer's losses; ours alone also
trains the encoder's proposals, which transformers leaves without a loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from frame import ROOT

sys.path.insert(0, str(ROOT / "tests" / "peers"))
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

from codetr.config import DataConfig, DetectorConfig, TrainingConfig, parse
from codetr.data import Classes
from codetr.detector import CoDETR
from codetr.structures import Detections, ImageBatch, Targets
from codetr.training import TrainingState, autocast, train_epoch

PEER = "transformers"
HEADS: dict[str, list[str]] = {"K = 0": [], "K = 1": ["atss"], "K = 2": ["atss", "faster_rcnn"]}
PLAIN = "K = 0, plain"
"""Ours without what transformers' detector lacks: learned content, look forward twice."""
CLIP_NORM = 0.1
LEARNING_RATE = 2e-4
TRAINING = {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "drop_epochs": []}

R50: dict[str, Any] = {"backbone": {"pretrained": False}}
"""Co-Deformable-DETR with a ResNet-50 as in the paper: 256 channels, 6 + 6 layers, 300 queries."""
SMALL: dict[str, Any] = {
    "num_classes": 7,
    "backbone": {"name": "resnet18", "pretrained": False},
    "transformer": {
        "embed_dim": 64, "ffn_dim": 96, "attention_heads": 4, "encoder_layers": 1,
        "decoder_layers": 2,
    },
    "queries": {"count": 20},
}  # fmt: skip
"""To try a benchmark, not to measure with."""


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
        detector: ours, without heads, as of a configuration file.
        size: (height, width) of the images in pixels.
        batch: images.
        objects: in each of them.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
    """

    detector: dict[str, Any]
    size: tuple[int, int]
    batch: int
    objects: int
    precision: str = "fp32"
    device: str = "cpu"

    def config(self, contender: str) -> DetectorConfig:
        """Of one of ours; ``PLAIN`` is what transformers has, too."""
        heads = {"heads": HEADS.get(contender, [])}
        config = parse(DetectorConfig, {**self.detector, **heads}, "benchmark")
        if contender not in HEADS:
            from transformers_deformable import expressible

            return expressible(config)
        return config

    def training(self) -> TrainingConfig:
        settings = {**TRAINING, "precision": self.precision, "batch_size": self.batch}
        return parse(TrainingConfig, settings, "benchmark")

    def inputs(self, classes: int) -> tuple[ImageBatch, list[Targets]]:
        """Noise images, with boxes of COCO's spread of sizes."""
        height, width = self.size
        draw = torch.Generator().manual_seed(0)
        targets = []
        for image in range(self.batch):
            centre = torch.rand(self.objects, 2, generator=draw)
            side = 0.05 * 12 ** torch.rand(self.objects, 2, generator=draw)
            boxes = torch.cat((centre - side / 2, centre + side / 2), 1).clamp(0, 1)
            boxes = boxes * torch.tensor([width, height, width, height])
            labels = torch.randint(classes, (self.objects,), generator=draw)
            made = Targets(boxes, labels, image, (height, width), image)
            targets.append(made.to(self.device))
        pixels = torch.randn(self.batch, 3, height, width, generator=draw)
        return ImageBatch(pixels, [self.size] * self.batch).to(self.device), targets


class Ours:
    """Co-Deformable-DETR in training and in use.

    Args:
        task: what to train.
        contender: one of ``HEADS``, or ``PLAIN``.
        compiled: the backbone and the layers of encoder and decoder go through ``torch.compile``,
            layer by layer, for all layers are one program; what has shapes that follow the
            objects (heads, matching, losses) does not.
    """

    def __init__(self, task: Task, contender: str, compiled: bool = False) -> None:
        config = task.config(contender)
        names = tuple(map(str, range(config.num_classes)))
        self.state = TrainingState.start(
            config,
            task.training(),
            DataConfig(),
            Classes(names, tuple(range(1, len(names) + 1))),
            seed=0,
            steps_per_epoch=1,
            device=torch.device(task.device),
        )
        self.inputs = task.inputs(config.num_classes)
        model = self.state.model
        parts = [model.backbone, *model.encoder.layers, *model.decoder.layers]
        for part in parts if compiled else []:
            part.compile()

    def training_step(self) -> float:
        """One step; the total loss before it."""
        report = train_epoch(self.state, [self.inputs])
        assert report is not None
        return report.total

    def inference(self) -> list[Detections]:
        """The 100 best detections of each image."""
        state = self.state
        with autocast(state.training, state.device):
            return state.model.eval().detect(self.inputs[0])


class Theirs:
    """transformers' Deformable DETR of the same sizes in training and in use."""

    def __init__(self, task: Task) -> None:
        from transformers_deformable import build_peer, peer_inputs

        config = task.config(PLAIN)
        torch.manual_seed(0)
        self.model = build_peer(config).to(task.device)
        self.optimizer = torch.optim.AdamW(self._trained(), LEARNING_RATE, fused=True)
        batch, targets = task.inputs(config.num_classes)
        self.inputs = peer_inputs(batch, targets)
        self.sizes = torch.tensor(batch.sizes, device=task.device)
        self.autocast = lambda: autocast(task.training(), torch.device(task.device))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def training_step(self) -> float:
        """One step; the loss before it."""
        self.model.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.model(**self.inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained(), CLIP_NORM)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def inference(self) -> list[dict[str, Tensor]]:
        """The 100 best detections of each image."""
        self.model.eval()
        images = {k: v for k, v in self.inputs.items() if k != "labels"}
        with self.autocast():
            output = self.model(**images)
        return best_of_theirs(output, self.sizes)


def best_of_theirs(output: Any, sizes: Tensor, count: int = 100) -> list[dict[str, Tensor]]:
    """transformers' own choice of detections: scores, labels, boxes in pixels."""
    from transformers import DeformableDetrImageProcessor

    return DeformableDetrImageProcessor().post_process_object_detection(
        output, threshold=0.0, target_sizes=sizes, top_k=count
    )


def build(task: Task, contender: str) -> dict[str, Callable[[], Any]]:
    """What a contender can do, for a process of its own."""
    torch.set_num_threads(2)
    made = Theirs(task) if contender == PEER else Ours(task, contender)
    return {
        "inference": lambda: len(made.inference()),
        "training step": made.training_step,
    }


Pair = tuple[Any, Any]
"""A value of ours, and theirs."""


def computed(task: Task) -> dict[str, Pair]:
    """What both compute from equal weights: of every layer, and in the end."""
    from transformers_deformable import (
        build_peer,
        compute_ours,
        compute_theirs,
        load_peer_weights,
        peer_inputs,
        randomise,
    )

    config = task.config(PLAIN)
    torch.manual_seed(0)
    peer, model = build_peer(config), CoDETR(config)
    randomise(peer)
    load_peer_weights(model, peer)
    peer, model = peer.to(task.device), model.to(task.device)
    batch, targets = task.inputs(config.num_classes)
    with torch.no_grad():
        ours = compute_ours(model.train(), batch, targets)
        theirs = compute_theirs(peer.train(), batch, targets)
        found = model.eval().detect(batch)
        output = peer.eval()(**peer_inputs(batch, targets))
        expected = best_of_theirs(output, torch.tensor(batch.sizes, device=task.device))
    return {
        "logits": (_array(ours.logits), _array(theirs.logits)),
        "boxes": (_array(ours.boxes), _array(theirs.boxes)),
        "losses": (_floats(ours.losses), _floats(theirs.losses)),
        # Detections that tie may change places: the scores, best first, may not.
        "scores": (
            [_array(f.scores) for f in found],
            [_array(e["scores"].sort(descending=True).values) for e in expected],
        ),
        "trained parameters": (_trained(model) + config.transformer.levels * _channels(config),
                               _trained(peer)),
    }  # fmt: skip


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _channels(config: DetectorConfig) -> int:
    """As many biases has one of transformers' neck convolutions; ours have none."""
    return config.transformer.embed_dim


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
