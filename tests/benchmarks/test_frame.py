"""No time without agreement: what every benchmark's report refuses, and what its file holds."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import Elsewhere
from frame import (
    RESULTS,
    Disagreement,
    Report,
    alternate,
    environment,
    largest_difference,
    peak_resident_mib,
    show_table,
    timed,
)

SAME = {"a": [1.0, math.nan], "b": np.arange(6.0).reshape(2, 3), "c": torch.eye(2)}


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (SAME, SAME, 0.0),
        (0.25, 0.5, 0.25),
        (99.0, 100.0, 0.01),
        ([1.0, 2.0], [1.0], math.inf),
        ({"a": 1.0}, {"b": 1.0}, math.inf),
        (1.0, math.nan, math.inf),
        (np.zeros((2, 1)), np.zeros((1, 2)), math.inf),
        (np.zeros((0, 4)), np.zeros((0, 4)), 0.0),
        (torch.tensor([0.0, math.nan]), torch.zeros(2), math.inf),
        (torch.tensor([10.0, -2.0]), torch.tensor([10.0, -2.5]), 0.05),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 1 / 3),
    ],
)
def test_difference(ours: Any, theirs: Any, difference: float) -> None:
    assert largest_difference(ours, theirs) == pytest.approx(difference)


def report() -> Report:
    return Report("How fast?", "peer", {"rounds": 2}, ("torch", "no such library"))


SAMPLES = {
    "peer": [{"seconds": 2.0, "peak_mib": 10.0}, {"seconds": 4.0, "peak_mib": 30.0}],
    "ours": [{"seconds": 1.0, "peak_mib": 40.0}, {"seconds": 2.0, "peak_mib": 40.0}],
}


def test_what_disagrees_is_refused() -> None:
    made = report()
    with pytest.raises(Disagreement, match=r"case: boxes of ours and of peer differ by 0\.1, more"):
        made.require_same("case", "boxes", [1.0], [0.9], 0.01)
    with pytest.raises(Disagreement, match="nothing shows"):
        made.add("case", SAMPLES)


def test_what_was_never_compared_is_refused() -> None:
    made = report()
    made.require_same("another case", "boxes", 1.0, 1.0)
    with pytest.raises(Disagreement, match="case: nothing shows that ours and peer compute"):
        made.add("case", SAMPLES)
    made.add("case", SAMPLES, agreed="another case")


def test_medians_ratios_and_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report()
    made.require_same("case", "boxes", 1.0, 1.0 + 1e-9, 1e-6)
    made.add("case", SAMPLES)
    made.note(left_out={})
    content = json.loads(made.finish("name", tmp_path).read_text())
    measured = content["measured"]["case"]
    assert measured["medians"]["peer"] == {"seconds": 3.0, "peak_mib": 20.0}
    assert measured["ratio_to_peer"] == {"ours": {"seconds": 0.5, "peak_mib": 2.0}}
    assert measured["samples"]["ours"]["seconds"] == [1.0, 2.0]
    assert content["agreement"]["case"]["boxes"]["tolerance"] == 1e-6
    assert content["left_out"] == {}
    assert content["environment"]["torch"]
    assert content["environment"]["no such library"] is None
    assert "0.50" in capsys.readouterr().out


def test_contenders_take_turns_and_each_is_first() -> None:
    calls: list[str] = []

    def contender(name: str) -> Any:
        return lambda: calls.append(name) or {"number": float(len(calls))}

    samples = alternate({name: contender(name) for name in "abc"}, rounds=2, warm_up=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert [s["number"] for s in samples["a"]] == [6.0, 8.0]


def test_timed_measures_the_call() -> None:
    calls: list[int] = []
    sample = timed(lambda: calls.append(1))()
    assert calls == [1]
    assert sample.keys() == {"seconds", "cpu_seconds"}
    assert peak_resident_mib() > 10


def test_tables_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show_table("Title", ["a", "b"], [["1", "2"]])
    assert re.sub(r" +", " ", capsys.readouterr().out) == "Title\n a b \n 1 2 \n"


def actions(value: float) -> Any:
    def fail() -> None:
        raise ValueError("in the other process")

    return {"value": lambda: value, "fail": fail}


def test_a_process_of_its_own() -> None:
    with Elsewhere(actions, 2.5) as process:
        value, sample = process.do("value")
        assert value == 2.5
        assert sample["peak_mib"] >= process.built_mib > 0
        with pytest.raises(RuntimeError, match="ValueError: in the other process"):
            process.do("fail")


def test_committed_results_are_complete() -> None:
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        missing = {"date", "environment", "settings"} - content.keys()
        assert not missing, f"{path.name}: {missing}"
        assert content["environment"].keys() >= environment(()).keys(), path.name
        assert content["environment"]["commit"], path.name
        assert "+" not in content["environment"]["commit"], f"{path.name}: uncommitted changes"
        stamp = content["date"][:16].replace("T", "-").replace(":", "")
        assert path.stem.endswith(stamp), path.name
        for case, measured in content.get("measured", {}).items():
            assert content["peer"] in measured["medians"], f"{path.name}: {case}"
