"""``benchmarks/load.py`` with a handful of trials: it counts, and its report is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from laboratory import PATIENCE

pytestmark = pytest.mark.e2e

LOAD = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.mark.parametrize("through", ["run", pytest.param("sweep", marks=pytest.mark.faults)])
def test_a_few_trials_arrive_once_each(through, tmp_path):
    done = subprocess.run(
        [sys.executable, LOAD, through, "--trials", "3", "--out", "results"],
        cwd=tmp_path, check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").glob(f"load-{through}-*.json")
    report = json.loads(file.read_text())
    assert (report["exit_code"], report["wrong"]) == (0, [])
    assert report["settings"] == {"through": through, "trials": 3, "at_a_time": 4}
    assert report["environment"]["commit"]
