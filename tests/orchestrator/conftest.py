from pathlib import Path

import pytest

from codetr.data.digits import make_digits


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory) -> Path:
    """A data set of 16 + 4 small images in COCO layout."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    return make_digits(folder, train_images=16, val_images=4, size=64)
