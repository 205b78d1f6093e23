"""Another user of the machine reaches the ports of a local Ray, and is sent away."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[1] / "orchestrator"
START = """
from pathlib import Path
from trial_samples import sample_plan
from orchestrator.cluster import Cluster

cluster = Cluster(sample_plan(Path("runs")))
cluster.start()
import ray  # not before the cluster has set its environment
print(ray.get_runtime_context().gcs_address, flush=True)
input()
cluster.stop(keep_logs=False)
"""
ASK = """
import sys
from ray._raylet import GcsClient

print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
"""


@pytest.mark.e2e
def test_a_local_ray_asks_for_its_token(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # where there is no token
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SAMPLES), *filter(None, sys.path)]))

    def ask(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ASK, address]
        own = {**os.environ, **environment}
        return subprocess.run(
            command, env=own, capture_output=True, text=True, timeout=60, check=False
        )

    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=-1, stdout=-1, text=True, cwd=tmp_path
    ) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        address = started.stdout.readline().strip()
        assert address.startswith("127.0.0.1:")
        assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
        assert ask(RAY_AUTH_MODE="token").stdout == "1\n"  # one node
        for stranger in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {}):
            refused = ask(**{"RAY_AUTH_MODE": "disabled", **stranger})
            assert refused.returncode != 0
            assert "InvalidAuthToken" in refused.stderr
        started.stdin.write("\n")
    assert started.returncode == 0
