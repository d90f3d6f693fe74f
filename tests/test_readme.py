"""What README and docs tell people to type works, and every link leads somewhere."""

import ast
import re
from pathlib import Path

import pytest
import support

from llmcompressor_moe.recipe_file import read_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """On a tiny Mixtral in place of the real one and tokens in place of the dataset."""
    model = support.saved(
        "mixtral", tmp_path, num_layers=10, hidden_size=128, head_dim=64, intermediate_size=128
    )
    monkeypatch.chdir(tmp_path)
    compress, load = blocks("python")
    for written, here in (
        ('"Mixtral-8x7B-v0.1"', repr(str(model))),
        ('"open_platypus"', "data"),
        ('    splits="train[:512]",\n', ""),
    ):
        assert written in compress
        compress = compress.replace(written, here)
    exec(compress, {"data": support.dataset()})
    assert (tmp_path / "layers.json").exists()
    names: dict = {}
    exec(load, names)
    assert support.logits(names["model"]).isfinite().all()


def test_recipe_of_the_readme_is_the_python_above_it(tmp_path):
    (written,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(written)
    calls = {
        node.func.id: {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse(blocks("python")[0]))
        if isinstance(node, ast.Call) and node.func.id.endswith("Modifier")
    }
    recipe = read_recipe(path).modifiers
    assert sorted(type(modifier).__name__ for modifier in recipe) == sorted(calls)
    for modifier in recipe:
        assert {name: getattr(modifier, name) for name in calls[type(modifier).__name__]} == calls[
            type(modifier).__name__
        ]


def test_nothing_that_is_published_tells_where_it_was_made():
    assert not support.files_that_tell(*(ROOT / name for name in ("docs", "grids", "recipes", "benchmarks")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths in backticks that name a folder of this repository."""
    for name in re.findall(r"`((?:recipes|scripts|tests|src|serving|docs)/[\w./-]*)`", page.read_text()):
        assert (ROOT / name).exists(), name
