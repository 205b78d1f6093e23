"""What all benchmarks share: equal results before any time, turns, ratios, dated files.

A benchmark makes a :class:`Report`, shows it that ours and the peer compute the same, and adds what
it measured of both; what has not been shown to agree is refused. Needs nothing but Python (rich
where there is one), for it also serves machines that have the detector's dependencies alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Sample = Mapping[str, float]
"""One measurement: quantities by name, their unit in the name."""


# ---------------------------------------------------------------------------- computing the same


class Disagreement(SystemExit):
    """Ours and the peer compute different things: their times must not be compared."""


def largest_difference(ours: Any, theirs: Any) -> float:
    """Of two equally built values: numbers, arrays or tensors, and lists and dicts of those.

    It is relative to their size where that is more than one. A NaN equals a NaN, but not within an
    array; what differs in shape or keys differs infinitely.
    """
    if isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            return math.inf
        return max((largest_difference(ours[k], theirs[k]) for k in theirs), default=0.0)
    if isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return math.inf
        return max(map(largest_difference, ours, theirs), default=0.0)
    if hasattr(theirs, "shape") and theirs.shape:
        return _difference_of_arrays(ours, theirs)
    return _difference_of_numbers(float(ours), float(theirs))


def _difference_of_numbers(ours: float, theirs: float) -> float:
    if math.isnan(ours) and math.isnan(theirs):
        return 0.0
    return _relative(abs(ours - theirs), abs(theirs))


def _difference_of_arrays(ours: Any, theirs: Any) -> float:
    if tuple(ours.shape) != tuple(theirs.shape):
        return math.inf
    if 0 in theirs.shape:
        return 0.0
    return _relative(float(abs(ours - theirs).max()), float(abs(theirs).max()))


def _relative(difference: float, size: float) -> float:
    return math.inf if math.isnan(difference) else difference / max(size, 1.0)


# -------------------------------------------------------------------------------------- measuring


def timed(call: Callable[[], Any]) -> Callable[[], Sample]:
    """``call`` as something to measure on a CPU: wall and processor seconds."""

    def measure() -> Sample:
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        call()
        return {
            "seconds": time.perf_counter() - seconds,
            "cpu_seconds": time.process_time() - cpu_seconds,
        }

    return measure


def alternate(
    contenders: Mapping[str, Callable[[], Sample]], rounds: int, warm_up: int = 1
) -> dict[str, list[Sample]]:
    """``rounds`` samples of each contender, taken in turns, each round with another one first.

    A machine's other work then slows all of them alike. The first ``warm_up`` rounds do not count.
    """
    names = [*contenders]
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sample = contenders[name]()
            if number >= warm_up:
                samples[name].append(sample)
    return samples


def peak_resident_mib() -> float:
    """The most memory that this process has held since it began."""
    try:  # getrusage also counts what the process was forked from
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -------------------------------------------------------------------------------------- reporting


@dataclass
class Report:
    """What a benchmark found, case by case.

    Attributes:
        question: that the benchmark answers.
        peer: whom ratios refer to, one of the contenders.
        settings: what it was asked for.
        libraries: whose versions matter.
        machine: what else is to be said of it, such as its GPU.
    """

    question: str
    peer: str
    settings: dict[str, Any]
    libraries: Sequence[str] = ()
    machine: dict[str, Any] = field(default_factory=dict)
    _agreement: dict[str, dict[str, Any]] = field(default_factory=dict)
    _measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    _extra: dict[str, Any] = field(default_factory=dict)

    def require_same(
        self, case: str, what: str, ours: Any, theirs: Any, tolerance: float = 0.0
    ) -> None:
        """Note that both computed the same ``what``, to ``tolerance``.

        Raises:
            Disagreement: they did not.
        """
        difference = largest_difference(ours, theirs)
        if not difference <= tolerance:
            raise Disagreement(
                f"{case}: {what} of ours and of {self.peer} differ by {difference:.3g}, more than "
                f"{tolerance:.3g}: what they take cannot be compared"
            )
        of_case = self._agreement.setdefault(case, {})
        of_case[what] = {"difference": _short(difference), "tolerance": tolerance}

    def add(self, case: str, samples: Mapping[str, Sequence[Sample]], agreed: str = "") -> None:
        """Medians of every contender's samples, and their ratios to the peer's.

        Args:
            case: what was measured.
            samples: by contender, with the peer among them.
            agreed: the case that the agreement was shown for, if it is another.

        Raises:
            Disagreement: nobody showed that they compute the same.
        """
        if not self._agreement.get(agreed or case):
            raise Disagreement(f"{case}: nothing shows that ours and {self.peer} compute the same")
        medians = {
            name: {key: _short(median(s[key] for s in of_name)) for key in of_name[0]}
            for name, of_name in samples.items()
        }
        theirs = medians[self.peer]
        ratios = {
            name: {key: _short(value / theirs[key]) for key, value in own.items() if theirs[key]}
            for name, own in medians.items()
            if name != self.peer
        }
        spread = {
            name: {key: [_short(s[key]) for s in of_name] for key in of_name[0]}
            for name, of_name in samples.items()
        }
        self._measured[case] = {
            "medians": medians,
            f"ratio_to_{self.peer}": ratios,
            "samples": spread,
        }

    def note(self, **values: Any) -> None:
        """Something else worth knowing, by name."""
        self._extra |= values

    def content(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "peer": self.peer,
            "environment": {**environment(self.libraries), **self.machine},
            "settings": self.settings,
            "agreement": self._agreement,
            "measured": self._measured,
            **self._extra,
        }

    def finish(self, name: str, folder: Path) -> Path:
        """Show the tables and write the file."""
        for title, header, rows in tables_of(self.content()):
            show_table(title, header, rows)
        file = write_result(name, self.content(), folder)
        print(f"written to {file}")
        return file


Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables_of(content: dict[str, Any]) -> list[Table]:
    """One table for each set of quantities: cases by contenders, with medians of each quantity and,
    beside it, its multiple of the peer's."""
    peer = content["peer"]
    tables: dict[tuple[str, ...], Table] = {}
    for case, measured in content["measured"].items():
        keys = tuple(measured["medians"][peer])
        columns = [column for k in keys for column in (k.replace("_", " "), f"× {peer}")]
        _, _, rows = tables.setdefault(keys, (content["question"], ["", "", *columns], []))
        for contender, values in measured["medians"].items():
            ratios = measured[f"ratio_to_{peer}"].get(contender, {})
            cells = [
                cell
                for k in keys
                for cell in (f"{values[k]:g}", f"{ratios[k]:.2f}" if k in ratios else "")
            ]
            rows.append([case, contender, *cells])
    return [*tables.values()]


def show_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, plainly where there is no rich."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(title)
        for row in (header, *rows):
            print("  " + "  ".join(cell.ljust(18) for cell in row))
        return
    table = RichTable(*header, title=title)
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    Console(width=max(110, Console().width)).print(table)


def arguments(doc: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: ``--out``, and numbers with these defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a result file says of its options: no paths, they are the machine's."""
    return {k: v for k, v in vars(options).items() if not isinstance(v, Path) and v is not None}


# ------------------------------------------------------------------------------- dated result files


def environment(libraries: Iterable[str]) -> dict[str, Any]:
    """The commit, the processor, and the versions of Python and these libraries."""
    return {
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{library: _version(library) for library in libraries},
    }


def write_result(name: str, report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME-DATE.json``, with the date first."""
    now = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{now:%Y-%m-%d-%H%M}.json"
    content = {"date": now.isoformat(timespec="seconds"), **report}
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return file


def _short(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """Its maker's name for it where the system tells, else its architecture."""
    try:
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
