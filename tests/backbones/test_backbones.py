"""Backbones and necks against the original, against timm, and as they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from golden_backbones import read
from small_backbones import RESNET, SMALL, SWIN, VIT
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from codetr.backbones import Backbone, SimpleFeaturePyramid, Swin, Vit, build_backbone
from codetr.backbones.backbone import drop_path_rates
from codetr.backbones.names import eva_names, swin_names
from codetr.backbones.swin import SwinBlock
from codetr.config import ConfigError, DetectorConfig, ResNetConfig, SwinConfig, VitConfig, parse
from codetr.detector import CoDETR
from codetr.structures import ImageBatch, Targets

DETECTOR = {
    "num_classes": 3,
    "transformer": {
        "embed_dim": 32,
        "ffn_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "levels": 5,
    },
    "queries": {"count": 8},
    "heads": ["atss"],
}


def config_of(**backbone: Any) -> ResNetConfig | SwinConfig | VitConfig:
    return parse(DetectorConfig, {**DETECTOR, "backbone": backbone}, "test").backbone


def build(**backbone: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(config_of(**backbone))


# ------------------------------------------------------------------------------------ the original


def golden_swin_config() -> SwinConfig:
    """Of the recorded network, from what it recorded of itself."""
    sizes = read("swin")["config"]
    config = config_of(
        name="swin_tiny",
        width=sizes["embed_dim"],
        depths=sizes["depths"],
        window=sizes["window_size"],
        stages=[1, 2, 3, 4],
        pretrained=False,
    )
    assert isinstance(config, SwinConfig)
    assert config.heads == tuple(sizes["num_heads"])
    return config


def golden_vit_config() -> VitConfig:
    sizes = read("vit")["config"]
    config = config_of(
        name="eva02_large",
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        window=sizes["window_size"],
        global_every=sizes["depth"],
        position_grid=sizes["pretrain_img_size"] // sizes["patch_size"],
        pretrained=False,
    )
    assert isinstance(config, VitConfig)
    windowed = [n for n in range(config.depth) if config.windowed(n)]
    assert windowed == sizes["window_block_indexes"]
    return config


def load(body: nn.Module, state: dict[str, Tensor], names: dict[str, str]) -> None:
    assert set(state) == set(names)
    body.load_state_dict({names[name]: value for name, value in state.items()})


@torch.no_grad()
def test_swin_gives_the_originals_maps() -> None:
    """Sizes that are no multiples of patch, window or two: padding and shifts at every stage."""
    golden, config = read("swin"), golden_swin_config()
    swin = Swin(config).eval()
    load(swin.body, golden["state_dict"], swin_names(config))
    outputs = swin(golden["input"])
    assert len(outputs) == len(golden["outputs"])
    for ours, theirs in zip(outputs, golden["outputs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_alone_does_not_give_them() -> None:
    """Why there is a subclass: timm pads after the shift, the original before."""
    golden, config = read("swin"), golden_swin_config()
    swin = Swin(config).eval()
    load(swin.body, golden["state_dict"], swin_names(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SwinBlock, "_attn")
        assert (swin(golden["input"])[0] - golden["outputs"][0]).abs().max() > 0.1


@torch.no_grad()
def test_vit_and_pyramid_give_the_originals_maps() -> None:
    """Windows that do not fill the map, interpolated positions, both kinds of attention."""
    golden, config = read("vit"), golden_vit_config()
    vit = Vit(config).eval()
    load(vit.body, golden["state_dict"], eva_names(config))
    (output,) = vit(golden["input"])
    torch.testing.assert_close(output, golden["outputs"][0], rtol=0, atol=1e-5)

    sizes = golden["neck_config"]
    neck = SimpleFeaturePyramid(config.width, sizes["out_channels"], sizes["num_outs"])
    names = {name: f"levels.{int(name[1]) - 2}{name[2:]}" for name in golden["neck_state_dict"]}
    load(neck, golden["neck_state_dict"], names)
    for ours, theirs in zip(neck(golden["outputs"]), golden["neck_outputs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    four = SimpleFeaturePyramid(config.width, sizes["out_channels"], 4)
    four.load_state_dict(
        {f"levels.{int(n[7]) - 1}{n[8:]}": v for n, v in neck.state_dict().items() if n[7] != "0"}
    )
    for ours, theirs in zip(four(golden["outputs"]), golden["neck_outputs"][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------- torchvision and timm


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_resnet_is_torchvisions_of_a_file_of_theirs(name: str, tmp_path: Path) -> None:
    """Those by which the original starts; old ones have no counters of batches."""
    theirs = torchvision.models.get_model(name, weights=None)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as if trained: all of them would be alike
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.uniform_(norm.weight, 0.5, 1)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {n: v for n, v in theirs.state_dict().items() if "num_batches_tracked" not in n}
    assert len(state) < len(theirs.state_dict())
    torch.save(state, tmp_path / "weights.pth")
    file = str(tmp_path / "weights.pth")
    ours = build(name=name, pretrained=file, stages=[1, 2, 3, 4]).eval()
    stages = {f"layer{stage}": str(stage) for stage in range(1, 5)}
    features = create_feature_extractor(theirs.eval(), stages)
    pixels = torch.randn(2, 3, 67, 90)
    for one, other in zip(ours(pixels), features(pixels).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_a_dilated_resnet_is_torchvisions(name: str, tmp_path: Path) -> None:
    """Which is the one that DETR has, and all that are called DC5."""
    dilated = [False, False, True]
    theirs = torchvision.models.get_model(name, replace_stride_with_dilation=dilated).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    file = str(tmp_path / "weights.pth")
    ours = build(name=name, pretrained=file, stages=[4], dilated=True).eval()
    pixels = torch.randn(2, 3, 67, 90)
    (found,) = ours(pixels)
    expected = create_feature_extractor(theirs, ["layer4"])(pixels)["layer4"]
    assert found.shape[-2:] == (5, 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_is_timms_where_windows_fill_the_map() -> None:
    ours = build(**{**SWIN, "stages": [1, 2, 3, 4]}).eval()
    assert isinstance(ours, Swin)
    config = ours.body.config
    theirs = timm.models.swin_transformer.SwinTransformer(
        embed_dim=config.width,
        depths=config.depths,
        num_heads=config.heads,
        window_size=config.window,
        always_partition=True,
        strict_img_size=False,
        num_classes=0,
    ).eval()
    missing, unknown = theirs.load_state_dict(ours.body.state_dict(), strict=False)
    assert missing == ["norm.weight", "norm.bias"]
    assert all(name.startswith("norms.") for name in unknown)
    for norm in ours.body.norms:
        nn.init.normal_(norm.weight)
    pixels = torch.randn(2, 3, 4 * 4 * 8, 2 * 4 * 4 * 8)
    maps = theirs.forward_intermediates(pixels, intermediates_only=True)
    for norm, one, other in zip(ours.body.norms, ours(pixels), maps, strict=True):
        torch.testing.assert_close(one, norm(other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@torch.no_grad()
def test_vit_of_global_blocks_is_timms() -> None:
    ours = build(**{**VIT, "global_every": 1}).eval()
    theirs = timm.models.eva.Eva(
        img_size=64,
        patch_size=16,
        embed_dim=64,
        depth=3,
        num_heads=1,
        qkv_fused=False,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        class_token=False,
        global_pool="",
        num_classes=0,
    ).eval()
    state = ours.body.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    theirs.load_state_dict(state)
    theirs.norm.eps = ours.body.norm.eps
    pixels = torch.randn(2, 3, 64, 64)
    expected = theirs.forward_features(pixels).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(pixels)[0], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- sizes and building

FULL = [
    *(("resnet50", {}), ("resnet101", {})),
    *(("swin_tiny", {}), ("swin_small", {}), ("swin_base", {}), ("swin_large", {})),
    *(("swin_base", {"window": 7}), ("swin_large", {"window": 7})),
    *(("eva02_large", {}), ("eva02_large", {"window": 16, "global_every": 3})),
]
# Of the networks in timm, without classifier. Swin has a norm for each stage instead of one.
MILLIONS = {
    "resnet50": 23.51,
    "resnet101": 42.50,
    "swin_tiny": 27.52,
    "swin_small": 48.84,
    "swin_base": 86.74,
    "swin_large": 195.00,
    "eva02_large": 304.1,  # tables 5 and 6: 304M
}


@pytest.mark.parametrize(("name", "sizes"), FULL)
def test_full_size_on_the_meta_device(name: str, sizes: dict[str, Any]) -> None:
    settings = {**DETECTOR, "backbone": {"name": name, "pretrained": False, **sizes}}
    with torch.device("meta"):
        model = CoDETR(parse(DetectorConfig, settings, "test"))
    parameters = sum(p.numel() for p in model.backbone.parameters())
    assert parameters / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)
    pixels = torch.empty(1, 3, 224, 288, device="meta")
    maps = model.neck(model.backbone(pixels))
    assert [m.shape[2] for m in maps] == [-(-224 // s) for s in model.config.strides]
    assert {m.shape[1] for m in maps} == {32}


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward_of_an_image_of_any_size(name: str) -> None:
    """One detector of each family, trained on a size that is no multiple of anything."""
    torch.manual_seed(0)
    model = CoDETR(parse(DetectorConfig, {**DETECTOR, "backbone": SMALL[name]}, "test"))
    batch = ImageBatch(torch.randn(2, 3, 97, 131), [(97, 131), (83, 101)])
    targets = [
        Targets(torch.tensor([[5.0, 6.0, 50.0, 60.0]]), torch.tensor([1])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    model.train()(batch, targets).total.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
    for detections in model.eval()(batch):
        assert detections.boxes.isfinite().all()


def test_the_padding_of_a_vits_batch_is_no_part_of_the_image() -> None:
    """An image that was padded to whole cells before gives the same detections."""
    torch.manual_seed(0)
    model = CoDETR(parse(DetectorConfig, {**DETECTOR, "backbone": VIT}, "test")).eval()
    pixels = torch.randn(1, 3, 70, 97)
    sizes = [(70, 97)]
    padded = nn.functional.pad(pixels, (0, 31, 0, 26))
    short = model(ImageBatch(pixels, sizes))[0]
    long = model(ImageBatch(padded, sizes))[0]
    torch.testing.assert_close(short.boxes, long.boxes)
    assert short.boxes[:, 2].max() <= 97


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        (
            {**RESNET, "frozen_stages": 2, "frozen_norm": False},
            ("conv1", "bn1", "layer1", "layer2"),
        ),
        ({**SWIN, "frozen_stages": -1}, ()),
        ({**SWIN, "frozen_stages": 0}, ("patch_embed",)),
        (
            {**SWIN, "frozen_stages": 2, "drop_path": 0.5},
            (
                "patch_embed",
                "layers.0",
                "layers.1.downsample",
                "layers.1.blocks",
                "layers.2.downsample",
            ),
        ),
        ({**VIT, "frozen_stages": -1}, ()),
        ({**VIT, "frozen_stages": 0}, ("patch_embed", "pos_embed")),
        ({**VIT, "frozen_stages": 2}, ("patch_embed", "pos_embed", "blocks.0", "blocks.1")),
    ],
)
def test_frozen_parts(backbone: dict[str, Any], frozen: tuple[str, ...]) -> None:
    """They get no gradient and stay in evaluation mode; all else is trained."""
    model = build(**backbone).train()
    sum(m.square().mean() for m in model(torch.randn(1, 3, 96, 96))).backward()

    def is_frozen(name: str) -> bool:
        return any(name == part or name.startswith(f"{part}.") for part in frozen)

    for name, parameter in model.body.named_parameters():
        assert parameter.requires_grad != is_frozen(name), name
        assert (parameter.grad is None) == is_frozen(name), name
    for name, module in model.body.named_modules():
        if [*module.parameters(recurse=False)] and name:
            assert module.training != is_frozen(name), name
        if type(module).__name__ == "DropPath":
            assert module.training != is_frozen(name), name


def test_frozen_batch_norm_everywhere() -> None:
    model = build(**{**RESNET, "frozen_stages": -1}).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    model(torch.randn(2, 3, 64, 64))
    for norm, mean in zip(norms, before, strict=True):
        assert not norm.training
        assert not norm.weight.requires_grad
        assert torch.equal(norm.running_mean, mean)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_drop_path_is_for_training_alone(name: str) -> None:
    model = build(**{**SMALL[name], "drop_path": 0.5})
    pixels = torch.randn(8, 3, 64, 64)
    once, again = (model.train()(pixels)[-1] for _ in range(2))
    assert not torch.equal(once, again)
    once, again = (model.eval()(pixels)[-1] for _ in range(2))
    assert torch.equal(once, again)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.5)


def test_drop_path_grows_evenly() -> None:
    """As torch.linspace, with which the original computes it."""
    for blocks in (1, 2, 24):
        expected = torch.linspace(0, 0.3, blocks).tolist()
        assert drop_path_rates(0.3, blocks) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_recomputing_blocks_changes_no_gradient(name: str) -> None:
    """Drop path included: the second pass skips what the first has skipped."""
    gradients, calls = [], []
    for recompute in (False, True):
        model = build(**{**SMALL[name], "checkpoint_blocks": recompute, "drop_path": 0.5}).train()
        block = next(m for m in model.modules() if type(m).__name__ in ("SwinBlock", "VitBlock"))
        count: list[int] = []
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(1)
        sum(m.sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(len(count))
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, recomputed)


def test_no_level_of_the_pyramid_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"transformer.levels=3: the pyramid .* has 5 levels"):
        parse(
            DetectorConfig,
            {"backbone": {"name": "eva02_large"}, "transformer": {"levels": 3}},
            "test",
        )
