"""Markdown tables from the newest result file of each benchmark, for docs/performance.md.

    python benchmarks/tables.py                               # all of them
    python benchmarks/tables.py --update docs/performance.md  # those between its markers

In the document, the table of a benchmark stands between ``<!-- benchmark NAME -->`` and
``<!-- end -->``; a test keeps it equal to what this prints.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from frame import RESULTS, tables_of

FILE = re.compile(r"(?P<name>\w+)-\d{4}-\d{2}-\d{2}-\d{4}\.json")
SECTION = re.compile(r"(<!-- benchmark (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--update", type=Path, help="a document with markers")
    options = parser.parse_args()
    if options.update:
        options.update.write_text(updated(options.update.read_text(), options.results))
        return 0
    for name in newest(options.results):
        print(f"## {name}\n\n{section(name, options.results)}")
    return 0


def newest(folder: Path = RESULTS) -> dict[str, Path]:
    """The last result file of each benchmark that compares with a peer, by the benchmark's name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        match = FILE.fullmatch(path.name)
        if match and "measured" in json.loads(path.read_text()):
            found[match["name"]] = path
    return found


def section(name: str, folder: Path = RESULTS) -> str:
    """What stands between a document's markers.

    Raises:
        SystemExit: the benchmark has no result file.
    """
    path = newest(folder).get(name)
    if path is None:
        raise SystemExit(f"{folder}: no result of benchmark '{name}'; run it first")
    content = json.loads(path.read_text())
    tables = [*(t[1:] for t in tables_of(content)), *beside(content)]
    return "\n".join(f"{markdown(header, rows)}\n" for header, rows in tables) + (
        f"\n{provenance(content, path.name)}\n"
    )


def updated(document: str, folder: Path = RESULTS) -> str:
    """The document with the newest tables between its markers."""
    return SECTION.sub(lambda m: f"{m[1]}\n{section(m[2], folder)}\n{m[4]}", document)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    numbers = [False, False, *[True] * (len(header) - 2)]
    rule = ["---:" if number else "---" for number in numbers[: len(header)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def beside(content: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """What a GPU's result has more: shares of the floor, memory beside the paper's."""
    tables = []
    if shares := content.get("share_of_floor"):
        names = [*next(iter(shares.values()))]
        header = ["share of the floor", "floor, seconds", *names]
        tables.append((header, [floor_row(case, content, names) for case in shares]))
    if ratios := content.get("memory_beside_paper"):
        keys = [*dict.fromkeys(key for row in ratios.values() for key in row)]
        header = ["multiples of K = 0", "", *(k.replace("_", " ") for k in keys)]
        rows = [[k, "", *(f"{row[key]:.2f}" if key in row else "" for key in keys)]
                for k, row in ratios.items()]  # fmt: skip
        tables.append((header, rows))
    return tables


def floor_row(case: str, content: dict[str, Any], names: list[str]) -> list[str]:
    floor = content["floors"][case]["seconds"]
    shares = content["share_of_floor"][case]
    return [case, f"{floor:.2g}", *(f"{100 * shares[name]:.0f} %" for name in names)]


def provenance(content: dict[str, Any], file: str) -> str:
    """Where the numbers come from, in one line."""
    known = content["environment"]
    machine = known.get("gpu") or f"{known['cores']} cores of {known['processor']}"
    skipped = {"commit", "processor", "cores", "gpu"}
    versions = ", ".join(f"{k} {v}" for k, v in known.items() if k not in skipped and v)
    missing = {**content.get("left_out", {}), **content.get("failed", {})}
    note = f" Not measured: {', '.join(missing)}." if missing else ""
    return (
        f"Medians, on {machine}; {versions}; commit {known['commit']}, {content['date'][:10]} "
        f"(`benchmarks/results/{file}`).{note}"
    )


if __name__ == "__main__":
    sys.exit(main())
