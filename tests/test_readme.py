"""What README tells its readers to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import start, tiny_detector, tiny_training
from typer.testing import CliRunner

from codetr.data.digits import make_digits
from codetr.structures import ImageBatch, Targets
from codetr.weights import Weights, save_weights
from orchestrator.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^    (codetr .*?)(?:\s+#.*)?$", README, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "digits"
    make_digits(folder, train_images=16, val_images=4)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("codetr run")])
def test_runs_can_be_planned(
    command: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(re.sub(r"/data/\w+", str(digits), command))[1:]
    if "paper" in words and "--address" not in words:
        words += ["--address", "127.0.0.1:6379"]  # this machine may have no eight GPUs
    result = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "trial" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    name = words[: 2 if words[0] == "data" else 1]
    text = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200"}).output
    for option in (word for word in words if word.startswith("--")):
        assert option in text, option


def test_the_block_that_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = start(tiny_detector("atss"), tiny_training(), 1).checkpoint()
    save_weights(Weights.of(checkpoint), tmp_path / "model.safetensors")
    Image.new("RGB", (64, 48)).save("image.jpg")
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    assert len(names["found"]) > 0  # type: ignore[arg-type]
    assert len(BLOCKS[0].splitlines()) <= 5


def test_the_block_that_trains() -> None:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 30.0]])
    names: dict[str, object] = {
        "images": ImageBatch(torch.randn(1, 3, 64, 64), [(64, 64)]),
        "targets": [Targets(boxes, torch.tensor([1]))],
    }
    # Weights from a hub are another test's.
    exec(BLOCKS[1].replace("num_classes", 'backbone={"pretrained": False}, num_classes'), names)
    assert len(names["detections"]) == 1  # type: ignore[arg-type]
