"""Swin transformers of timm's blocks, padded as the original pads."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from codetr.backbones.backbone import Backbone, drop_path_rates, init_linears
from codetr.backbones.names import microsoft_swin_names, rename
from codetr.backbones.pretrained import load_weights, pretrained_state
from codetr.config import SwinConfig


class Swin(Backbone):
    """A Swin transformer; its stages' outputs, each through a layer norm of its own."""

    def __init__(self, config: SwinConfig) -> None:
        state = pretrained_state(config)
        body = SwinBody(config)
        super().__init__(body, [config.width * 2 ** (stage - 1) for stage in config.stages])
        if state is not None:
            load_weights(body, _adapt(state, body), config, new=("norms.",))
        # A stage's patch merging is, with timm, the beginning of the next one.
        count = config.frozen_stages
        frozen = ["patch_embed"] if count >= 0 else []
        frozen += [f"layers.{stage}.blocks" for stage in range(count)]
        frozen += [f"layers.{stage}.downsample" for stage in range(1, count + 1)]
        self.freeze(*(part for name, part in body.named_modules() if name in frozen))


class SwinBody(nn.Module):
    """timm's Swin transformer for images of any size, under timm's names, up to the last stage
    that is asked for."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            embed_dim=config.width,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.layers = nn.ModuleList(
            SwinStage(config, stage, [next(rates) for _ in range(config.depths[stage])])
            for stage in range(config.stages[-1])
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(config.width * 2 ** (stage - 1)) for stage in config.stages
        )
        init_linears(self)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, width * 2**(n - 1), h, w) of each stage n asked for, from (B, 3, H, W)."""
        x, outputs = self.patch_embed(pixels), []
        norms = dict(zip(self.config.stages, self.norms, strict=True))
        for number, stage in enumerate(self.layers, start=1):
            x = stage(x)
            if number in norms:
                outputs.append(norms[number](x).permute(0, 3, 1, 2).contiguous())
        return outputs


class SwinStage(nn.Module):
    """Patch merging, but in the first stage, and blocks whose windows are shifted in turns."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        channels = config.width * 2**stage
        self.checkpoint_blocks = config.checkpoint_blocks
        self.downsample = PatchMerging(channels // 2, channels) if stage else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                input_resolution=(config.window, config.window),
                num_heads=config.heads[stage],
                window_size=config.window,
                shift_size=config.window // 2 if index % 2 else 0,
                always_partition=True,
                dynamic_mask=True,
                drop_path=rate,
            )
            for index, rate in enumerate(drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, c) from (B, h, w, c), or of the stage before."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class SwinBlock(SwinTransformerBlock):  # type: ignore[misc]
    """timm's block, but that it pads a map to whole windows before it shifts them, not after: as
    the original, whose padding thus enters other windows."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        below, right = -height % self.window_size[0], -width % self.window_size[1]
        padded = functional.pad(x, (0, 0, 0, right, 0, below))
        return super()._attn(padded)[:, :height, :width]


def _adapt(state: dict[str, Tensor], body: SwinBody) -> dict[str, Tensor]:
    """Weights of a classifier, of Microsoft's names or timm's, for this body."""
    state = {n: v for n, v in state.items() if not n.endswith(("position_index", "attn_mask"))}
    if "layers.0.downsample.reduction.weight" in state:
        state = rename(state, microsoft_swin_names(body.config))
    absent = ("head.", "norm.", *(f"layers.{n}." for n in range(len(body.layers), 4)))
    own = body.state_dict()
    adapted = {}
    for name, value in state.items():
        if name.startswith(absent):
            continue
        resize = name.endswith("relative_position_bias_table") and name in own
        adapted[name] = _resize_table(value, own[name]) if resize else value
    return adapted


def _resize_table(table: Tensor, like: Tensor) -> Tensor:
    """Relative position biases (n * n, heads), interpolated for windows of another size."""
    old, new = round(len(table) ** 0.5), round(len(like) ** 0.5)
    if old == new:
        return table
    square = table.T.unflatten(1, (old, old))[None]
    resized = functional.interpolate(square, size=(new, new), mode="bicubic")
    return resized[0].flatten(1).T.contiguous()
