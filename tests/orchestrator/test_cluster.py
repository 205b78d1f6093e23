from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray._private.state import state
from trial_samples import sample_plan

from codetr.config import ConfigError
from orchestrator.cluster import _ENVIRONMENT, _LOCAL_ENVIRONMENT, Cluster
from orchestrator.experiment import Resources


@pytest.fixture
def slots(tmp_path, monkeypatch):
    """How many trials fit on nodes of (CPU, GPU), of which others may come."""
    for key, value in (_ENVIRONMENT | _LOCAL_ENVIRONMENT).items():
        monkeypatch.setenv(key, value)  # taken back afterwards

    def count(*nodes, groups=None, **resources):
        there = [
            {"Alive": True, "Resources": {"CPU": float(cpu)} | ({"GPU": float(gpu)} if gpu else {})}
            for cpu, gpu in nodes
        ]
        lost = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [lost, *there])
        config = groups and SimpleNamespace(
            node_group_configs=[
                SimpleNamespace(resources={"CPU": cpu, "GPU": gpu}, max_count=most)
                for most, cpu, gpu in groups
            ]
        )
        monkeypatch.setattr(state, "get_cluster_config", lambda: config)
        return Cluster(replace(sample_plan(tmp_path), resources=Resources(**resources))).slots()

    return count


def test_trials_fit_on_whole_nodes(slots):
    assert slots((8, 0), workers=2, cpus_per_worker=2) == 2
    assert slots((3, 0), (3, 0), workers=1, cpus_per_worker=2) == 2  # 6 CPUs, but not 3 workers
    assert slots((3, 0), (3, 0), workers=2, cpus_per_worker=2) == 1
    assert slots((96, 8), workers=1, cpus_per_worker=1, gpus_per_worker=0.1) == 80
    assert slots((96, 8), (96, 8), workers=8, cpus_per_worker=8, gpus_per_worker=1) == 2
    assert slots((8, 0), workers=1, cpus_per_worker=1, concurrency=3) == 3


def test_what_does_not_fit_is_told_with_what_is_there(slots):
    with pytest.raises(ConfigError, match=r"2 worker\(s\) of 4 CPUs .* room for 0 \(2 of 3 CPUs"):
        slots((3, 0), (3, 0), workers=2, cpus_per_worker=4)
    with pytest.raises(ConfigError, match=r"8 worker\(s\) of 1 CPUs and 1 GPUs, .* room for 4"):
        slots((64, 4), workers=8, cpus_per_worker=1, gpus_per_worker=1)


def test_nodes_that_an_autoscaler_may_start_count(slots):
    groups = [(0, 0, 0), (4, 96, 8)]  # the head; cluster/aws.yaml's workers
    demand = {"workers": 8, "cpus_per_worker": 8, "gpus_per_worker": 1}
    assert slots((0, 0), groups=groups, **demand) == 4
    assert slots((0, 0), groups=[(-1, 8, 0)], workers=1, cpus_per_worker=8) == 64
    with pytest.raises(ConfigError, match="4 of 96 CPUs, 8 GPUs"):
        slots((0, 0), groups=groups, workers=1, cpus_per_worker=97)


def test_a_range_of_workers_runs_where_the_fewest_have_room(slots):
    assert slots((8, 0), workers="2-8") == 1
    assert slots((3, 0), workers="2-8") == 1
    assert slots((16, 0), (8, 0), workers="2-8") == 3
    with pytest.raises(ConfigError, match=r"needs 2 worker\(s\) of 1 CPUs"):
        slots((1, 0), workers="2-8")
