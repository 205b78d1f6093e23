"""An installed wheel does what a checkout does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout is installed, without dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("codetr-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


def codetr(installed: Path, *arguments: str) -> str:
    """What the installed command prints, run where no checkout is near."""
    result = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments],
        cwd=installed,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_carries_experiments_and_cluster_files(installed: Path) -> None:
    for folder in ("experiments", "cluster"):
        shipped = {f.relative_to(ROOT / folder) for f in (ROOT / folder).rglob("*.yaml")}
        packed = installed / "orchestrator" / "share" / folder
        assert shipped
        assert {f.relative_to(packed) for f in packed.rglob("*.yaml")} == shipped


def test_lists_the_experiments_of_the_checkout(installed: Path) -> None:
    listed = codetr(installed, "experiments")
    for file in (ROOT / "experiments").glob("*.yaml"):
        assert file.stem in listed


def test_plans_without_a_checkout(installed: Path) -> None:
    plan = codetr(installed, "run", "ablation-k", "--dry-run", "--profile", "laptop")
    assert "K=2" in plan
    assert str(installed) in plan  # the output folder is where the user is


def test_carries_the_zoo(installed: Path) -> None:
    for file in (ROOT / "codetr/zoo").rglob("*.yaml"):
        assert (installed / file.relative_to(ROOT)).is_file()
    assert "queries:" in codetr(installed, "models", "co-dino-5scale-r50")
