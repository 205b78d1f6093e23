"""The originals' parameter names of Swin transformers and of EVA-02, and ours, which are timm's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from codetr.config import SwinConfig, VitConfig

Names = dict[str, str]
"""(theirs, ours)"""

COUNTERS = "num_batches_tracked"
"""How names end that files of old PyTorch lack: batch norm's, which nothing here reads."""

_AFFINE = ("weight", "bias")


def rename(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The state with those names replaced that are listed."""
    return {names.get(name, name): value for name, value in state.items()}


def swin_names(config: SwinConfig) -> Names:
    """Every parameter of the original detectors' Swin transformer."""
    pairs = [f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in _AFFINE]
    names = {name: name for name in pairs}
    for stage in range(config.stages[-1]):
        for block in range(config.depths[stage]):
            root = f"layers.{stage}.blocks.{block}"
            names |= {f"{root}.{part}": f"{root}.{part}" for part in _swin_block()}
    names |= microsoft_swin_names(config)
    for index, stage in enumerate(config.stages):
        names |= {f"norm{stage - 1}.{kind}": f"norms.{index}.{kind}" for kind in _AFFINE}
    return names


def microsoft_swin_names(config: SwinConfig) -> Names:
    """What timm names otherwise: patch merging ends a stage there, and begins the next one here."""
    return {
        f"layers.{stage}.downsample.{part}": f"layers.{stage + 1}.downsample.{part}"
        for stage in range(config.stages[-1] - 1)
        for part in ("reduction.weight", "norm.weight", "norm.bias")
    }


def _swin_block() -> Iterator[str]:
    yield "attn.relative_position_bias_table"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        for kind in _AFFINE:
            yield f"{part}.{kind}"


_EVA_BLOCK = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    **{f"attn.{part}_proj.weight": f"attn.{part}_proj.weight" for part in "qkv"},
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("norm1", "norm1"),
            ("attn.proj", "attn.proj"),
            ("norm2", "norm2"),
            ("mlp.w1", "mlp.fc1_g"),
            ("mlp.w2", "mlp.fc1_x"),
            ("mlp.ffn_ln", "mlp.norm"),
            ("mlp.w3", "mlp.fc2"),
        )
        for kind in _AFFINE
    },
}


def eva_names(config: VitConfig) -> Names:
    """Every parameter of the original detectors' ViT; its blocks are named as EVA-02's own."""
    names = {"pos_embed": "pos_embed"}
    for kind in _AFFINE:
        names[f"patch_embed.proj.{kind}"] = f"patch_embed.proj.{kind}"
        names[f"out_norm.{kind}"] = f"norm.{kind}"
    for block in range(config.depth):
        root = f"blocks.{block}"
        names |= {f"{root}.{theirs}": f"{root}.{ours}" for theirs, ours in _EVA_BLOCK.items()}
    return names
