"""Sizes of real models, computed from their public configs: against what their publishers' weight files hold, and
docs/recipes.md against what is computed.
"""

import pytest
from recipe_table import CONFIGS, DOCUMENT, MODELS, ROOM, TAKEN, fits, tables_in, updated

from llmcompressor_moe.inspection import inspect_model

# `total_size` in the model.safetensors.index.json of each published checkpoint; gpt-oss-20b has MXFP4 experts.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": ("UNQUANTIZED", 93_405_585_408),
    "Qwen3-30B-A3B": ("UNQUANTIZED", 61_064_245_248),
    "DeepSeek-V2-Lite": ("UNQUANTIZED", 31_412_968_448),
    "OLMoE-1B-7B-0924": ("UNQUANTIZED", 13_838_323_712),
    "gpt-oss-20b": ("MXFP4A16", 13_761_264_768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_that_of_the_published_files(name):
    scheme, nbytes = PUBLISHED[name]
    inspection = inspect_model(CONFIGS / name, [scheme])
    assert inspection.nbytes_in(inspection.schemes[0]) == nbytes


def test_every_model_has_a_table():
    assert sorted(tables_in(DOCUMENT.read_text())) == sorted(model.config for model in MODELS)


def test_page_is_up_to_date():
    text = DOCUMENT.read_text()
    assert updated(text) == text, "run: python tests/recipe_table.py"


def test_fits_leaves_room():
    limit = int(TAKEN * 24e9) - ROOM
    assert (fits(limit), fits(limit + 1)) == ("24 GB", "48 GB")
    assert fits(90 * 10**9) == "2 x 80 GB"
