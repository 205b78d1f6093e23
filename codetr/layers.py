"""Settings in layers: plain mappings laid over one another before they are validated."""

from __future__ import annotations

from typing import Any

from codetr.config import HEAD_CONFIGS, HEAD_TYPES, ConfigError, nearest, parse

Settings = dict[str, Any]


def merge(below: Settings, above: Settings) -> Settings:
    """``above`` laid over ``below``, key by key in nested mappings; lists are replaced."""
    merged = dict(below)
    for key, value in above.items():
        beneath = merged.get(key)
        if isinstance(beneath, dict) and isinstance(value, dict):
            merged[key] = merge(beneath, value)
        else:
            merged[key] = value
    return merged


def with_heads(detector: Settings, heads: dict[str, Settings], source: str) -> Settings:
    """The detector's settings, its heads with those that are given for their kind.

    Raises:
        ConfigError: there is no such kind, or settings of one that is not among the heads make no
            sense; names ``source``. Those of the heads are checked with the detector.
    """
    for kind in heads:
        if kind not in HEAD_TYPES:
            raise ConfigError(f"{source}: heads: no head '{kind}'; {nearest(kind, [*HEAD_TYPES])}")
    listed = detector.get("heads", [])
    if not isinstance(listed, list):
        return detector  # refused by the detector's own check, with a better text
    named = [{"type": head} if isinstance(head, str) else head for head in listed]
    full = [
        merge(heads.get(str(head.get("type")), {}), head) if isinstance(head, dict) else head
        for head in named
    ]
    used = [head.get("type") for head in named if isinstance(head, dict)]
    for kind in (kind for kind in heads if kind not in used):
        parse(HEAD_CONFIGS[kind], heads[kind], f"{source}: heads.{kind}")
    return {**detector, "heads": full}
