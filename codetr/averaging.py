"""An exponential moving average of the weights, which detects better than the weights themselves.

The averaging is torch's. As in the original (``ExpMomentumEMAHook`` of the record model), the
average begins as the weights and becomes slower: after step t it keeps
``ema * (1 - exp(-t / ema_warmup))`` of itself, and so forgets where it began.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from codetr.config import TrainingConfig

if TYPE_CHECKING:
    from codetr.detector import CoDETR


def decay_after(step: int, config: TrainingConfig) -> float:
    """What share of itself the average keeps after that step, counted from 1; 0 without ``ema``."""
    approach = math.exp(-step / config.ema_warmup) if config.ema_warmup else 0.0
    return (config.ema or 0.0) * (1 - approach)


def begin_average(model: CoDETR, config: TrainingConfig) -> AveragedModel | None:
    """The average of no weights yet; None without ``ema``. Draws nothing.

    Its buffers are always those of the model: batch norm's statistics are averages already, and
    counters and indices are nothing to average.
    """
    return AveragedModel(model).requires_grad_(False) if config.ema is not None else None


def advance_average(
    average: AveragedModel, model: CoDETR, step: int, config: TrainingConfig
) -> None:
    """Take in the weights as they are after that step, counted from 1."""
    average.multi_avg_fn = get_ema_multi_avg_fn(decay_after(step, config))
    average.update_parameters(model)
