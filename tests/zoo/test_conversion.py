"""Official state dicts in and out: complete, and to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_files import GOLDEN, MODELS, full_size, small

import codetr.zoo
from codetr.checkpoint import CheckpointError
from codetr.config import DetectorConfig
from codetr.data.loader import collate
from codetr.data.transforms import build_canvas, build_transform
from codetr.structures import Targets
from codetr.zoo.backbone_names import derived_buffers
from codetr.zoo.conversion import DERIVED, Imported, export_official, import_official
from codetr.zoo.measure import on_meta
from codetr.zoo.recognition import recognise


@pytest.fixture(scope="module", params=MODELS)
def full(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.Tensor], Imported]:
    state = full_size(request.param)
    return request.param, state, import_official(state)


def test_every_key_of_the_full_size_detectors_has_its_place(full) -> None:
    """Recognised, consumed completely, and exported again under every name, shape and type."""
    model, official, imported = full
    assert imported.names[0] == MODELS[model]
    ours = on_meta(imported.config).state_dict()
    assert {n: v.shape for n, v in imported.state.items()} == {n: v.shape for n, v in ours.items()}
    assert set(imported.dropped.values()) <= {DERIVED}
    exported = export_official(imported.state, imported.config)
    kinds = {name: (value.shape, value.dtype) for name, value in exported.items()}
    assert kinds == {name: (value.shape, value.dtype) for name, value in official.items()}


def test_every_value_returns_to_its_own_name(full) -> None:
    """A number of its own in the place of each tensor."""
    _, official, imported = full
    derived = derived_buffers(imported.config)
    numbered = {name: torch.full((2, 1), number) for number, name in enumerate(official)}
    kept = {name: value for name, value in numbered.items() if name not in imported.dropped}
    ours = codetr.zoo.from_official_names(kept, imported.config)
    assert len({int(value.flatten()[0]) for value in ours.values()}) >= len(ours) - 2
    exported = export_official(ours, imported.config)
    assert exported.keys() == official.keys()
    for name, value in exported.items():
        if name in imported.dropped:
            assert torch.equal(value, derived[name])
        else:
            assert int(value.flatten()[0]) == int(numbered[name].flatten()[0]), name


def test_the_configuration_is_that_of_the_zoo(full) -> None:
    """Shapes alone say what the file of the zoo says."""
    model, official, imported = full
    read = recognise({name: tuple(value.shape) for name, value in official.items()})
    assert read == imported.config == codetr.zoo.detector_config(MODELS[model])


@pytest.mark.parametrize("detector", ["co_dino", "co_deformable"])
def test_the_recorded_detectors_round_trip_to_the_bit(detector: str) -> None:
    official = small(detector)
    imported = import_official(official)
    assert not imported.dropped
    model = codetr.zoo.from_official(official)
    assert not model.training
    exported = export_official(model.state_dict(), model.config)
    assert exported.keys() == official.keys()
    for name, value in exported.items():
        assert value.dtype == official[name].dtype
        assert torch.equal(value, official[name]), name


@pytest.mark.parametrize("detector", ["co_dino", "co_deformable"])
def test_sizes_are_read_off_shapes(detector: str) -> None:
    """Against what the recorded detectors were made with."""
    golden = json.loads((GOLDEN / detector / "config.json").read_text())
    config = import_official(small(detector)).config
    transformer = config.transformer.model_dump()
    for name in ("embed_dim", "ffn_dim", "attention_heads", "sampling_points", "encoder_layers",
                 "decoder_layers", "levels", "position_encoding", "group_norm_groups"):  # fmt: skip
        assert transformer[name] == golden[name], name
    assert config.num_classes == golden["classes"]
    assert config.queries.count == golden["queries"]
    assert config.backbone.model_dump()["width"] == golden["backbone"]["base_width"]
    assert list(config.backbone.stages) == golden["backbone"]["outputs"]  # type: ignore[union-attr]
    assert [head.type for head in config.heads] == golden["heads"]
    rcnn = config.heads[0].rcnn  # type: ignore[union-attr]
    assert (rcnn.fc_dim, rcnn.finest_scale) == tuple(
        golden["rcnn"][name] for name in ("fc_dim", "finest_scale")
    )
    assert config.positive_queries.features == golden["positive_queries"]["coordinate_features"]


def test_a_parallel_prefix_and_missing_counters_do_not_matter() -> None:
    official = small()
    state = {f"module.{n}": v for n, v in official.items() if "num_batches" not in n}
    assert len(state) < len(official)
    imported, plain = import_official(state), import_official(official)
    assert imported.state.keys() == plain.state.keys()
    imported.build()


# ------------------------------------------------------------------------- what has no place, or is
# not there


def test_masks_and_averages_are_dropped_and_reported() -> None:
    extra = {
        "roi_head.0.mask_head.convs.0.conv.weight": "mask branch",  # Mask R-CNN
        "mask_head.stages.0.instance_logits.weight": "mask branch",  # Co-DINO-Inst
        "mask_iou_head.fcs.0.weight": "mask branch",
        "ema_backbone_conv1_weight": "averaging",
    }
    official = small()
    imported = import_official(official | {name: torch.ones(3) for name in extra})
    assert imported.dropped.keys() == extra.keys()
    for name, why in extra.items():
        assert why in imported.dropped[name]
    assert imported.state.keys() == import_official(official).state.keys()


def require_missed(official: dict[str, torch.Tensor], gone: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_official({name: value for name, value in official.items() if name != gone})
    message = str(caught.value)
    assert "\n" not in message
    assert f"there is no '{gone}'" in message or f"1 missing: {gone}" in message
    assert "unknown" not in message
    assert "shape" not in message


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["co_dino", "co_deformable"]), st.data())
def test_no_name_goes_missing_unseen(detector: str, data: st.DataObject) -> None:
    official = {n: v for n, v in small(detector).items() if "num_batches_tracked" not in n}
    require_missed(official, data.draw(st.sampled_from(sorted(official))))


ROOT = "query_head.transformer"


@pytest.mark.parametrize(
    ("model", "gone"),
    [
        ("co_dino_r50", f"{ROOT}.query_embed.weight"),
        ("co_dino_r50", f"{ROOT}.aux_pos_trans.0.weight"),
        ("co_dino_r50", "rpn_head.rpn_conv.weight"),
        ("co_dino_r50", "backbone.layer1.0.conv3.weight"),
        ("co_dino_r50", "bbox_head.0.atss_cls.weight"),
        ("co_deformable_r50", "query_head.query_embedding.weight"),
        ("co_deformable_r50", f"{ROOT}.pos_feats_trans.0.weight"),
        ("co_deformable_r50", f"{ROOT}.head_pos_embed.weight"),
        ("co_dino_swin_l", "backbone.patch_embed.proj.weight"),
        ("co_dino_vit_l", "backbone.pos_embed"),
        ("co_dino_vit_l", "backbone.rope_win.freqs_cos"),
        ("co_dino_vit_l", "backbone.blocks.1.attn.rope.freqs_cos"),
        ("co_dino_vit_l", "backbone.blocks.16.attn.rope.freqs_cos"),
    ],
)
def test_a_name_by_which_a_part_is_known_is_missed_itself(model: str, gone: str) -> None:
    require_missed(full_size(model), gone)


def test_a_named_detector_is_not_guessed() -> None:
    """All that is missing is listed, and rotations that follow from the configuration are not."""
    official = full_size("co_dino_vit_l")
    without = {name: value for name, value in official.items() if "rope" not in name}
    assert import_official(without, "co-dino-5scale-vit-l").state.keys() == (
        import_official(official).state.keys()
    )
    gone = ("query_head.cls_branches.0.weight", "neck.p3.1.weight", "backbone.pos_embed")
    for name in gone:
        del without[name]
    with pytest.raises(CheckpointError, match="3 missing: ") as caught:
        import_official(without, "co-dino-5scale-vit-l")
    assert all(name in str(caught.value) for name in gone)


def test_a_swin_of_other_sizes_is_not_called_one_that_is_known() -> None:
    official = full_size("co_dino_swin_l")
    deep = {n.replace("layers.2.blocks.17", "layers.2.blocks.18"): v for n, v in official.items()}
    with pytest.raises(CheckpointError, match=r"no known Swin has 192 .* \[2, 2, 19, 2\] blocks"):
        import_official(official | deep)


def test_unknown_and_misshapen_names_are_listed() -> None:
    official = small()
    official["rpn_head.rpn_conv.scale"] = torch.ones(1)
    official["neck.convs.0.gn.bias"] = torch.ones(7)
    with pytest.raises(CheckpointError) as caught:
        import_official(official)
    assert "1 unknown: rpn_head.rpn_conv.scale" in str(caught.value)
    assert "neck.convs.0.gn.bias is (7,) instead of (32,)" in str(caught.value)


def test_derived_buffers_must_be_what_they_are_derived_to() -> None:
    config = codetr.zoo.detector_config("co-deformable-detr-swin-t")
    state = {n: torch.zeros(v.shape) for n, v in on_meta(config).state_dict().items()}
    official = export_official(state, config)
    name = next(name for name in official if name.endswith("relative_position_index"))
    assert import_official(official).dropped[name] == DERIVED
    official[name] = official[name] + 1
    with pytest.raises(CheckpointError, match="other values than"):
        import_official(official)


@pytest.fixture(scope="module")
def vit_on_a_canvas() -> dict[str, torch.Tensor]:
    """The record model on LVIS, which also stores the rotations of its canvas' 96 x 96 cells:
    computed here as the original does, with meta tensors for all else."""
    config = codetr.zoo.detector_config("co-dino-5scale-vit-l-lvis")
    official = export_official(on_meta(config).state_dict(), config)
    for name, value in derived_buffers(config).items():
        official[name] = value
    rates = 1 / 10000 ** (torch.arange(0, 32, 2)[:16].float() / 32)
    angles = ((torch.arange(96) / 96 * 16)[:, None] * rates).repeat_interleave(2, dim=-1)
    rows, columns = angles[:, None].expand(-1, 96, -1), angles[None].expand(96, -1, -1)
    of_cells = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    for owner in ("rope_glb", "blocks.2.attn.rope"):
        official[f"backbone.{owner}.freqs_cos"] = of_cells.cos()
        official[f"backbone.{owner}.freqs_sin"] = of_cells.sin()
    return official


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotations_of_windows_and_canvas_in_any_precision(
    vit_on_a_canvas: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    official = {n: v.to(dtype) if "freqs" in n else v for n, v in vit_on_a_canvas.items()}
    imported = import_official(official)
    assert imported.dropped["backbone.rope_glb.freqs_sin"] == DERIVED
    name = "backbone.rope_glb.freqs_sin"
    for other in (torch.full_like(official[name], 7.0), official[name][:, :-1], official[name][1:]):
        with pytest.raises(CheckpointError, match=f"{name} has other values"):
            import_official(official | {name: other})
    name = "backbone.rope_win.freqs_cos"
    with pytest.raises(CheckpointError, match=f"{name} has other values"):
        import_official(official | {name: official[name] + 0.05})


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"backbone.conv1.weight": torch.ones(1)}, "no official Co-DETR detector: there is no"),
        ({}, "no official Co-DETR detector"),
    ],
)
def test_somebody_elses_state_dict(state: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        import_official(state)


def test_another_name_than_its_own() -> None:
    official = full_size("co_dino_swin_l")
    fine_tuned = import_official(official, "co-dino-5scale-swin-l-o365")
    assert fine_tuned.data.max_side == 2048
    assert fine_tuned.names == ("co-dino-5scale-swin-l-o365",)
    with pytest.raises(CheckpointError, match="missing"):
        import_official(official, "co-dino-5scale-r50")


def test_files_of_the_same_shapes_are_told_by_their_names() -> None:
    official = full_size("co_dino_swin_l")
    alike = ("co-dino-5scale-swin-l", "co-dino-5scale-swin-l-lsj", "co-dino-5scale-swin-l-o365")
    assert import_official(official).names == alike
    assert import_official(official, file_name="mine").names == alike
    for name in alike:
        file_name = codetr.zoo.entry(name).official[-1]
        for spelt in (file_name, f"{file_name}-614254c9"):  # as MMDetection names what it hosts
            imported = import_official(official, file_name=spelt)
            assert imported.names == (name,)
            assert imported.data == codetr.zoo.entry(name).data_config
    lsj = codetr.zoo.entry(alike[1]).official[0]
    assert import_official(official, alike[2], lsj).names == alike[2:]  # --name says more


def test_lvis_is_told_by_its_number_of_classes_and_seen_on_its_canvas() -> None:
    config = codetr.zoo.detector_config("co-dino-5scale-swin-l-lvis")
    official = export_official(on_meta(config).state_dict(), config)
    lvis = ("co-dino-5scale-swin-l-lvis", "co-dino-5scale-swin-l-o365-lvis")
    imported = import_official(official)
    assert imported.names == lvis
    # Its images lie on a grey canvas of which the detector sees all, as the original's
    # Resize(1280), Pad(1280, 114), Normalize and with_attn_mask=False.
    dark = torch.zeros(3, 320, 640, dtype=torch.uint8)
    shown = build_transform(imported.data, training=False)(dark)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    batch, _ = collate([(shown, nothing)], build_canvas(imported.data))
    assert batch.sizes == [(1280, 1280)]
    assert batch.contents == [(640, 1280)]
    assert batch.pixels.shape == (1, 3, 1280, 1280)
    mean, std = (torch.tensor(getattr(imported.data, kind))[:, None] for kind in ("mean", "std"))
    above, below = batch.pixels[0, :, :640].flatten(1), batch.pixels[0, :, 640:].flatten(1)
    torch.testing.assert_close(above, ((0 - mean) / std).expand_as(above))
    torch.testing.assert_close(below, ((114 / 255 - mean) / std).expand_as(below))


@pytest.mark.parametrize(
    "name", [e.name for e in codetr.zoo.entries() if not e.unavailable and e.config.k == 2]
)
def test_every_official_detector_of_the_zoo_is_recognised(name: str) -> None:
    """Also those of which no key list was recorded; where others of the same shapes have published
    checkpoints, as those."""
    config: DetectorConfig = codetr.zoo.detector_config(name)
    if not config.queries.two_stage:
        pytest.skip("the official implementation publishes no one-stage detector")
    exported = export_official(on_meta(config).state_dict(), config)
    names = import_official(exported).names
    released = all(codetr.zoo.entry(found).official for found in names)
    assert name in names or (released and not codetr.zoo.entry(name).official)
    assert import_official(exported, name).names == (name,)
