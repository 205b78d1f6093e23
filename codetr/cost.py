"""What a training costs: time, processor time, memory, parameters."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from codetr.distributed import world_max, world_sum


@dataclass(frozen=True)
class Cost:
    """What a piece of work took, over all its workers. Costs of consecutive pieces add up.

    Attributes:
        seconds: wall time.
        core_seconds: processor time of all workers and of their loaders' processes.
        gpu_seconds: wall time multiplied by the number of GPUs; 0 on CPUs.
        peak_memory: bytes that the largest worker held: of GPU memory, or resident on a CPU.
    """

    seconds: float = 0.0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            seconds=self.seconds + other.seconds,
            core_seconds=self.core_seconds + other.core_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
            peak_memory=max(self.peak_memory, other.peak_memory),
        )


class CostMeter:
    """Measures from its creation to :meth:`read`; every rank must read it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._seconds, self._core_seconds = time.perf_counter(), _processor_seconds()

    def read(self) -> Cost:
        """The cost so far of all ranks together: the slowest one's time, the largest's memory."""
        seconds = time.perf_counter() - self._seconds
        gpus = float(self.device.type == "cuda")
        # Microseconds, because only whole numbers are compared over ranks.
        longest = world_max(round(seconds * 1e6), self.device) / 1e6
        sums = torch.tensor(
            [_processor_seconds() - self._core_seconds, gpus], dtype=torch.float64
        ).to(self.device)
        core_seconds, gpus = world_sum(sums).tolist()
        peak = world_max(_peak_memory(self.device), self.device)
        return Cost(longest, core_seconds, longest * gpus, peak)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a detector, frozen ones included: the heads and the transforms of their
    positive queries exist in training alone."""

    training: int
    inference: int

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Count those of a :class:`~codetr.detector.CoDETR`."""
        return cls(
            training=sum(p.numel() for p in model.parameters()),
            inference=sum(p.numel() for p in model.inference_parameters()),  # type: ignore[operator]
        )


def _processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
