"""Named detectors, and official checkpoints in and out."""

from codetr.zoo.official import from_official_names, to_official_names

__all__ = ["from_official_names", "to_official_names"]
