"""Files that are there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codetr.config import ConfigError
from orchestrator.wording import one_line


def write_whole(path: Path, text: str) -> Path:
    """Write a file in the place of what was there; whatever happens meanwhile, one of the two is
    there afterwards, and nothing else.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        return draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def is_left(path: Path) -> bool:
    """Whether someone has left that file; while the file server is away, nobody has yet."""
    try:
        return path.exists()
    except OSError:
        return False


def read_json(path: Path, advice: str) -> Any:
    """What a file of JSON holds.

    Args:
        advice: what it costs that it is damaged, and what to do.

    Raises:
        ConfigError: it is damaged; names it, with the advice.
        FileNotFoundError: there is none.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({one_line(error)}): {advice}") from None


def not_writable(folder: Path, error: OSError) -> ConfigError:
    """What to tell the user of it."""
    return ConfigError(f"--output: cannot write {folder}: {error.strerror}")


def as_far_as_possible(
    say: Callable[[str], None], write: Callable[..., list[Path]], *arguments: Any
) -> list[Path]:
    """What ``write(*arguments)`` has written; where the disk does not take it, or a file that it is
    made of is damaged, that is said, and costs nothing else."""
    try:
        return write(*arguments)
    except OSError as error:
        say(f"cannot write {error.filename or 'a file'}: {error.strerror or error}")
    except ConfigError as error:
        say(str(error))
    return []
