"""The trainer leaves out what a trial does not need, and nothing else."""

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from orchestrator.trainer import LeanTrainer

UNNEEDED = ["DatasetsCallback", "PlacementGroupCleanerCallback"]


def callbacks_of(kind, **options) -> list[str]:
    scaling = ray.train.ScalingConfig(num_workers=1)
    trainer = kind(lambda: None, scaling_config=scaling, **options)
    return sorted(type(one).__name__ for one in trainer._create_default_callbacks())


@pytest.mark.parametrize(("has_dashboard", "without"), [(True, UNNEEDED[:1]), (False, UNNEEDED)])
def test_all_of_rays_callbacks_but_the_unneeded(has_dashboard, without):
    ours = callbacks_of(LeanTrainer, has_dashboard=has_dashboard)
    assert sorted([*ours, *without]) == callbacks_of(TorchTrainer)
