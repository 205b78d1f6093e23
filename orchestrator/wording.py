"""How errors of other libraries are told."""

from __future__ import annotations

LENGTH = 200


def one_line(error: BaseException) -> str:
    """An error's text in a line that is not too long; its class where it has none."""
    return " ".join(str(error).split())[:LENGTH] or type(error).__name__
