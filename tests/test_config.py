"""Configuration: what is accepted, and the one line that says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codetr.config import (
    HEAD_TYPES,
    AtssConfig,
    ConfigError,
    DetectorConfig,
    FasterRcnnConfig,
    OneStageConfig,
    ResNetConfig,
    SwinConfig,
    TrainingConfig,
    parse,
    read_yaml,
)


def detector(**settings: Any) -> DetectorConfig:
    return parse(DetectorConfig, settings, "here.yaml")


def test_defaults_are_the_papers_r50() -> None:
    config = detector(heads=["atss", "faster_rcnn"])
    assert config.k == 2
    assert config.strides == (8, 16, 32, 64)
    assert config.head_strides == (8, 16, 32, 64, 128)
    assert (config.lambda_1, config.lambda_2) == (1.0, 2.0)
    assert config.heads == (AtssConfig(), FasterRcnnConfig())


def test_weights_of_equation_6() -> None:
    """With 6 layers and lambda_2 = 2 the heads' losses carry the released configurations' 12."""
    weights = detector(heads=["atss", "faster_rcnn"], lambda_1=0.5).loss_weights()
    assert weights["query/5/l1"] == 5
    assert weights["encoder/cls"] == 2
    assert weights["positive/atss/0/giou"] == 1
    assert weights["atss/cls"] == 12
    assert weights["atss/giou"] == 24
    assert weights["faster_rcnn/rpn_l1"] == 12
    assert weights["faster_rcnn/rcnn_giou"] == 120


def test_denoising_is_weighted_as_the_query_losses() -> None:
    weights = detector(
        queries={"dynamic_anchors": True},
        denoising={"enabled": True},
        query_loss={"classification": "quality_focal", "cls": 1.0},
    ).loss_weights()
    assert {weights[f"denoising/{layer}/cls"] for layer in range(6)} == {1.0}
    assert weights["denoising/0/l1"] == weights["query/0/l1"] == 5
    assert not any("classification" in name for name in weights)


def test_heads_without_losses_have_weight_zero() -> None:
    """Table 9, third row: nothing but the heads' own terms changes."""
    heads = ["atss", "faster_rcnn"]
    with_losses, without = (
        detector(heads=heads, head_losses=losses).loss_weights() for losses in (True, False)
    )
    own = ("atss/", "faster_rcnn/")
    assert {name for name in without if without[name] != with_losses[name]} == {
        name for name in with_losses if name.startswith(own)
    }
    assert {value for name, value in without.items() if name.startswith(own)} == {0.0}


def test_each_one_to_many_group_weighs_as_the_queries() -> None:
    """The loss is a mean over the groups, whose number is in its weight."""
    weights = detector(one_to_many={"groups": 10, "weight": 0.5}).loss_weights()
    assert weights["one_to_many/5/l1"] == 10 * 0.5 * weights["query/5/l1"]
    assert not any(name.startswith("one_to_many") for name in detector().loss_weights())


def test_a_single_map_becomes_the_published_pyramid() -> None:
    config = detector(
        backbone={"stages": [4]},
        transformer={"attention": "conditional", "levels": 1},
        queries={"two_stage": False},
        heads=["atss"],
    )
    assert config.strides == (32,)
    assert config.head_strides == (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("stages", "levels", "strides"),
    [
        ((1, 2, 3, 4), 4, (4, 8, 16, 32)),
        ((1, 2, 3, 4), 5, (4, 8, 16, 32, 64)),
        ((2, 3, 4), 5, (8, 16, 32, 64, 128)),
    ],
)
def test_levels_from_stride_4_or_8(
    stages: tuple[int, ...], levels: int, strides: tuple[int, ...]
) -> None:
    config = detector(backbone={"stages": stages}, transformer={"levels": levels})
    assert config.strides == strides
    assert config.head_strides == (*strides, 2 * strides[-1])


def test_every_head_has_its_papers_weights_and_one_convolution() -> None:
    expected = {
        "atss": {"cls": 1, "giou": 2, "centerness": 1},
        "faster_rcnn": {"rpn_cls": 1, "rpn_l1": 1, "rcnn_cls": 1, "rcnn_giou": 10},
        "retinanet": {"cls": 1, "giou": 2},
        "fcos": {"cls": 1, "giou": 1, "centerness": 1},
        "paa": {"cls": 1, "giou": 1.3, "iou": 0.5},
        "gfl": {"cls": 1, "giou": 2, "dfl": 0.25},
        "mask_rcnn": {"rpn_cls": 1, "rpn_l1": 1, "rcnn_cls": 1, "rcnn_giou": 10, "mask": 1},
    }
    assert set(HEAD_TYPES) == set(expected)
    for kind, weights in expected.items():
        (head,) = detector(heads=[kind]).heads
        assert head.loss_weights() == weights
        if isinstance(head, OneStageConfig):
            assert head.convs == 1
    total = detector(heads=[*expected]).loss_weights()
    assert total["paa/giou"] == pytest.approx(12 * 1.3)
    assert total["mask_rcnn/mask"] == 12


def test_only_mask_heads_need_masks() -> None:
    assert detector(heads=["atss", "mask_rcnn"]).needs_masks
    assert not detector(heads=["atss", "faster_rcnn", "gfl"]).needs_masks


def test_one_stage_has_no_encoder_loss() -> None:
    weights = detector(queries={"two_stage": False}).loss_weights()
    assert not any(name.startswith("encoder/") for name in weights)


def test_repeated_heads_have_names_of_their_own() -> None:
    assert detector(heads=["atss", "faster_rcnn", "atss"]).head_names == (
        "atss",
        "faster_rcnn",
        "atss_2",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lamda_1": 1}, "unknown key 'lamda_1'; did you mean 'lambda_1'?"),
        ({"transformer": {"level": 3}}, "transformer: unknown key 'level'; did you mean 'levels'?"),
        ({"heads": ["fcoss"]}, "heads: unknown head 'fcoss'; did you mean 'fcos'?"),
        ({"heads": ["mask-rcnn"]}, "did you mean 'mask_rcnn'?"),
        ({"heads": [{"type": "paa", "convs": 6}]}, "heads.0.convs"),
        ({"heads": ["gfl", {"type": "gfl", "bin": 8}]}, "unknown key 'bin'; did you mean 'bins'?"),
        ({"heads": [{"type": "mask_rcnn", "mask": {"weigth": 1}}]}, "did you mean 'weight'?"),
        (
            {"heads": [{"type": "retinanet", "negative_iou": 0.6}]},
            "negative_iou=0.6 is above positive_iou=0.5",
        ),
        ({"lambda_1": -0.5}, "lambda_1: Input should be greater than or equal to 0"),
        ({"heads": ["ats"]}, "heads: unknown head 'ats'; did you mean 'atss'?"),
        ({"heads": [{"type": "atss", "conv": 1}]}, "heads.0: unknown key 'conv'"),
        ({"heads": [{}]}, "a head without 'type'"),
        ({"heads": [3]}, "heads"),
        ({"heads": "atss"}, "heads must be a list, for example [atss, faster_rcnn]"),
        ({"lambda_2": -1}, "lambda_2: Input should be greater than or equal to 0"),
        ({"transformer": {"embed_dim": 100}}, "is no multiple of attention_heads=8"),
        (
            {"transformer": {"levels": 2}},
            "transformer.levels=2 is fewer than the 3 backbone.stages",
        ),
        ({"queries": {"box_refinement": False}}, "set box_refinement=true"),
        (
            {"queries": {"two_stage": False, "rank_by": "best_class"}},
            "queries: rank_by=best_class ranks encoder tokens: set two_stage=true",
        ),
        (
            {"queries": {"two_stage": False, "dynamic_anchors": True, "box_refinement": False}},
            "queries: dynamic_anchors are boxes under way: set box_refinement=true",
        ),
        (
            {"queries": {"learned_content": False}},
            "queries: learned_content=false is for one-stage queries: set two_stage=false",
        ),
        (
            {"queries": {"patterns": 3, "two_stage": False}},
            "queries: patterns are the contents of one-stage queries: set two_stage=false and",
        ),
        (
            {"backbone": {"dilated": True}},
            "dilated makes two stages of one stride: set stages=[4]",
        ),
        (
            {"queries": {"size_modulation": True}},
            "queries: size_modulation needs boxes with sizes: set dynamic_anchors=true",
        ),
        (
            {"queries": {"size_modulation": True, "dynamic_anchors": True}},
            "set it to false, or transformer.attention=conditional",
        ),
        (
            {"transformer": {"scale_positions": True}},
            "set queries.dynamic_anchors=true, or transformer.scale_positions=false",
        ),
        ({"transformer": {"attention": "dense"}}, "transformer.attention: Input should be"),
        (
            {"transformer": {"attention": "conditional"}, "queries": {"two_stage": False}},
            "not transformer.levels=4 of backbone.stages=[2, 3, 4]: "
            "set transformer.levels=1 and backbone.stages=[4]",
        ),
        (
            {
                "transformer": {"attention": "conditional", "levels": 1},
                "backbone": {"stages": [3, 4]},
                "queries": {"two_stage": False},
            },
            "reads one map, not transformer.levels=1 of backbone.stages=[3, 4]",
        ),
        (
            {
                "transformer": {"attention": "conditional", "levels": 1},
                "backbone": {"stages": [4]},
            },
            "set queries.two_stage=false",
        ),
        (
            {
                "transformer": {"attention": "conditional", "levels": 1},
                "backbone": {"stages": [1]},
                "queries": {"two_stage": False},
                "heads": ["atss"],
            },
            "strides 8, 16, 32, 64, 128, and backbone.stages=[1] has stride 4: set",
        ),
        (
            {
                "transformer": {"attention": "conditional", "levels": 4},
                "backbone": "eva02_large",
                "queries": {"two_stage": False},
            },
            "not the pyramid of 'eva02_large': set transformer.attention=deformable",
        ),
        (
            {"one_to_many": {"groups": 1}, "queries": {"mixed_selection": False}},
            "set queries.mixed_selection=true, or one_to_many.tokens=next",
        ),
        (
            {"one_to_many": {"groups": 1, "queries": 100}},
            "set one_to_many.queries=300, or one_to_many.tokens=next",
        ),
        ({"one_to_many": {"repeat": 0}}, "one_to_many.repeat: Input should be greater than 0"),
        (
            {
                "heads": ["atss"],
                "head_losses": False,
                "positive_queries": {"enabled": False},
            },
            "set heads=[], head_losses=true or positive_queries.enabled=true",
        ),
        (
            {"positive_queries": {"decoder_passes": "two"}},
            "positive_queries.decoder_passes: Input should be 'one' or 'per_head'",
        ),
        (
            {"queries": {"mixed_selection": False, "dynamic_anchors": True}},
            "queries: dynamic_anchors need learned content: set mixed_selection=true",
        ),
        ({"queries": {"logit_eps": 0.5}}, "queries.logit_eps: Input should be less than 0.5"),
        (
            {"denoising": {"enabled": True}},
            "set queries.dynamic_anchors=true, or denoising.enabled=false",
        ),
        ({"denoising": {"groups": 0}}, "denoising.groups: Input should be greater than 0"),
        ({"denoising": {"copies": 3}}, "denoising: unknown key 'copies'"),
        ({"denoising": {"label_noise": 1.5}}, "denoising.label_noise"),
        ({"soft_nms": {"iou": 0}}, "soft_nms.iou"),
        ({"query_loss": {"classification": "qfl"}}, "query_loss.classification"),
        ({"matching_cost": {"classification": "focal"}}, "matching_cost: unknown key"),
        ({"backbone": {"stages": [3, 2]}}, "stages must be increasing"),
        (
            {"backbone": {"name": "resnet52"}},
            "backbone: unknown backbone.name 'resnet52'; did you mean 'resnet50'?",
        ),
        ({"backbone": "swin_larg"}, "did you mean 'swin_large'?"),
        ({"backbone": {"name": [1]}}, "unknown backbone.name '[1]'"),
        ({"backbone": 3}, "backbone: "),
        (
            {"backbone": {"name": "swin_tiny", "frozen_norm": True}},
            "backbone: unknown key 'frozen_norm'; did you mean 'frozen_stages'?",
        ),
        ({"backbone": {"name": "swin_tiny", "depths": [2, 2]}}, "backbone.depths: "),
        ({"backbone": {"name": "swin_tiny", "drop_path": 1}}, "backbone.drop_path: "),
        (
            {"backbone": {"name": "eva02_large", "stages": [2]}},
            "backbone: unknown key 'stages'",
        ),
        ({"backbone": {"name": "eva02_large", "width": 100}}, "multiple of 64"),
        (
            {"backbone": {"name": "eva02_large"}, "transformer": {"levels": 3}},
            "transformer.levels=3: the pyramid of 'eva02_large' has 5 levels",
        ),
    ],
)
def test_errors_name_source_key_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        detector(**settings)
    assert str(error.value).startswith("here.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1", "not YAML"), (None, "No such file"), ("a: 1", None)]
)
def test_reading_yaml(tmp_path: Path, content: str | None, message: str | None) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    if message is None:
        assert read_yaml(file) == {"a": 1}
        return
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(file)
    assert str(file) in str(error.value)


def test_names_bring_their_sizes() -> None:
    """Table of the Swin paper; drop path of the original's configurations; any size can be set."""
    small = detector(backbone="swin_small").backbone
    large = detector(backbone={"name": "swin_large", "window": 7}).backbone
    assert isinstance(small, SwinConfig)
    assert isinstance(large, SwinConfig)
    assert (small.width, small.depths, small.window) == (96, (2, 2, 18, 2), 7)
    assert (large.width, large.depths, large.window) == (192, (2, 2, 18, 2), 7)
    assert (small.heads, large.heads) == ((3, 6, 12, 24), (6, 12, 24, 48))
    assert (small.drop_path, large.drop_path) == (0.2, 0.3)
    assert SwinConfig.model_validate(large.model_dump()) == large


def test_strides_of_every_kind_of_backbone() -> None:
    five = {"levels": 5}
    swin = detector(backbone={"name": "swin_tiny", "stages": [1, 2, 3, 4]}, transformer=five)
    assert swin.strides == (4, 8, 16, 32, 64)
    assert detector(backbone="eva02_large", transformer=five).strides == (4, 8, 16, 32, 64)
    assert detector(backbone="eva02_large").strides == (8, 16, 32, 64)
    assert detector(backbone="resnet101").strides == (8, 16, 32, 64)
    assert detector(backbone="eva02_large").head_strides == (8, 16, 32, 64, 128)


def test_layer_decay_needs_a_vit() -> None:
    training = parse(TrainingConfig, {"layer_decay": 0.8}, "here.yaml")
    training.require_fitting(detector(backbone="eva02_large"))
    TrainingConfig().require_fitting(detector())
    with pytest.raises(ConfigError, match=r"layer_decay=0\.8 .*'resnet50' is none: set .*=1"):
        training.require_fitting(detector())


def test_tiny_backbone_has_no_published_weights() -> None:
    from codetr.backbones import build_backbone

    with pytest.raises(ConfigError, match=r"backbone\.pretrained=false"):
        build_backbone(ResNetConfig(name="tiny"))


def test_configuration_needs_no_torch() -> None:
    """A plan must be printed at once: importing torch takes seconds."""
    code = "import sys, codetr.config, codetr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
