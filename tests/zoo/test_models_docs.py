"""What docs/models.md shows is valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch
import yaml
from typer.testing import CliRunner

from codetr.config import parse
from codetr.zoo.catalogue import Entry
from codetr.zoo.conversion import DROPPED
from orchestrator.cli import app

TEXT = (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_the_file_of_a_detector() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    settings = {k: v for k, v in yaml.safe_load(text).items() if k != "measured"}
    shown = parse(Entry, {"name": "shown", **settings}, "docs")
    assert shown.config.k == 1
    assert shown.config.queries.count == 900
    assert shown.data_config.max_side == 1333


def test_names_in_python() -> None:
    block = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    offline = block.replace('"co-dino-5scale-r50")', '"co-dino-5scale-r50", pretrained=False)')
    with torch.device("meta"):
        exec(offline, names := {})
    assert names["model"].config.k == 2  # type: ignore[attr-defined]


def test_commands_and_options_exist() -> None:
    commands = re.findall(r"^ +(codetr .*)$", TEXT, re.MULTILINE)
    commands += re.findall(r"`(codetr [a-z]+ [^`]*)`", TEXT)
    assert len(commands) > 6
    for command in commands:
        words = shlex.split(command)[1:]
        result = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert all(word in result.output for word in words if word.startswith("--"))


def test_every_rule_is_told() -> None:
    told = ("mask_head.", "mask_iou_head.", "ema_", "relative_position_index", "freqs_cos")
    assert all(name in TEXT for name in told)
    assert len(DROPPED) == 4
