import pytest

from codetr.config import DataConfig
from codetr.data import DataError, open_dataset
from orchestrator.facts import data_facts


def test_facts_of_a_folder_are_those_of_the_opened_data(coco_folder):
    config = DataConfig(dataset="coco", path=coco_folder, short_sides=(), crop=False)
    facts = data_facts(config)
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert (facts.train_images, facts.val_images) == (len(train), len(val))
    assert facts.classes == len(train.classes)


def test_limits_count(coco_folder):
    facts = data_facts(
        DataConfig(dataset="coco", path=coco_folder, train_images=5, val_images=1000)
    )
    assert (facts.train_images, facts.val_images) == (5, 4)


@pytest.mark.parametrize(
    ("dataset", "counts"), [("digits", (2000, 200, 10)), ("digits-lvis", (1000, 200, 30))]
)
def test_embedded_data_is_counted_without_being_made(dataset, counts, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = data_facts(DataConfig(dataset=dataset))
    assert (facts.train_images, facts.val_images, facts.classes) == counts
    assert not any(tmp_path.iterdir())


def test_unreadable_annotations_are_named(tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (tmp_path / "train").mkdir()
    (annotations / "instances_train.json").write_text("")
    with pytest.raises(DataError, match=r"instances_train\.json"):
        data_facts(DataConfig(dataset="coco", path=tmp_path))
    (annotations / "instances_train.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="lists no image"):
        data_facts(DataConfig(dataset="coco", path=tmp_path))
