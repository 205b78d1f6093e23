"""The tables of the documents are the newest result files'."""

from __future__ import annotations

from pathlib import Path

import pytest
from frame import Report, write_result
from tables import newest, section, updated

DOCS = Path(__file__).parents[2] / "docs"


def write(folder: Path, name: str, seconds: float) -> Path:
    report = Report("How fast?", "peer", {})
    report.require_same("case", "boxes", 1.0, 1.0)
    report.add("case", {"peer": [{"seconds": 2.0}], "ours": [{"seconds": seconds}]})
    report.note(left_out={"inference": "no time"})
    return write_result(name, report.content(), folder)


def test_the_newest_file_counts(tmp_path: Path) -> None:
    old = write(tmp_path, "step", 1.0)
    old.rename(tmp_path / "step-2020-01-01-0000.json")
    new = write(tmp_path, "step", 0.5)
    (tmp_path / "load-2021-01-01-0000.json").write_text('{"date": "", "trials": 500}')
    assert newest(tmp_path) == {"step": new}
    text = section("step", tmp_path)
    assert text.splitlines()[:4] == [
        "|  |  | seconds | × peer |",
        "| --- | --- | ---: | ---: |",
        "| case | peer | 2 |  |",
        "| case | ours | 0.5 | 0.25 |",
    ]
    assert new.name in text
    assert "Not measured: inference." in text


def test_a_document_between_its_markers(tmp_path: Path) -> None:
    write(tmp_path, "step", 1.0)
    document = "# Speed\n\n<!-- benchmark step -->\nold\n<!-- end -->\n\nWords stay.\n"
    new = updated(document, tmp_path)
    assert "| case | ours | 1 | 0.50 |" in new
    assert "old" not in new
    assert new.startswith("# Speed\n")
    assert new.endswith("\nWords stay.\n")
    assert updated(new, tmp_path) == new
    with pytest.raises(SystemExit, match="no result of benchmark 'other'"):
        updated(document.replace("step", "other"), tmp_path)


@pytest.mark.parametrize("name", ["performance.md", "analysis.md"])
def test_the_documents_tables_are_those_of_the_results(name: str) -> None:
    text = (DOCS / name).read_text()
    assert "<!-- benchmark " in text
    assert updated(text) == text
