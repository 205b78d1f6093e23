"""What every configuration shares: frozen models that name what is wrong."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be used; its text names the key and what to do."""


def nearest(word: str, valid: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``valid``, else the list of valid words."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(sorted(valid))}"


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, whose nearest it names, and infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key '{key}'; {nearest(key, [*cls.model_fields])}")
        return data
