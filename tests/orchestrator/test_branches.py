"""Each auxiliary head on its own, as a trial's workers measure it after the last epoch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from codetr.config import DataConfig, DetectorConfig
from codetr.cost import Cost
from codetr.data import build_loader, open_dataset
from codetr.structures import Detections
from orchestrator.board import Epoch
from orchestrator.experiment import load_experiment, paper_branch_aps
from orchestrator.records import Record
from orchestrator.worker import _Training


class Oracle(nn.Module):
    """Stands in for a detector whose first head finds every object and whose second finds none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def loader(self, dataset, *, training):
        self.loaded = build_loader(dataset, 3, training=training)
        return self

    def __len__(self):
        return len(self.loaded)

    def __iter__(self):
        for batch, targets in self.loaded:
            self.targets = targets
            yield batch, targets

    def detect(self, _batch, branch):
        assert not self.training
        shown = {"atss": slice(None), "atss_2": slice(0)}[branch]
        return [
            Detections(t.boxes[shown], torch.ones(len(t))[shown], t.labels[shown])
            for t in self.targets
        ]


def test_every_head_is_measured_on_its_own_a_repeated_one_by_its_number(coco_folder):
    oracle, told = Oracle(), []
    training = SimpleNamespace(
        trial=SimpleNamespace(
            detector=DetectorConfig(heads=["atss", "atss"]), data=SimpleNamespace(engine="hotcoco")
        ),
        state=SimpleNamespace(evaluated=oracle, cost=Cost()),
        val_set=open_dataset(DataConfig(path=coco_folder, short_sides=()), "val"),
        build_loader=oracle.loader,
        tell=told.append,
    )
    values = _Training._branch_values(training, SimpleNamespace(epoch=4, steps=2))
    assert values["branch/atss/AP"] == pytest.approx(1)
    assert values["branch/atss_2/AP"] == 0
    assert {name.split("/")[1] for name in values} == {"atss", "atss_2"}
    assert not any("AP_large" in name for name in values)  # undefined: nothing is large
    assert [progress.stage for progress in told] == ["evaluating atss", "evaluating atss_2"]
    assert training.state.cost.seconds > 0


@pytest.mark.parametrize(
    ("name", "arm", "heads", "expected"),
    [
        ("branches", "K=0", (), {}),
        ("branches", "K=1 ATSS", ("atss",), {"atss": 47.4}),
        # The paper has no number for Faster R-CNN with K = 1, nor any for a repeated head.
        ("branches", "K=1 ATSS", ("faster_rcnn", "atss_2"), {}),
        (
            "branches",
            "K=2 ATSS + Faster R-CNN",
            ("atss", "faster_rcnn"),
            {"atss": 48.0, "faster_rcnn": 46.7},
        ),
        ("ablation-k", "K=1 ATSS", ("atss",), {}),  # its table tells no branches apart
    ],
)
def test_the_papers_numbers_of_branches(name, arm, heads, expected):
    assert paper_branch_aps(load_experiment(name), arm, heads) == expected


def test_compare_sees_them_in_percent():
    values = {"val/AP": 0.25, "branch/atss/AP": 0.5, "cost/core_hours": 2.0, "train/total": 9.0}
    record = Record("e", Path("a.seed0.b"), "a", 0, "finished", history=(Epoch(1, 1, values),))
    assert record.metrics == {"AP": 25.0, "branch/atss/AP": 50.0, "core_hours": 2.0}
