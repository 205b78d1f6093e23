"""``codetr models``, ``convert``, and what they make in ``eval`` and ``predict``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_training import start, tiny_detector, tiny_training

from codetr import CoDETR
from codetr.checkpoint import save_checkpoint
from codetr.config import DataConfig, DetectorConfig
from codetr.data import Classes
from codetr.data.digits import make_digits
from codetr.metrics import Metrics, evaluate
from codetr.structures import Detections
from codetr.weights import Weights, save_weights
from codetr.zoo.catalogue import detector_config, entry, names
from codetr.zoo.files import Report
from orchestrator import cli
from orchestrator.use import image_files
from orchestrator.zoo_console import image_progress, show_conversion

GOLDEN = Path(__file__).parents[1] / "golden"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["codetr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())  # type: ignore[return-value]

    return run


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The recorded Co-DINO as the original saves it, with a mask branch."""
    state = torch.load(GOLDEN / "co_dino/model.pt", weights_only=True)
    state["mask_head.stages.0.weight"] = torch.ones(2)
    path = tmp_path / "official.pth"
    torch.save({"meta": {"CLASSES": list("abcde")}, "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.fixture
def folder(official: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds ``official.pth``, and where the command runs."""
    monkeypatch.chdir(official.parent)
    return official.parent


# ------------------------------------------------------------------------------------------ models


def test_models_has_a_line_for_each(command: Command) -> None:
    code, out, err = command("models")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert set(names()) < set(lines)
    sizes = " ".join(lines["dino-5scale-r50-k1"].split()[1:])
    assert sizes == "resnet50 900 5 1 coco 48.0 50.2 1,720 51.0 (12)"
    assert lines["adamixer-r50"].split()[1:] == ["–", "coco", "47.0", "(36)"]


def test_one_model_as_yaml(command: Command) -> None:
    import yaml

    code, out, _ = command("models", "co-dino-5scale-r50")
    assert code == 0
    assert out.startswith("# co-dino-5scale-r50: AP 52.1 (12)")
    assert "# images: short side 800 pixels, long side at most 1333" in out
    assert yaml.safe_load(out)["detector"]["queries"]["count"] == 900
    code, out, _ = command("models", "adamixer-r50")
    assert code == 0
    assert "cannot be built" in out


def test_models_import_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['codetr', 'models']\n"
        "from orchestrator.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    print([m for m in ('torch', 'ray', 'mlflow', 'timm') if m in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


# ----------------------------------------------------------------------------------------- convert


def test_convert_reports_and_eval_and_predict_take_it(
    command: Command, official: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "weights" / "model.safetensors"
    code, out, err = command("convert", official, "--out", out_file)
    assert (code, err) == (0, "")
    assert "K = 2, 30 queries, 5 classes" in out
    assert "  images: short side 800 pixels, long side at most 1333" in out
    assert "no detector of the zoo has these shapes" in out
    assert "left out: 1, as mask_head.stages.0.weight (mask branch" in out
    assert "left out: 1, as optimizer (state of a training)" in out
    image, found_in = tmp_path / "a.png", tmp_path / "found"
    Image.new("RGB", (60, 40)).save(image)
    code, out, err = command("predict", out_file, image, "--output", found_in)
    assert (code, err) == (0, "")
    found = json.loads((found_in / "predictions.json").read_text())
    code, _, err = command("predict", f"file://{out_file}", image, "--output", tmp_path / "url")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "url/predictions.json").read_text()) == found
    assert [c["name"] for c in found["categories"]] == list("abcde")
    # The digits have other classes.
    folder = tmp_path / "digits"
    make_digits(folder, train_images=1, val_images=1)
    code, _, err = command("eval", out_file, "--data", folder)
    assert code == 2
    assert "classes differ" in err
    assert "has 10, of which" in err
    assert "has 5, of which" in err


def test_several_detectors_of_the_same_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """What convert says of them; their files are too large to be made here."""
    config, names = detector_config("co-dino-5scale-swin-l"), ("swin-l", "swin-l-lsj")
    several = tuple(f"co-dino-5scale-{name}" for name in names)
    weights = Weights({}, config, entry(several[0]).data_config, Classes((), ()))
    show_conversion(Path("m.safetensors"), Report(weights, 5, {}, several))
    said = capsys.readouterr().out
    assert said.startswith("m.safetensors: co-dino-5scale-swin-l, K = 2, 900 queries")
    assert "ambiguous: as well co-dino-5scale-swin-l-lsj (on a canvas of 1280 × 1280" in said
    assert "--name" in said
    show_conversion(Path("m.safetensors"), Report(weights, 5, {}, several[:1]))
    assert "--name" not in capsys.readouterr().out


def test_convert_there_and_back(command: Command, official: Path, tmp_path: Path) -> None:
    assert command("convert", official, "--out", tmp_path / "m.safetensors")[0] == 0
    assert command("convert", tmp_path / "m.safetensors", "--to-official", "--out",
                   tmp_path / "back.pth")[0] == 0  # fmt: skip
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    before = torch.load(official, weights_only=True)["state_dict"]
    assert {*before} - {*back} == {"mask_head.stages.0.weight"}
    assert all(torch.equal(value, before[name]) for name, value in back.items())


def test_eval_of_converted_weights(command: Command, tmp_path: Path) -> None:
    """They say as much as the checkpoint that they are made of."""
    folder = tmp_path / "digits"
    make_digits(folder, train_images=1, val_images=4)
    detector = tiny_detector("atss").model_copy(update={"num_classes": 10})
    checkpoint = start(detector, tiny_training(), 1).checkpoint()
    digits = Classes(tuple(map(str, range(10))), tuple(range(1, 11)))
    data = checkpoint.data.model_copy(update={"short_sides": ()})
    save_checkpoint(replace(checkpoint, classes=digits, data=data), tmp_path / "checkpoint.pt")
    assert command("convert", tmp_path, "--out", tmp_path / "w.safetensors")[0] == 0
    results = []
    for file in ("checkpoint.pt", "w.safetensors"):
        arguments = ("eval", tmp_path / file, "--data", folder, "--json", tmp_path / "m.json")
        assert command(*arguments)[0] == 0
        results.append(json.loads((tmp_path / "m.json").read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eval_measures_what_predict_finds(
    precision: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images in several sizes: none is padded for the sake of the others."""
    folder = tmp_path / "mine"
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    sizes = [(64, 48), (48, 64), (64, 48), (40, 60), (60, 40)]
    draw = np.random.default_rng(0)
    images = []
    for number, (height, width) in enumerate(sizes, start=1):
        pixels = draw.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"val/{number}.png")
        name = f"{number}.png"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20]}
    categories = [{"id": n, "name": name} for n, name in enumerate(("a", "b", "c"), start=1)]
    content = {"images": images, "annotations": [box], "categories": categories}
    (folder / "annotations/instances_val.json").write_text(json.dumps(content))
    model = start(tiny_detector("atss"), tiny_training(), 1).checkpoint()
    data = DataConfig(short_sides=(64,), max_side=96)
    file = tmp_path / "w.safetensors"
    classes = Classes(("a", "b", "c"), (1, 2, 3))
    save_weights(Weights(dict(model.model), model.detector, data, classes), file)

    measured: list[dict[int, Detections]] = []

    def spy(dataset: object, found: dict[int, Detections], engine: str) -> Metrics:
        measured.append(found)
        return evaluate(dataset, found, engine)  # type: ignore[arg-type]

    monkeypatch.setattr("codetr.metrics.evaluate", spy)
    code, _, err = command("eval", file, "--data", folder, "--precision", precision)
    assert (code, err) == (0, "")
    detector = CoDETR.from_checkpoint(file)
    paths = [folder / f"val/{image['file_name']}" for image in images]
    wanted = detector.predict(paths, precision=precision)  # type: ignore[arg-type]
    for image, expected in zip(images, wanted, strict=True):
        for part in ("boxes", "scores", "labels"):
            found = getattr(measured[0][image["id"]], part)  # type: ignore[index]
            assert torch.equal(found, getattr(expected, part))
        assert len(expected) > 0


def test_1203_classes_on_a_data_set_of_1204(command: Command, tmp_path: Path) -> None:
    detector = tiny_detector().model_copy(update={"num_classes": 1203})
    checkpoint = start(detector, tiny_training(), 1).checkpoint()
    lvis = Classes(tuple(f"thing {n}" for n in range(1, 1204)), tuple(range(1, 1204)))
    weights = Weights(dict(checkpoint.model), detector, checkpoint.data, lvis)
    save_weights(weights, tmp_path / "w.safetensors")
    folder = tmp_path / "lvis"
    make_digits(folder, train_images=1, val_images=1)
    for path in folder.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        content["categories"] = [{"id": n, "name": f"thing {n}"} for n in range(1, 1205)]
        path.write_text(json.dumps(content))
    code, _, err = command("eval", tmp_path / "w.safetensors", "--data", folder)
    assert code == 2
    assert err.count("\n") == 1
    assert "has 1204, of which only there: 1204 'thing 1204'" in err
    assert "w.safetensors has 1203, of which only there: none" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "co-dino-5scale-r5"], "did you mean 'co-dino-5scale-r50'"),
        (["convert", "gone.pth", "--out", "w.safetensors"], "cannot read gone.pth: No such file"),
        (["convert", "official.pth"], "--out"),
        (["convert", "official.pth", "--out", "w.pt"], "name it w.safetensors"),
        (["convert", "official.pth", "--out", "w.safetensors", "--name", "x"], "no detector 'x'"),
        (
            ["convert", "official.pth", "--out", "w.safetensors", "--name", "co-dino-5scale-r50"],
            "official.pth: not the official detector it looks like",
        ),
        (
            ["convert", "official.pth", "--out", "w.safetensors", "--classes", "none.json"],
            "none.json",
        ),
        (["convert", "official.pth", "--to-official", "--out", "w.pth"], "codetr convert"),
        (
            ["convert", "official.pth", "--to-official", "--name", "x", "--out", "w.pth"],
            "neither --name nor --classes",
        ),
        (["predict", "official.pth", "a.png"], "codetr convert"),
        (["predict", "official.pth", "empty"], "empty: no image in this folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str], message: str, command: Command, folder: Path
) -> None:
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("codetr: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(folder.rglob("*")) == before


# ----------------------------------------------------------------------------------------- predict


def test_a_folder_of_frames_in_the_order_of_their_numbers(command: Command, tmp_path: Path) -> None:
    save_checkpoint(start(tiny_detector(), tiny_training(), 1).checkpoint(), tmp_path / "c.pt")
    video = tmp_path / "video"
    video.mkdir()
    for number in (10, 9, 1, 100):
        Image.new("RGB", (32, 24), (number, 0, 0)).save(video / f"frame{number}.PNG")
    (video / "notes.txt").write_text("no image")
    code, out, err = command(
        "predict", tmp_path / "c.pt", video, "--output", tmp_path / "found", "--batch-size", 3
    )
    assert (code, err) == (0, "")
    numbers = [1, 9, 10, 100]
    found = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [i["file_name"] for i in found["images"]] == [
        str(video / f"frame{number}.PNG") for number in numbers
    ]
    assert [(i["height"], i["width"]) for i in found["images"]] == [(24, 32)] * 4
    pictures = [str(tmp_path / "found" / f"frame{number}.png") for number in numbers]
    assert out.splitlines() == [*pictures, str(tmp_path / "found/predictions.json")]


def test_a_broken_frame_is_named_before_anything_is_written(
    command: Command, tmp_path: Path
) -> None:
    save_checkpoint(start(tiny_detector(), tiny_training(), 1).checkpoint(), tmp_path / "c.pt")
    video = tmp_path / "video"
    video.mkdir()
    Image.new("RGB", (32, 24)).save(video / "1.png")
    (video / "2.png").write_bytes(b"no image")
    code, _, err = command("predict", tmp_path / "c.pt", video, "--output", tmp_path / "found")
    assert code == 2
    assert "2.png: cannot be decoded" in err
    assert not (tmp_path / "found").exists()


def test_a_bar_tells_what_is_done_and_is_gone_in_the_end() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80)
    with image_progress(console) as report:
        for done in (1, 2):
            report("reading", done, 2)
        report("detecting", 1, 2)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"reading .*2/2", shown)
    assert re.search(r"detecting .*1/2", shown)
    assert shown.endswith("\x1b[2K")  # the line is erased
    file = StringIO()
    with image_progress(Console(file=file)) as report:  # nobody looks
        report("reading", 1, 2)
    assert not file.getvalue().strip()


@pytest.mark.parametrize("name", ["swin_tiny", "eva02_large"])
def test_predict_with_a_small_swin_and_a_small_vit(
    name: str, command: Command, tmp_path: Path
) -> None:
    sizes = {
        "swin_tiny": {"width": 32, "depths": [1, 1, 1, 1], "window": 4, "stages": [2, 3, 4]},
        "eva02_large": {"width": 64, "depth": 4, "window": 4, "position_grid": 4},
    }
    settings = tiny_detector("atss").model_dump()
    settings["backbone"] = {"name": name, "pretrained": False, **sizes[name]}
    settings["transformer"]["levels"] = 4
    detector = DetectorConfig.model_validate(settings)
    data = DataConfig(short_sides=(64,), max_side=96)
    classes = Classes(("a", "b", "c"), (1, 2, 3))
    file = tmp_path / "w.safetensors"
    save_weights(Weights(CoDETR(detector).state_dict(), detector, data, classes), file)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    arguments = ("--output", tmp_path / "found", "--precision", "bf16")
    code, _, err = command("predict", file, tmp_path / "a.png", *arguments)
    assert (code, err) == (0, "")
    assert len(json.loads((tmp_path / "found/predictions.json").read_text())["annotations"]) > 0


def test_files_and_folders_may_be_mixed(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/10.jpg", "b/sub/1.jpg", "a.weird"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = image_files([tmp_path / "a.weird", tmp_path / "b"])
    assert [path.name for path in found] == ["a.weird", "2.jpg", "10.jpg"]
