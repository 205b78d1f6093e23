"""``pytest tests/golden --golden DIR`` compares with another folder of the golden format."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEFAULT = [
    HERE / "co_deformable",
    *(HERE / "co_deformable_edge" / case for case in ("empty1", "allempty", "trunc")),
    HERE / "co_dino",
    *(HERE / "co_dino_edge" / case for case in ("empty1", "allempty", "trunc", "zeropad")),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        action="append",
        help="folder with config.json, inputs.pt, outputs.pt (and model.pt) to compare with; "
        "may be repeated; default: the folders beside these tests",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_folder" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--golden", default=None) or DEFAULT
        metafunc.parametrize(
            "golden_folder",
            folders,
            ids=lambda folder: f"{folder.parent.name}-{folder.name}",
            scope="session",
        )
