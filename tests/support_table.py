"""What works for which family: found out by doing it, and written to docs/support.md.

    python tests/support_table.py            # writes docs/support.md (several minutes)

`test_families.py` holds every row of that file against what it finds.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import torch
from cut_by_hand import moe_layers, unroutable, zeroed
from serving.families import ARCHITECTURES, NOT_SERVED
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.families import exception_for, refused_families
from llmcompressor_moe.topology import find_topology

DOCUMENT = Path(__file__).parent.parent / "docs" / "support.md"
COLUMNS = ("Block Drop", "Layer Drop", "Expert Drop", "Expert Drop, uneven", "scores from data")
# One expert of each half, so that both groups of a group-limited router lose one.
REMOVED = [2, 5]


def row(model_type: str, directory: Path) -> dict[str, str]:
    """Column -> "yes", or why not. Raises AssertionError where something works, but wrongly."""
    base = support.load(support.saved(model_type, directory))
    layers = sorted(find_topology(base).moe_layers)
    target, others = layers[1], layers[:2]
    blocks = list(range(target, target + exception_for(model_type).position_period))
    recipes: dict[str, Callable[[], Any]] = {
        "Block Drop": lambda: BlockDropModifier(blocks=blocks),
        "Layer Drop": lambda: LayerDropModifier(layers=[target]),
        "Expert Drop": lambda: ExpertDropModifier(experts={layer: REMOVED for layer in layers}),
        "Expert Drop, uneven": lambda: ExpertDropModifier(experts={layer: REMOVED for layer in others[:1]}),
    }
    outcome = {}
    for column, recipe in recipes.items():
        found = _cut(base, recipe(), directory / column.replace(" ", "-"), no_data=True)
        if isinstance(found, torch.Tensor):
            _hold_against_reference(base, found, model_type, column, blocks, layers)
        outcome[column] = found if isinstance(found, str) else "yes"
    scored = [ExpertDropModifier(drop_ratio=0.25, criterion="reap")]
    found = _cut(base, scored, directory / "scored")
    outcome["scores from data"] = found if isinstance(found, str) else "yes"
    return outcome


def _cut(base: PreTrainedModel, recipe: Any, out: Path, **options: Any) -> torch.Tensor | str:
    """Logits of the model that was saved and loaded again, or why there is none."""
    try:
        model = support.trim(copy.deepcopy(base), recipe, output_dir=str(out), **options)
        found = support.logits(support.load(out))
        torch.testing.assert_close(found, support.logits(model), atol=1e-5, rtol=0)
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    return found


def _hold_against_reference(
    model: PreTrainedModel,
    found: torch.Tensor,
    model_type: str,
    column: str,
    blocks: list[int],
    layers: list[int],
) -> None:
    """Logits of the checkpoint against those of the untouched model with the same part silenced."""
    moes = {index: model.get_submodule(path) for index, path in moe_layers(model, model_type).items()}
    affected = layers if column == "Expert Drop" else layers[:1]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if column == "Block Drop":
            for index in blocks:
                stack.enter_context(_passed_over(model, index))
        elif column == "Layer Drop":
            stack.enter_context(zeroed(moes[blocks[0]]))
        else:
            for layer in affected:
                stack.enter_context(unroutable(moes[layer], REMOVED, patch))
        expected = support.logits(model)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    # Random models amplify rounding from block to block; a wrong cut changes logits by more than 1e-2.
    torch.testing.assert_close(found, expected, atol=20 * tolerance, rtol=0)


@contextmanager
def _passed_over(model: PreTrainedModel, index: int) -> Iterator[None]:
    topology = find_topology(model)
    block = model.get_submodule(topology.blocks[index].name)

    def hook(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def expected_reasons(model_type: str) -> dict[str, str]:
    """Column -> reason that the product itself gives for refusing, for families that break a rule."""
    found = exception_for(tiny_models.tiny_config(model_type).get_text_config().model_type)
    reasons = {
        "Block Drop": found.refuse_block_drop,
        "Layer Drop": found.refuse_layer_drop or found.refuse_uneven,
        "Expert Drop": found.refuse_expert_drop,
        "Expert Drop, uneven": found.refuse_expert_drop or found.refuse_uneven,
        "scores from data": found.refuse_expert_drop,
    }
    return {column: reason for column, reason in reasons.items() if reason}


def marks(model_type: str, outcome: dict[str, str]) -> dict[str, str]:
    """Column -> yes/no, after making sure that every no has its known reason."""
    reasons = expected_reasons(model_type)
    result = {}
    for column in COLUMNS:
        if outcome[column] == "yes":
            assert column not in reasons, (
                f"{model_type}: {column} works, the table of exceptions says {reasons[column]}"
            )
            result[column] = "yes"
            continue
        known = column in reasons and reasons[column] in outcome[column]
        assert known, f"{model_type}: {column}: {outcome[column]}"
        result[column] = "no"
    return result


def render(rows: dict[str, dict[str, str]]) -> str:
    """docs/support.md."""
    import transformers

    lines = [
        "# Which models work",
        "",
        f"Every family of transformers {transformers.__version__} that uses the experts interface, and "
        "DeepSeek-MoE (`deepseek`), whose class this package brings, built "
        f"tiny with random weights and really cut, "
        "saved, checked and reloaded: logits of the reloaded model equal those of the model in memory, and "
        "those of the untouched model "
        "with the same part silenced. Made by `python tests/support_table.py`; `tests/test_families.py` "
        "holds every row.",
        "",
        "*Block Drop, Layer Drop, Expert Drop, uneven*: indices named in the recipe. *Scores from data*: "
        "Expert Drop chosen by calibration. *vLLM*: real vLLM 0.32 on a CPU serves the result of every kind of "
        "drop, with log-probabilities equal to those of transformers within 1e-4 (Granite: 2e-4; tests/serving).",
        "",
        "| family | " + " | ".join(COLUMNS) + " | vLLM |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    notes = []
    for model_type, row_marks in sorted(rows.items()):
        served = "yes" if model_type in ARCHITECTURES else "no"
        lines.append(
            f"| `{model_type}` | " + " | ".join(row_marks[column] for column in COLUMNS) + f" | {served} |"
        )
        why = sorted(set(expected_reasons(model_type).values()))
        notes += [f"- `{model_type}`: {reason}." for reason in why]
    lines += ["", "## Why not", "", *notes, "", "## Why not vLLM", ""]
    lines += [
        "What stops an untouched tiny model in vLLM 0.32 on a CPU. On a GPU most of these families can be served; "
        "that is not tested.",
        "",
    ]
    lines += [f"- `{name}`: {reason}." for name, reason in sorted(NOT_SERVED.items())]
    lines += ["", "## Refused", ""]
    lines += [
        "`inspect` and `compress` refuse these Mixture-of-Experts families of transformers, from the config "
        "alone. vLLM has no class for JetMoE, NLLB-MoE and Switch Transformers; of Qwen3-Omni it serves the whole "
        "model only.",
        "",
    ]
    lines += [f"- `{name}`: {reason}." for name, reason in sorted(refused_families().items())]
    lines += ["", "## Not built", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in sorted(tiny_models.unbuildable().items())]
    return "\n".join(lines) + "\n"


def written_rows() -> dict[str, dict[str, str]]:
    """The rows of docs/support.md."""
    rows = {}
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name.strip("`")] = dict(zip(COLUMNS, cells, strict=False))
    return rows


if __name__ == "__main__":
    found, wrong = {}, []
    for name in tiny_models.buildable():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = marks(name, row(name, Path(folder)))
            except AssertionError as error:
                wrong.append(name)
                print(name, "WRONG", error, flush=True)
                continue
            print(name, found[name], flush=True)
    if wrong:
        sys.exit(f"Wrong: {wrong}. docs/support.md stays as it was.")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(found))
