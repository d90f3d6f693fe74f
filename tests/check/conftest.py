"""Good checkpoints, made once, and copies of them to break."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import support

Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("good")


@pytest.fixture
def good(originals: Path, tmp_path: Path) -> Copy:
    """A fresh copy of a good checkpoint of a family."""

    def copy(model_type: str = "mixtral") -> Path:
        source = support.saved(model_type, originals)
        target = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        return Path(shutil.copytree(source, target))

    return copy
