"""EVA-02's vision transformer of timm's blocks, some of which attend within windows."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import PatchEmbed, RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from codetr.backbones.backbone import Backbone, drop_path_rates, init_linears
from codetr.backbones.names import eva_names, rename
from codetr.backbones.pretrained import load_weights, pretrained_state
from codetr.config import VitConfig

PATCH = 16
"""Side of a cell in pixels."""
HEAD_CHANNELS = 64
ROPE_GRID = 16
"""Rotary positions run from 0 to this on both axes, whatever the number of cells."""


class Vit(Backbone):
    """The ViT; one map of stride 16."""

    divisor = 32
    """The original pads to whole cells of the pyramid's level of stride 32."""

    def __init__(self, config: VitConfig) -> None:
        state = pretrained_state(config)
        body = VitBody(config)
        super().__init__(body, [config.width])
        if state is not None:
            load_weights(body, _adapt(state, config), config, new=("norm.",))
        if config.frozen_stages >= 0:
            self.freeze(body.patch_embed)
            body.pos_embed.requires_grad_(False)
        self.freeze(*body.blocks[: max(0, config.frozen_stages)])


class VitBody(nn.Module):
    """EVA-02 without class token, under timm's names."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=PATCH,
            embed_dim=config.width,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        # The first embedding is the class token's, which pretraining leaves behind.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.position_grid**2, config.width))
        self.rope = RotaryEmbeddingCat(
            HEAD_CHANNELS, in_pixels=False, feat_shape=None, ref_feat_shape=(ROPE_GRID, ROPE_GRID)
        )
        rates = drop_path_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            VitBlock(config.width, config.window if config.windowed(index) else None, rate)
            for index, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linears(self)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """One (B, width, H / 16, W / 16) map from (B, 3, H, W)."""
        x = self.patch_embed(pixels)
        grid = (x.shape[1], x.shape[2])
        x = x + _positions(self.pos_embed, grid)
        of_image = self.rope.get_embed(grid)
        of_window = self.rope.get_embed((self.config.window, self.config.window))
        for block in self.blocks:
            rope = of_window if block.window else of_image
            if self.config.checkpoint_blocks and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return [self.norm(x).permute(0, 3, 1, 2).contiguous()]


class VitBlock(EvaBlock):  # type: ignore[misc]
    """timm's EVA-02 block on a map, attending within windows of a side, or, where that is None, to
    the whole map. Cells that fill up the last windows are zero and are attended to."""

    def __init__(self, channels: int, window: int | None, drop_path: float) -> None:
        super().__init__(
            channels,
            num_heads=channels // HEAD_CHANNELS,
            qkv_fused=False,
            mlp_ratio=4 * 2 / 3,
            swiglu_mlp=True,
            scale_mlp=True,
            num_prefix_tokens=0,
            drop_path=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.window = window

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, h, w, c) from (B, h, w, c) and the rotary embedding (cells, 2 * 64) of a window, or
        of the map."""
        x = x + self.drop_path1(self._attend(self.norm1(x), rope))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, rope: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.window is None:
            return self.attn(x.flatten(1, 2), rope=rope).unflatten(1, (height, width))
        side = (self.window, self.window)
        x = functional.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        whole = x.shape[1:3]
        tokens = window_partition(x, side).flatten(1, 2)
        windows = self.attn(tokens, rope=rope).unflatten(1, side)
        return window_reverse(windows, side, *whole)[:, :height, :width]


def _positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, c) from the learned embeddings (1, 1 + n * n, c) of a class token and a square."""
    side = round((embedding.shape[1] - 1) ** 0.5)
    square = embedding[:, 1:].unflatten(1, (side, side))
    if grid == (side, side):
        return square
    square = square.permute(0, 3, 1, 2)
    return functional.interpolate(square, size=grid, mode="bicubic").permute(0, 2, 3, 1)


def _adapt(state: dict[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    """EVA-02's weights, of its own names or timm's, for cells of 16 pixels and this grid of
    positions, interpolated as the original does."""
    state = {name: value for name, value in state.items() if "rope" not in name}
    if "blocks.0.mlp.w1.weight" in state:
        state = rename(state, eva_names(config))
    absent = ("head.", "lm_head.", "fc_norm.", "norm.", "cls_token", "mask_token")
    state = {name: value for name, value in state.items() if not name.startswith(absent)}
    if (patch := state.get("patch_embed.proj.weight")) is not None:
        state["patch_embed.proj.weight"] = functional.interpolate(
            patch, size=(PATCH, PATCH), mode="bicubic"
        )
    if (embedding := state.get("pos_embed")) is not None:
        grid = (config.position_grid, config.position_grid)
        cells = _positions(embedding, grid).flatten(1, 2)
        state["pos_embed"] = torch.cat([embedding[:, :1], cells], dim=1)
    return state
