"""The zoo of names: complete, valid, and its numbers those of the built detectors."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from codetr import CoDETR
from codetr.config import ConfigError, DetectorConfig, read_yaml
from codetr.structures import ImageBatch, Targets
from codetr.zoo import catalogue
from codetr.zoo.catalogue import Entry, entries, entry
from codetr.zoo.measure import gflops, on_meta, write
from orchestrator.experiment import paper_tables

BUILT = [found for found in entries() if found.unavailable is None]
TABLES = paper_tables()


# ------------------------------------------------------------------------------ what the paper says


def published(source: str) -> list[float]:
    return sorted(row.ap for found in entries() for row in found.published if row.source == source)


def test_every_number_of_tables_2_and_3_has_a_name() -> None:
    for source, table in (
        ("table 2", TABLES["table2_plain_baselines"]),
        ("table 3", TABLES["table3_strong_baselines"]),
    ):
        assert published(source) == sorted(ap for row in table for ap in row["ap"].values())


def test_every_number_of_tables_4_to_6_has_a_name() -> None:
    assert published("table 4") == sorted(row["ap"][0] for row in TABLES["table4_state_of_the_art"])
    (coco,) = TABLES["table5_coco_systems"]
    assert published("table 5") == sorted([coco["val"], coco["test_dev"]])
    lvis = TABLES["table6_lvis_systems"]
    assert published("table 6") == sorted(ap for r in lvis for ap in (r["val"], r["minival"]))


def test_every_released_checkpoint_has_a_name() -> None:
    released = TABLES["released_checkpoints"]
    assert published("released") == sorted(
        ap for list_ in released.values() for ap in list_.values()
    )


@pytest.mark.parametrize(
    "row", TABLES["table4_state_of_the_art"], ids=lambda row: str(row["ap"][0])
)
def test_table_4_is_of_these_detectors(row: dict[str, object]) -> None:
    """Backbone, queries, levels and epochs stand in the table, too."""
    key = ("table 4", row["ap"][0], row["epochs"])
    found = [e for e in entries() for p in e.published if (p.source, p.ap, p.epochs) == key]
    assert found
    if all(e.unavailable for e in found):
        return
    families = {"r50": "resnet50", "swin-l": "swin_large"}
    fits = [
        e.config
        for e in found
        if not e.unavailable
        and e.config.backbone.name == families[row["backbone"]]
        and e.config.queries.total == row["queries"]
        and e.config.transformer.levels == row.get("levels", e.config.transformer.levels)
    ]
    assert fits


# ------------------------------------------------------------------------------ what the files say


@pytest.mark.parametrize("found", BUILT, ids=lambda found: found.name)
def test_parameters_are_those_of_the_built_detector(found: Entry) -> None:
    model = on_meta(found.config)
    assert found.measured is not None, f"python -m codetr.zoo.measure {found.name}"
    assert sum(p.numel() for p in model.parameters()) == found.measured.training_parameters
    inference = sum(p.numel() for p in model.inference_parameters())
    assert inference == found.measured.inference_parameters
    assert (inference < found.measured.training_parameters) == bool(
        found.config.heads or found.config.denoising.enabled or found.config.one_to_many.groups
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Deformable DETR's own table of models: one stage, and two with refinement.
        ("deformable-detr-r50", 40),
        ("two-stage-deformable-detr-r50", 41),
        # The paper's table 6.
        ("co-dino-5scale-swin-l", TABLES["table6_lvis_systems"][0]["params"]),
    ],
)
def test_published_numbers_of_parameters(name: str, millions: int | str) -> None:
    measured = entry(name).measured
    assert measured is not None
    published = float(str(millions).removesuffix("M"))
    assert measured.inference_parameters / 1e6 == pytest.approx(published, abs=0.5)


def test_the_paper_counts_the_vit_alone() -> None:
    """304 M in tables 5 and 6."""
    backbone = on_meta(entry("co-dino-5scale-vit-l").config).backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert f"{millions:.0f}M" == TABLES["table5_coco_systems"][0]["params"]


def plain(config: DetectorConfig) -> DetectorConfig:
    """What is left at inference, and decides the FLOPs."""
    drop_path = {"drop_path": 0.0} if hasattr(config.backbone, "drop_path") else {}
    backbone = config.backbone.model_copy(update=drop_path)
    ours = DetectorConfig.model_fields
    return config.model_copy(
        update={
            "backbone": backbone,
            **{
                name: ours[name].default
                for name in ("heads", "denoising", "positive_queries", "query_loss", "soft_nms")
            },
            "max_detections": 100,
        }
    )


def test_detectors_that_infer_alike_have_the_same_flops() -> None:
    numbers = defaultdict(set)
    for found in BUILT:
        assert found.measured is not None
        numbers[plain(found.config).model_dump_json()].add(found.measured.gflops)
    assert all(len(of_one) == 1 for of_one in numbers.values())
    assert len(numbers) < len(BUILT)


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        # DINO's paper, tables 1 and 2: 279 GFLOPs for Deformable DETR with four scales and mixed
        # queries, 860 for DINO with five; a multiply-add is one there, and two with torch.
        ("deformable-detr++-r50", 279),
        ("dino-5scale-r50", 860),
        ("co-deformable-detr-swin-t", None),
        ("co-dino-5scale-vit-l", None),
    ],
)
def test_flops_are_those_of_the_built_detector(name: str, paper: float | None) -> None:
    measured = entry(name).measured
    assert measured is not None
    assert round(gflops(on_meta(entry(name).config)), 1) == measured.gflops
    assert paper is None or measured.gflops / 2 == pytest.approx(paper, rel=0.01)


@pytest.mark.parametrize("found", entries(), ids=lambda found: found.name)
def test_files_begin_with_what_they_are(found: Entry) -> None:
    assert found.file.read_text().startswith("# ")
    assert found.published or not found.unavailable


def test_every_part_is_used() -> None:
    parts = {path.stem for path in (catalogue.FOLDER / "parts").glob("*.yaml")}
    assert parts == {part for found in entries() for part in found.parts}


# -------------------------------------------------------------------------------------- using names


def small(config: DetectorConfig) -> DetectorConfig:
    """The same detector in a size that trains within a second."""
    sizes: dict[str, object] = {
        "ResNetConfig": {"name": "tiny"},
        "SwinConfig": {"width": 32, "depths": (1, 1, 1, 1), "window": 4},
        "VitConfig": {"width": 64, "depth": 4, "window": 4, "position_grid": 4},
    }[type(config.backbone).__name__]  # type: ignore[assignment]
    levels = config.transformer.levels
    settings = config.model_dump()
    settings["num_classes"] = 5
    settings["backbone"] |= {"pretrained": False, **sizes}  # type: ignore[operator]
    settings["transformer"] |= {
        "embed_dim": 32,
        "ffn_dim": 32,
        "attention_heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "levels": levels,
        "group_norm_groups": 8,
    }
    settings["queries"]["count"] = 20
    settings["denoising"]["queries"] = 5
    for head in settings["heads"]:
        if head["type"] == "faster_rcnn":
            head["rpn"] |= {"samples": 32, "train_nms_pre": 100, "test_nms_pre": 50, "keep": 40}
            head["rcnn"] |= {"samples": 16, "fc_dim": 32}
    return DetectorConfig.model_validate(settings)


FAMILIES = [
    "deformable-detr-r50-k2",
    "two-stage-deformable-detr-r50",
    "co-deformable-detr-r50",
    "co-deformable-detr-swin-t",
    "dino-5scale-r50",
    "co-dino-5scale-swin-l",
    "co-dino-5scale-vit-l",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_and_one_detection_of_each_family(name: str) -> None:
    torch.manual_seed(0)
    config = small(catalogue.detector_config(name))
    model = CoDETR(config).train()
    batch = ImageBatch(torch.randn(2, 3, 96, 128), [(96, 128), (80, 96)])
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, 90.0, 70.0]])
    targets = [Targets(boxes, torch.tensor([1, 4])), Targets(boxes[:1], torch.tensor([2]))]
    output = model(batch, targets)
    assert set(output.losses) == set(config.loss_weights())
    output.total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None)]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    found = model.eval()(batch)
    assert [len(f) > 0 for f in found] == [True, True]


def test_a_name_gives_its_detector() -> None:
    with torch.device("meta"):
        model = CoDETR.from_name("co-dino-5scale-vit-l-lvis", pretrained=False)
    assert model.config.num_classes == 1203
    assert model.config.backbone.name == "eva02_large"
    assert model.data.jitter.canvas == 1536


def test_images_are_seen_as_the_official_configurations_test() -> None:
    """``Pad(size=…, pad_val=114)`` and ``with_attn_mask=False`` in those of large-scale jitter, the
    short and the long side in the others."""
    canvases = {e.name: c for e in BUILT if (c := e.data_config.jitter).enabled}
    assert {name: canvas.canvas for name, canvas in canvases.items()} == {
        "co-dino-5scale-r50-9enc": 1024,
        "co-dino-5scale-r50-lsj": 1024,
        "co-dino-5scale-swin-l-lsj": 1280,
        "co-dino-5scale-swin-l-lvis": 1280,
        "co-dino-5scale-swin-l-o365-lvis": 1536,
        "co-dino-5scale-vit-l-lvis": 1536,
    }
    assert {(canvas.fill, canvas.padding_mask) for canvas in canvases.values()} == {(114, False)}
    others = [e for e in BUILT if e.name not in canvases]
    sizes = {e.name: (max(e.data_config.short_sides), e.data_config.max_side) for e in others}
    fine = ("co-dino-5scale-swin-l-o365", "co-dino-5scale-vit-l")
    assert all(size == ((1280, 2048) if n in fine else (800, 1333)) for n, size in sizes.items())


def test_official_files_have_one_name_each() -> None:
    files = [file for found in entries() for file in found.official]
    assert len(files) == len(set(files))
    assert all("lsj" not in f or found.data_config.jitter.enabled
               for found in BUILT for f in found.official)  # fmt: skip
    for found in entries():
        released = [row for row in found.published if row.source == "released"]
        assert len(found.official) >= len(released)
        assert bool(found.official) == bool(released)


@pytest.mark.parametrize("row", [e for e in BUILT if e.official], ids=lambda row: row.name)
def test_large_scale_jitter_is_where_it_is_published(row: Entry) -> None:
    """The list of released checkpoints says which; on LVIS all are, as the original's README."""
    noted = [p.note == "LSJ" for p in row.published if p.source == "released"]
    assert row.data == "lvis" or noted == [row.data_config.jitter.enabled] * len(noted)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("co-dino-5scale-r5", "did you mean 'co-dino-5scale-r50'"),
        ("Co-DINO-5scale-R50", "did you mean 'co-dino-5scale-r50'"),
        ("yolo", "'codetr models' lists them"),
        ("parts/dino", "no detector"),
        ("../zoo/co-dino-5scale-r50", "no detector"),
    ],
)
def test_unknown_names_are_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        CoDETR.from_name(name)
    assert len(str(caught.value)) < 200


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match=r"'adamixer-r50' cannot be built: it is listed for"):
        CoDETR.from_name("adamixer-r50")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty zoo."""
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    functions = (catalogue.names, catalogue.entry, catalogue._part)
    for function in functions:
        function.cache_clear()
    yield tmp_path
    for function in functions:
        function.cache_clear()


def test_parts_are_laid_over_one_another_in_order(folder: Path) -> None:
    (folder / "parts/a.yaml").write_text(
        "detector: {queries: {count: 10}, max_detections: 5, heads: [faster_rcnn, atss]}\n"
        "heads: {faster_rcnn: {rcnn: {fc_dim: 7, samples: 3}}, atss: {topk: 2}}\n"
    )
    (folder / "parts/b.yaml").write_text("detector: {queries: {count: 20}}")
    (folder / "x.yaml").write_text(
        "parts: [a, b]\n"
        "detector: {queries: {two_stage: false}, heads: [faster_rcnn]}\n"
        "heads: {faster_rcnn: {rcnn: {samples: 4}}}\n"
    )
    config = catalogue.detector_config("x")
    assert (config.queries.count, config.queries.two_stage, config.max_detections) == (20, False, 5)
    (head,) = config.heads
    assert (head.rcnn.fc_dim, head.rcnn.samples) == (7, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: [dno]", r"x.yaml: no part 'dno'"),
        ("detektor: {}", r"x.yaml: unknown key 'detektor'; did you mean 'detector'"),
        ("detector: {querys: {}}", r"x.yaml: detector: unknown key 'querys'"),
        ("heads: {atts: {}}", r"x.yaml: detector: heads: no head 'atts'; did you mean 'atss'"),
        ("image: {size: 3}", r"x.yaml: image: unknown key 'size'"),
        ("- a", r"x.yaml: a detector is a mapping"),
        ("unavailable: why\ndetector: {heads: []}", r"unavailable, and yet with settings"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str, folder: Path) -> None:
    (folder / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _ = entry("x").config, entry("x").data_config


def test_measured_numbers_are_written_once(folder: Path) -> None:
    file = folder / "x.yaml"
    file.write_text("# a comment\npublished: []\n")
    numbers = catalogue.Measured(inference_parameters=1, training_parameters=2, gflops=3.5)
    for _ in range(2):
        write(file, numbers)
    assert file.read_text().startswith("# a comment\npublished: []\nmeasured: {")
    assert read_yaml(file)["measured"] == numbers.model_dump()
