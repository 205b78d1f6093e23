"""The zoo of names: each is one small YAML file in this folder, composed of the parts below it.

A file says which parts it is made of, what it changes of them, and what the paper and the released
checkpoints reach with it. Nothing here imports torch: names are listed within a moment, and what
must be measured on the built detector stands in the file (``python -m codetr.zoo.measure`` writes
it, and a test repeats it).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from codetr.config import (
    ConfigError,
    DataConfig,
    DetectorConfig,
    JitterConfig,
    Strict,
    nearest,
    parse,
    read_yaml,
)
from codetr.layers import Settings, merge, with_heads

FOLDER = Path(__file__).parent

CLASSES = {"coco": 80, "lvis": 1203}
"""Number of classes of each data set that detectors are published for."""


class ImageSize(Strict):
    """To what images are resized, in pixels: the short side, but the long one at most so much."""

    short_side: PositiveInt = 800
    max_side: PositiveInt = 1333
    canvas: PositiveInt | None = None
    """In place of both: the side of a square that images are fitted to. What they leave of it is
    grey and, to the detector, image, as where it was trained with large-scale jitter."""


class Published(Strict):
    """An AP that was published for a detector."""

    source: Literal["table 2", "table 3", "table 4", "table 5", "table 6", "released"]
    """Of the paper, or of the list of released checkpoints."""
    ap: PositiveFloat
    """Box AP in percent, on the validation images unless ``note`` says otherwise."""
    epochs: PositiveInt | None = None
    note: str = ""


class Measured(Strict):
    """What the built detector has."""

    inference_parameters: PositiveInt
    training_parameters: PositiveInt
    """With all that training adds; frozen ones too."""
    gflops: PositiveFloat
    """Of inference in one image of 800 x 1333 pixels; see :func:`codetr.zoo.measure.gflops`."""


class Part(Strict):
    """Settings that several detectors share."""

    detector: Settings = Field(default_factory=dict)
    heads: dict[str, Settings] = Field(default_factory=dict)
    """Settings of auxiliary heads by their kind, for detectors that only name them."""
    image: Settings = Field(default_factory=dict)
    """See :class:`ImageSize`; what the published AP was measured with."""

    @property
    def settings(self) -> Settings:
        return {"detector": self.detector, "heads": self.heads, "image": self.image}


class Entry(Part):
    """A named detector."""

    name: str
    parts: tuple[str, ...] = ()
    """Files in ``parts/``, laid over one another in this order, beneath the file's own settings."""
    data: Literal["coco", "lvis"] = "coco"
    published: tuple[Published, ...] = ()
    official: tuple[str, ...] = ()
    """Names of the original's configurations whose checkpoints it is; the files are named so."""
    measured: Measured | None = None
    unavailable: str | None = None
    """Why the detector cannot be built, where it is listed for its published AP alone."""

    @model_validator(mode="after")
    def _built_or_not(self) -> Self:
        if self.unavailable and (self.detector or self.parts or self.measured):
            raise ValueError("unavailable, and yet with settings: remove the one or the other")
        return self

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.yaml"

    @property
    def layer(self) -> Settings:
        """The settings ``detector``, ``heads`` and ``image``: the parts', then its own.

        Raises:
            ConfigError: the detector is unavailable, or a part does not exist.
        """
        if self.unavailable is not None:
            raise ConfigError(f"detector '{self.name}' cannot be built: {self.unavailable}")
        merged = Part().settings
        for part in self.parts:
            merged = merge(merged, _part(part, str(self.file)).settings)
        return merge(merged, self.settings)

    @property
    def config(self) -> DetectorConfig:
        """The detector, with the classes of its data."""
        layer, source = self.layer, f"{self.file}: detector"
        settings = with_heads(layer["detector"], layer["heads"], source)
        return parse(DetectorConfig, {"num_classes": CLASSES[self.data], **settings}, source)

    @property
    def data_config(self) -> DataConfig:
        """How images are resized, or laid on a canvas, for the published AP."""
        return evaluation_data(parse(ImageSize, self.layer["image"], f"{self.file}: image"))


def evaluation_data(size: ImageSize) -> DataConfig:
    """Data whose images are evaluated at this size, and trained at the paper's up to it; with a
    canvas both on it, trained by large-scale jitter."""
    if size.canvas is not None:
        return DataConfig(jitter=JitterConfig(enabled=True, canvas=size.canvas))
    sides = DataConfig().short_sides
    more = range(sides[-1] + 32, size.short_side + 1, 32)
    return DataConfig(short_sides=(*sides, *more), max_side=size.max_side)


@cache
def names() -> tuple[str, ...]:
    """Every name of the zoo, alphabetically."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def entry(name: str) -> Entry:
    """The detector of that name.

    Raises:
        ConfigError: there is none (the text names the nearest), or its file is not valid.
    """
    if name not in names():
        raise ConfigError(f"no detector '{name}'; {_hint(name)} ('codetr models' lists them)")
    path = FOLDER / f"{name}.yaml"
    return parse(Entry, {"name": name, **_mapping(path)}, str(path))


def entries() -> list[Entry]:
    """All of the zoo."""
    return [entry(name) for name in names()]


def detector_config(name: str) -> DetectorConfig:
    """Configuration of the detector of that name, with the classes of its data.

    Raises:
        ConfigError: there is none, or it cannot be built.
    """
    return entry(name).config


def part(name: str) -> Part:
    """The shared settings of that name."""
    return _part(name, "codetr.zoo")


@cache
def _part(name: str, source: str) -> Part:
    path = FOLDER / "parts" / f"{name}.yaml"
    known = sorted(found.stem for found in path.parent.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"{source}: no part '{name}'; {nearest(name, known)}")
    return parse(Part, _mapping(path), str(path))


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a detector is a mapping with 'parts', 'detector', 'published'")
    return content


def _hint(name: str) -> str:
    hint = nearest(name.lower(), [*names()])
    return hint if not hint.startswith("valid:") else f"valid are {names()[0]}, …, {names()[-1]}"
