"""One bar for a whole run."""

import io

import pytest
import support
import tqdm as tqdm_module

from llmcompressor_moe import compression, progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tqdm_module.tqdm]:
    """Every bar that our modules draw."""
    drawn = []

    class Watched(tqdm_module.tqdm):
        def __init__(self, *args, **kwargs):
            # Tests run with bars off in the environment.
            super().__init__(*args, **{"file": io.StringIO(), "disable": False} | kwargs)
            self.shown = not self.disable
            drawn.append(self)

        def close(self):
            self.ended_at = getattr(self, "ended_at", self.n)
            super().close()

    monkeypatch.setattr(progress, "tqdm", Watched)
    return drawn


RECIPES = {
    "drop": """
    ExpertDropModifier: {num_drop: 1, criterion: reap}
""",
    "gptq": """
    GPTQModifier: {targets: [Linear], scheme: W4A16, ignore: ["lm_head", "re:.*gate$", "re:.*o_proj"]}
""",
    "one part after the other": """
    BlockDropModifier: {num_drop: 1, metric: kl}
    ExpertDropModifier: {num_drop: 1, criterion: reap, share_statistics: false}
""",
}


@pytest.mark.parametrize("name", RECIPES)
def test_one_bar_that_gets_on_all_the_time(name, bars, tmp_path, capfd):
    model = support.saved("mixtral", tmp_path, hidden_size=128, intermediate_size=128)
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(f"default_stage:\n  default_modifiers:{RECIPES[name]}")
    text.write_text(" ".join(f"t{i % 90}" for i in range(400)))
    seen = []
    compression.compress(
        model, recipe, text, tmp_path / "out", num_samples=4, sequence_length=16,
        announce=lambda step: seen.append((step, [bar.n / bar.total for bar in bars])),
    )  # fmt: skip
    (bar,) = bars
    assert bar.ended_at == bar.total
    step, (before_saving,) = seen[-1]
    assert step.startswith("Saving") and 0.2 < before_saving < 1
    # None of upstream's either.
    assert "it/s" not in capfd.readouterr().err


def test_outside_of_a_run_each_step_has_its_own(bars):
    with progress.progress(3, "Step") as advance:
        advance(2)
    with progress.progress(3, None) as advance:
        advance(1)
    assert [(bar.ended_at, bar.shown) for bar in bars] == [(2, True), (0, False)]


def test_more_work_than_expected_neither_overflows_nor_goes_back(bars):
    shares = []
    with progress.run_progress(100, 40) as run:
        for _ in range(4):
            with progress.progress(2, "Pass", passes=1) as advance:
                for _ in range(2):
                    advance(1)
                    shares.append((bars[0].n, bars[0].total))
        with run.aside():
            pass
    assert all(done <= total for done, total in shares)
    assert [done for done, _ in shares] == sorted(done for done, _ in shares)
    assert bars[0].ended_at == bars[0].total == 160
