"""How errors of other libraries are told, and addresses that hold a secret."""

from __future__ import annotations

import re
from urllib.parse import unquote

LENGTH = 200
MASK = "***"
"""Stands for a secret in what is shown or kept."""

_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # scheme://user:SECRET@host, whatever the secret is made of: up to the last @.
        r"(://[^:/\s]*:)(?P<secret>\S+)(@)",
        # https://TOKEN:@host, and https://TOKEN@host. What stands there in the address of another
        # scheme is a user, or a container of a store.
        r"(://)(?P<secret>[^:/?#@\s]+)(:@)",
        r"(https?://)(?P<secret>[^:/?#@\s]+)(@)",
        # ?password=SECRET, &sslpassword=SECRET, and what clouds call theirs.
        r"([?&;](?:\w*pass(?:word|wd|phrase)?|pwd|odbc_connect|sig|[\w-]*signature"
        r"|[\w-]*(?:token|secret|credentials?|(?:api|access|account|secret)[-_]?key)[\w-]*|key)=)"
        r"(?P<secret>[^&\s]+)()",
    )
)
_SHORTEST = 4
"""Shorter parts of a secret are parts of too many other words."""


def one_line(text: object, *addresses: str | None) -> str:
    """An error's text in a line that is not too long, without a secret; its class where it has
    none.

    Args:
        addresses: as for :func:`without_secrets`.
    """
    line = without_secrets(" ".join(str(text).split()), *addresses)[:LENGTH]
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")


def without_secrets(text: str, *addresses: str | None) -> str:
    """``postgresql://me:secret@host`` -> ``postgresql://me:***@host``, and so wherever else an
    address may hold a secret: rather a word too much is hidden than one too few.

    Args:
        addresses: whose secrets may stand in the text by themselves, whole or in parts.
    """
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{MASK}\g<3>", text)
    for secret in (secret for address in addresses for secret in _secrets(address or "")):
        text = text.replace(secret, MASK)
    return text


def has_secret(text: str) -> bool:
    """Whether it is not what may be shown of it."""
    return without_secrets(text) != text


def _secrets(address: str) -> list[str]:
    """Every secret of an address and its parts, the longest first."""
    whole = [found["secret"] for pattern in _SECRETS for found in pattern.finditer(address)]
    whole += [unquote(secret) for secret in whole]
    parts = [part for secret in whole for part in re.split(r"[@:/?#&=;]", secret)]
    return sorted({s for s in (*whole, *parts) if len(s) >= _SHORTEST and s != MASK}, key=len)[::-1]
