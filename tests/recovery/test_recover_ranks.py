"""Two ranks do what one does with batches of twice the size."""

from __future__ import annotations

from pathlib import Path

import pytest
import recovery_cases as cases
import support

from llmcompressor_moe.recovery import RecoveryReport, RecoverySettings, recover


@pytest.mark.parametrize("recipe", [False, True])
def test_two_ranks_have_the_curve_of_one(tmp_path: Path, recipe: bool) -> None:
    base = cases.teacher(tmp_path)
    student, text = cases.student(tmp_path, base), cases.text(tmp_path)
    weights = {"logits_kl": 1, "router_kl": 0.5, "hidden": 0.5}
    settings = {**cases.BASICS, "data": str(text), "weights": weights, "evaluate_every": 2, "save_every": 3}
    if recipe:
        # Experts as one Linear each, of which a rank may pass some by; and a mask that all ranks have to agree on.
        path = tmp_path / "masks.yaml"
        path.write_text(
            "default_stage: {default_modifiers: {MagnitudePruningModifier: {targets: ['re:.*experts.*_proj$'], "
            "init_sparsity: 0.2, final_sparsity: 0.4, start: 0, end: 6}}}"
        )
        settings |= {"recipe": str(path), "weights": {"hidden": 1, "logits_kl": 0}}
    one = recover(student, tmp_path / "one", teacher=base, settings=RecoverySettings.model_validate(settings))
    half = {**settings, "batch_size": 2}
    assert support.run_forked(cases.in_a_process, student, tmp_path / "two", base, half, ranks=2) == [0, 0]
    two = RecoveryReport.model_validate_json((tmp_path / "two" / "recovery.json").read_text())
    assert two.ranks == 2
    assert [entry.tokens for entry in two.log] == [entry.tokens for entry in one.log]
    for ours, theirs in zip(one.log[1:], two.log[1:], strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
        assert theirs.parts == pytest.approx(ours.parts, rel=1e-4)
        assert theirs.gradient_norm == pytest.approx(ours.gradient_norm, rel=1e-3)
    assert two.teacher_nll == pytest.approx(one.teacher_nll, rel=1e-6)
    assert two.end_nll == pytest.approx(one.end_nll, rel=1e-5)
    first, second = cases.tensors(tmp_path / "one"), cases.tensors(tmp_path / "two")
    assert first.keys() == second.keys()
    if recipe:
        zeros = [sum(int((value == 0).sum()) for value in found.values()) for found in (first, second)]
        assert zeros[0] > 100_000 and zeros[1] == zeros[0]
    assert not (tmp_path / "two.training").exists()
