"""Hooks that live as long as a ``with`` block."""

from __future__ import annotations

from typing import Self

from torch.utils.hooks import RemovableHandle


class Listener:
    """Hears what modules compute within ``with``; a subclass says which, in :meth:`attach`."""

    _hooks: list[RemovableHandle]

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._hooks = self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
