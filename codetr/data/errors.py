"""What can be wrong with a data set, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; its text names file and id, and says what to do."""

    def __init__(self, text: str) -> None:
        # torch's loader processes raise it anew with a whole traceback as its text; the sentence
        # that was meant stands at its end.
        super().__init__(text.rpartition(f"{__name__}.DataError: ")[2].strip())


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one image or annotation.

    Attributes:
        file: the annotation file.
        what: what is wrong with it, and what to do.
        image_id: the image concerned, where that is known.
        annotation_id: the annotation concerned; None if it is the image itself.
    """

    file: Path
    what: str
    image_id: int | None = None
    annotation_id: int | None = None

    def __str__(self) -> str:
        ids = (("annotation", self.annotation_id), ("image", self.image_id))
        where = ", ".join(f"{name} {value}" for name, value in ids if value is not None)
        return f"{self.file}: {where}: {self.what}" if where else f"{self.file}: {self.what}"


def refuse(problems: Sequence[Problem]) -> None:
    """Do nothing if there are no problems.

    Raises:
        DataError: names the first problem and the number of others.
    """
    if not problems:
        return
    more = f" ({len(problems) - 1} more: see 'codetr data check')" if len(problems) > 1 else ""
    raise DataError(f"{problems[0]}{more}; or leave such images out with --skip-bad")
