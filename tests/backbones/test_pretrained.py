"""Where a backbone's weights come from, and what is said when they do not come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_backbones import SMALL, SWIN, VIT
from torch import Tensor
from torch.nn import functional

from codetr.backbones import Backbone, build_backbone, pretrained
from codetr.backbones.names import eva_names, swin_names
from codetr.backbones.vit import _adapt
from codetr.config import ConfigError, DetectorConfig, SwinConfig, VitConfig, parse


def config_of(**backbone: Any) -> Any:
    settings = {"backbone": backbone, "transformer": {"levels": 4}}
    return parse(DetectorConfig, settings, "here.yaml").backbone


def build(**backbone: Any) -> Backbone:
    return build_backbone(config_of(**backbone))


def published(name: str) -> dict[str, Tensor]:
    """What the hub would send: the weights of timm's own network, here random."""
    torch.manual_seed(3)
    return timm.create_model(name.split(".", maxsplit=1)[0], pretrained=False).state_dict()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that answers; what it was asked for."""
    asked: list[str] = []

    def answer(hub_id: str, **_: Any) -> dict[str, Tensor]:
        asked.append(hub_id)
        return published(hub_id.removeprefix("timm/"))

    monkeypatch.setattr(pretrained, "load_state_dict_from_hf", answer)
    return asked


@pytest.mark.parametrize(
    ("backbone", "wanted"),
    [
        ({"name": "resnet18"}, "timm/resnet18.tv_in1k"),
        ({"name": "resnet18", "weights": "resnet18.a1_in1k"}, "timm/resnet18.a1_in1k"),
        (
            {"name": "swin_tiny", "weights": "swin_tiny_patch4_window7_224.ms_in22k"},
            "timm/swin_tiny_patch4_window7_224.ms_in22k",
        ),
    ],
)
@torch.no_grad()
def test_by_timms_name(hub: list[str], backbone: dict[str, Any], wanted: str) -> None:
    """All weights are timm's; a Swin's output norms are new."""
    body = build(**backbone).body
    assert hub == [wanted]
    theirs = published(wanted.removeprefix("timm/"))
    new = [name for name in body.state_dict() if name not in theirs]
    assert all(name.startswith("norms.") for name in new)
    assert all(
        torch.equal(value, theirs[name])
        for name, value in body.state_dict().items()
        if name in theirs
    )


@pytest.mark.parametrize(
    ("name", "window", "weights"),
    [
        ("swin_tiny", 7, "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin_small", 7, "swin_small_patch4_window7_224.ms_in1k"),
        ("swin_base", 7, "swin_base_patch4_window7_224.ms_in22k"),
        ("swin_base", 12, "swin_base_patch4_window12_384.ms_in22k"),
        ("swin_large", 7, "swin_large_patch4_window7_224.ms_in22k"),
        ("swin_large", 12, "swin_large_patch4_window12_384.ms_in22k"),
        ("eva02_large", 24, "eva02_large_patch14_224.mim_m38m"),
        ("resnet50", None, "resnet50.tv_in1k"),
        ("resnet101", None, "resnet101.tv_in1k"),
    ],
)
def test_published_weights_exist(name: str, window: int | None, weights: str) -> None:
    settings = {"name": name} if window is None else {"name": name, "window": window}
    assert config_of(**settings).published == weights
    assert timm.get_pretrained_cfg(weights).hf_hub_id == f"timm/{weights}"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_a_file_of_our_names(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.manual_seed(1)
    state = build(**SMALL[name]).body.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = build(**{**SMALL[name], "pretrained": str(file)}).body.state_dict()
    kept = {n: v for n, v in loaded.items() if not n.startswith(("norms.", "norm."))}
    assert kept
    assert all(torch.equal(value, state[n]) for n, value in kept.items())


def test_from_microsofts_file(tmp_path: Path) -> None:
    """Merging layers end a stage there; classifier, norm and buffers are left behind."""
    config = config_of(**SWIN)
    assert isinstance(config, SwinConfig)
    state = build(**SWIN).body.state_dict()
    theirs = {t: o for t, o in swin_names(config).items() if not o.startswith("norms.")}
    file = {their: state[our] for their, our in theirs.items()}
    assert "layers.0.downsample.reduction.weight" in file
    file |= {"norm.weight": torch.ones(128), "head.weight": torch.ones(3, 128)}
    file |= {"layers.0.blocks.0.attn.relative_position_index": torch.ones(16, 16)}
    torch.save({"model": file}, tmp_path / "swin.pth")
    loaded = build(**{**SWIN, "pretrained": str(tmp_path / "swin.pth")}).body.state_dict()
    assert all(torch.equal(loaded[our], state[our]) for our in theirs.values())


def test_windows_of_another_size_interpolate_their_biases(tmp_path: Path) -> None:
    """Constant biases stay constant; a ramp stays a ramp."""
    state = build(**SWIN).body.state_dict()
    ramp = torch.arange(7.0)[:, None].expand(7, 7).reshape(49, 1)
    for name in state:
        if name.endswith("relative_position_bias_table"):
            state[name] = ramp.expand_as(state[name]).clone()
    torch.save(state, tmp_path / "swin.pth")
    settings = {**SWIN, "window": 6, "pretrained": str(tmp_path / "swin.pth")}
    loaded = build(**settings).body.state_dict()
    table = loaded["layers.0.blocks.0.attn.relative_position_bias_table"].reshape(11, 11)
    torch.testing.assert_close(table, table[:, :1].expand_as(table))
    assert (table[1:, 0] > table[:-1, 0]).all()
    assert table[5, 0] == pytest.approx(3, abs=1e-4)


def test_from_evas_file(tmp_path: Path) -> None:
    """Names of the original, cells of 14 pixels and another grid of positions are adapted."""
    config = config_of(**VIT)
    assert isinstance(config, VitConfig)
    state = build(**VIT).body.state_dict()
    file = {t: state[o] for t, o in eva_names(config).items() if not t.startswith("out_norm")}
    torch.manual_seed(4)
    file["pos_embed"] = torch.randn(1, 1 + 6 * 6, 64)
    file["patch_embed.proj.weight"] = torch.randn(64, 3, 14, 14)
    file |= {name: torch.ones(1, 1, 64) for name in ("cls_token", "mask_token")}
    file |= {"lm_head.weight": torch.ones(5, 64), "norm.weight": torch.zeros(64)}
    file |= {"rope.freqs_cos": torch.ones(256, 64)}
    torch.save({"module": file}, tmp_path / "eva.pt")
    loaded = build(**{**VIT, "pretrained": str(tmp_path / "eva.pt")}).body.state_dict()

    assert torch.equal(loaded["blocks.1.attn.q_proj.bias"], file["blocks.1.attn.q_bias"])
    assert torch.equal(loaded["blocks.2.mlp.fc1_g.weight"], file["blocks.2.mlp.w1.weight"])
    patch = functional.interpolate(file["patch_embed.proj.weight"], (16, 16), mode="bicubic")
    assert torch.equal(loaded["patch_embed.proj.weight"], patch)
    grid = file["pos_embed"][:, 1:].reshape(1, 6, 6, 64).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(loaded["pos_embed"][:, 1:], grid.reshape(1, 16, 64))
    assert torch.equal(loaded["pos_embed"][:, 0], file["pos_embed"][:, 0])
    assert torch.equal(loaded["norm.weight"], torch.ones(64))


def test_timms_names_of_the_record_models_weights() -> None:
    """All that the full-size ViT takes over, with shapes; on the meta device."""
    with torch.device("meta"):
        body = build(name="eva02_large", pretrained=False).body
        theirs = timm.create_model("eva02_large_patch14_224", pretrained=False).state_dict()
    assert theirs["pos_embed"].shape[1] == 1 + 16 * 16
    adapted = _adapt(theirs, config_of(name="eva02_large"))
    own = {n: v.shape for n, v in body.state_dict().items() if not n.startswith("norm.")}
    assert {n: v.shape for n, v in adapted.items()} == own


# ----------------------------------------------------------------------------------------- messages


def message(**backbone: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**backbone)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(pretrained, "load_state_dict_from_hf", away)
    text = message(name="swin_large")
    weights = "swin_large_patch4_window12_384.ms_in22k"
    assert f"cannot download timm's weights of '{weights}' (ConnectionError)" in text
    assert "set backbone.pretrained to a file" in text
    assert f"https://huggingface.co/timm/{weights}" in text


def test_missing_file_names_what_is_wanted(tmp_path: Path) -> None:
    text = message(name="swin_tiny", pretrained=str(tmp_path / "gone.pth"))
    assert "gone.pth: No such file or directory" in text
    assert "swin_tiny_patch4_window7_224.ms_in1k" in text


def test_unusable_files(tmp_path: Path) -> None:
    (tmp_path / "no.pth").write_text("hello")
    assert "holds no plain weights" in message(name="resnet18", pretrained=str(tmp_path / "no.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    text = message(name="resnet18", pretrained=str(tmp_path / "list.pth"))
    assert "missing: conv1.weight" in text


@pytest.mark.parametrize(
    ("backbone", "wrong"),
    [
        ({**SWIN, "depths": [1, 1, 2, 1]}, r"unknown: layers\.1\.blocks\.1\.norm1\.weight"),
        ({**SWIN, "depths": [2, 2, 2, 1]}, r"missing: layers\.0\.blocks\.1\.norm1\.weight"),
        ({**SWIN, "width": 32}, r"of other shape: patch_embed\.proj\.weight is \(16, 3, 4, 4\)"),
    ],
)
def test_weights_of_another_network(tmp_path: Path, backbone: dict[str, Any], wrong: str) -> None:
    file = tmp_path / "swin.pth"
    torch.save(build(**SWIN).body.state_dict(), file)
    with pytest.raises(ConfigError, match=rf"swin\.pth does not fit 'swin_tiny': .*{wrong}"):
        build(**{**backbone, "pretrained": str(file)})


@pytest.mark.parametrize(
    ("backbone", "wrong"),
    [
        ({"name": "tiny"}, "backbone 'tiny' of these sizes has no published weights"),
        ({"name": "swin_tiny", "width": 32}, "set backbone.pretrained=false or to a file"),
        ({"name": "swin_tiny", "window": 12}, "name some of timm's in backbone.weights"),
        (
            {"name": "resnet18", "weights": "resnet18.tv_in1"},
            "timm has no weights 'resnet18.tv_in1'; did you mean 'resnet18.tv_in1k'?",
        ),
    ],
)
def test_no_such_weights(backbone: dict[str, Any], wrong: str) -> None:
    assert wrong in message(**backbone)
