"""Good checkpoints, made once, and copies of them to break."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from compressing import BEYOND_TRANSFORMERS, PLAIN, SCHEMES, to_native
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

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


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """Make a compressed checkpoint once, hand out copies."""
    made = tmp_path_factory.mktemp("compressed")

    def make(model_type: str, scheme: str):
        path = made / f"{model_type}-{scheme}"
        if not path.exists():
            # oneshot looks into the directory that the model came from
            model = support.load(support.saved(model_type, made / "source"))
            recipe = QuantizationModifier(
                ignore=PLAIN, **copy.deepcopy((SCHEMES | BEYOND_TRANSFORMERS)[scheme])
            )
            data = {"dataset": support.dataset(), "num_calibration_samples": 4, "max_seq_length": 32}
            oneshot(
                model=model,
                recipe=recipe,
                tokenizer=support.tokenizer(),
                output_dir=str(path),
                **(data if scheme == "FP8" else {}),
            )
            if model_type == "mixtral":
                to_native(path)
        return path

    return make


@pytest.fixture
def quantized(compressed, tmp_path):
    def fresh(model_type: str = "mixtral", scheme: str = "W4A16"):
        return shutil.copytree(compressed(model_type, scheme), tmp_path / f"{len(list(tmp_path.iterdir()))}")

    return fresh
