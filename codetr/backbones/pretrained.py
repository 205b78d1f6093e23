"""Pretrained weights of a backbone: from timm's hub, or from a file."""

from __future__ import annotations

import timm
import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from codetr.backbones.names import COUNTERS
from codetr.config import ConfigError, ResNetConfig, SwinConfig, VitConfig, nearest

State = dict[str, Tensor]

_WRAPPERS = ("model_ema", "state_dict", "model", "module")
"""Keys under which training codes put their weights beside other things."""


def pretrained_state(config: ResNetConfig | SwinConfig | VitConfig) -> State | None:
    """The weights to start from under the names of their source; None to start at random.

    Raises:
        ConfigError: none are published for this backbone, its file is missing or unreadable, or
            the hub is out of reach; says which weights are wanted and where to name a file.
    """
    if config.pretrained is False:
        return None
    if config.pretrained is True:
        return _from_hub(_weights_name(config))
    path = config.pretrained
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(
            f"backbone.pretrained: cannot read {path}: {error.strerror or error}; wanted are "
            f"weights of '{config.name}'{_named(config)}"
        ) from error
    except Exception as error:  # whatever pickle and safetensors raise
        raise ConfigError(
            f"backbone.pretrained: {path} holds no plain weights ({type(error).__name__})"
        ) from error
    for wrapper in _WRAPPERS:
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_weights(
    body: nn.Module,
    state: State,
    config: ResNetConfig | SwinConfig | VitConfig,
    new: tuple[str, ...] = (),
) -> None:
    """Load a state that must have all of the body's tensors, but for counters of batches, and no
    others.

    Args:
        body: the network.
        state: under the body's names.
        config: of the backbone, for the error text.
        new: beginnings of the names that no pretraining knows; they keep their first values.

    Raises:
        ConfigError: names or shapes differ; names the source and the first of them.
    """
    own = body.state_dict()
    missing = [
        name
        for name in own
        if name not in state and not name.startswith(new) and not name.endswith(COUNTERS)
    ]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of other shape", shapes))
        if names
    ]
    if problems:
        source = _weights_name(config) if config.pretrained is True else config.pretrained
        raise ConfigError(
            f"backbone.pretrained: {source} does not fit '{config.name}': {'; '.join(problems)}"
        )
    body.load_state_dict(state, strict=False)


def _weights_name(config: ResNetConfig | SwinConfig | VitConfig) -> str:
    name = config.weights or config.published
    if name is None:
        raise ConfigError(
            f"backbone '{config.name}' of these sizes has no published weights: set "
            "backbone.pretrained=false or to a file, or name some of timm's in backbone.weights"
        )
    return name


def _named(config: ResNetConfig | SwinConfig | VitConfig) -> str:
    name = config.weights or config.published
    return f", such as timm's {name}" if name else ""


def _from_hub(name: str) -> State:
    published = timm.list_pretrained()
    if name not in published:
        hint = nearest(name, published)
        raise ConfigError(f"backbone.weights: timm has no weights '{name}'; {hint}")
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    try:
        return load_state_dict_from_hf(hub_id, weights_only=True)
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise ConfigError(
            f"cannot download timm's weights of '{name}' ({type(error).__name__}): set "
            f"backbone.pretrained to a file that holds them, such as model.safetensors of "
            f"https://huggingface.co/{hub_id}, or to false"
        ) from error
