"""Task scores against lm-eval run by its own command, and against choices scored by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import tiny_models
import torch
import yaml
from serving.engine import ENVIRONMENT, PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.evaluation import task_selection
from llmcompressor_moe.evaluation.served_tasks import run_served_tasks
from llmcompressor_moe.evaluation.tasks import TaskScore, run_tasks, scores_of

TASKS = Path(__file__).parent / "data" / "tasks"
KNOWLEDGE = TASKS / "knowledge.yaml"
ITEMS = [json.loads(line) for line in (TASKS / "knowledge.jsonl").read_text().splitlines()]
FEW = {"task": "few", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "train"}
FEW |= {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "doc_to_choice": "{{c}}"}


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def few(folder: Path, name: str = "few", **fields) -> Path:
    """A task of one item, in words of `support.tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text(json.dumps({"q": "t5 t6", "c": ["t7", "t8", "t9"], "a": 1}) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(FEW | {"task": name, "dataset_kwargs": {"data_files": "items.jsonl"}} | fields)
    )
    return path


def by_metric(scores: list[TaskScore]) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in scores}


@torch.no_grad()
def accuracy_by_hand(model: PreTrainedModel, tokenizer, items: list[dict]) -> float:
    """The share of items whose right choice has the highest log-likelihood behind its question."""
    right = 0
    for item in items:
        sums = []
        for choice in item["choices"]:
            context = tokenizer(item["question"])["input_ids"]
            ids = tokenizer(f"{item['question']} {choice}")["input_ids"]
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(logs[at - 1, ids[at]].item() for at in range(len(context), len(ids))))
        right += max(range(len(sums)), key=sums.__getitem__) == item["answer"]
    return right / len(items)


def test_equals_the_command_of_lm_eval(demo: PreTrainedModel, demo_tokenizer, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    command += ["--model_args", json.dumps({"pretrained": str(DEMO_MODEL), "dtype": "float32"})]
    command += [
        "--tasks",
        "knowledge.yaml",
        "prose.yaml",
        "--num_fewshot",
        "2",
        "--output_path",
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=TASKS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (written,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    ours = run_tasks(demo, demo_tokenizer, [KNOWLEDGE, TASKS / "prose.yaml"], num_fewshot=2, batch_size=4)
    assert [(score.task, score.metric) for score in ours] == [
        ("llmcompressor_moe_knowledge", "acc"),
        ("llmcompressor_moe_knowledge", "acc_norm"),
        ("llmcompressor_moe_prose", "word_perplexity"),
        ("llmcompressor_moe_prose", "byte_perplexity"),
        ("llmcompressor_moe_prose", "bits_per_byte"),
    ]
    for score in ours:
        assert score.value == pytest.approx(theirs[score.task][f"{score.metric},none"], rel=1e-6)
        error = theirs[score.task].get(f"{score.metric}_stderr,none")
        assert score.stderr == (pytest.approx(error) if isinstance(error, float) else None)


def test_says_what_was_measured_on_what(demo: PreTrainedModel, demo_tokenizer) -> None:
    scores = run_tasks(demo, demo_tokenizer, [KNOWLEDGE])
    assert scores[0].value == accuracy_by_hand(demo, demo_tokenizer, ITEMS)
    assert 0.5 < scores[0].value < 1, "the items are meant to tell models apart"
    facts = scores[0].model_dump(exclude={"value", "stderr"})
    assert facts == {
        "task": "llmcompressor_moe_knowledge",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "samples": 20,
        "num_fewshot": 0,
        "version": "1.0",
    }
    assert TaskScore.model_validate_json(scores[0].model_dump_json()) == scores[0]


@pytest.mark.parametrize(("limit", "samples"), [(7, 7), (0.25, 5), (100, 20)])
def test_limits_the_items(demo: PreTrainedModel, demo_tokenizer, limit: float, samples: int) -> None:
    score = run_tasks(demo, demo_tokenizer, [KNOWLEDGE], limit=limit)[0]
    assert score.samples == samples
    assert score.value == accuracy_by_hand(demo, demo_tokenizer, ITEMS[:samples])


def test_trimmed_checkpoints_whose_layers_differ(demo_tokenizer, tmp_path: Path) -> None:
    recipe = [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={0: [1, 2], 5: [0]})]
    support.trim(support.load(DEMO_MODEL), recipe, no_data=True, output_dir=str(tmp_path / "trimmed"))
    assert "per_layer_config" in (tmp_path / "trimmed" / "config.json").read_text()
    model = support.load(tmp_path / "trimmed")
    score = run_tasks(model, demo_tokenizer, [KNOWLEDGE], batch_size=8)[0]
    assert score.value == accuracy_by_hand(model, demo_tokenizer, ITEMS)


def test_a_folder_names_all_its_tasks_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    for name in ("second", "first"):
        few(tmp_path / "own", name)
    (tmp_path / "own" / "shared.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "own" / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    monkeypatch.chdir(tmp_path)
    scores = run_tasks(model, support.tokenizer(), ["own/"])
    assert {score.task for score in scores} == {"first", "second"}
    assert [score.samples for score in scores] == [1] * len(scores)


def test_a_name_in_an_included_folder(tmp_path: Path) -> None:
    few(tmp_path, "other")
    few(tmp_path, "moe_named", dataset_kwargs={"data_files": str(tmp_path / "items.jsonl")})
    model = tiny_models.build("mixtral", num_layers=1)
    assert {score.task for score in run_tasks(model, support.tokenizer(), ["moe_named"], tmp_path)} == {
        "moe_named"
    }


def test_a_pattern_names_many_and_a_group_has_a_score_of_its_own(tmp_path: Path) -> None:
    data = {"data_files": str(tmp_path / "items.jsonl")}
    for name in ("moe_first", "moe_second", "moe_third_a", "moe_third_b"):
        few(tmp_path, name, dataset_kwargs=data)
    group = {"group": "moe_both", "task": ["moe_first", "moe_second"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    model = tiny_models.build("mixtral", num_layers=1)
    found = by_metric(run_tasks(model, support.tokenizer(), ["moe_both", "moe_third_*"], tmp_path))
    assert {task for task, _ in found} == {
        "moe_both",
        "moe_first",
        "moe_second",
        "moe_third_a",
        "moe_third_b",
    }
    mean = (found["moe_first", "acc"] + found["moe_second", "acc"]) / 2
    assert found["moe_both", "acc"] == pytest.approx(mean)


def test_leaves_tokenizer_and_mode_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("mixtral", num_layers=1), support.tokenizer()
    tokenizer.pad_token = None
    model.train()
    run_tasks(model, tokenizer, [few(tmp_path)])
    assert tokenizer.pad_token is None and model.training


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, r"tasks is \[\]; give a list"),
        ("knowledge", {}, "tasks is 'knowledge'; give a list"),
        (["missing.yaml"], {}, "task file 'missing.yaml' is not there"),
        (
            ["llmcompressor_moe_knowlege", "zzzzqqqqxxxx"],
            {"include_path": TASKS},
            "names are llmcompressor_moe_knowledge.*'zzzzqqqqxxxx' is unknown; `lm-eval ls tasks` lists all",
        ),
        (["arc_easy"], {}, "'arc_easy' needs the dataset allenai/ai2_arc, which is not on this machine"),
        ([KNOWLEDGE], {"include_path": "nowhere"}, "include_path is 'nowhere', which is not a folder"),
        ([KNOWLEDGE], {"limit": 0}, "limit is 0; give a whole number"),
        ([KNOWLEDGE], {"limit": 1.5}, "limit is 1.5"),
        ([KNOWLEDGE], {"num_fewshot": -1}, "num_fewshot is -1"),
        ([KNOWLEDGE], {"batch_size": 0}, "batch_size is 0"),
        ([TASKS.parent], {}, "holds no .yaml file with `task: NAME`"),
    ],
)
def test_names_what_it_cannot_use(tasks, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_tasks(tiny_models.build("mixtral", num_layers=1), support.tokenizer(), tasks, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [unclosed", r"bad.yaml' cannot be read: while parsing a flow sequence .* line 1"),
        ("just words", r"bad.yaml' cannot be read: Expected YAML dict"),
        ("include: missing.yaml\ntask: x", r"bad.yaml' cannot be read: .*No such file.*missing.yaml"),
        ("group: many\ntask: [a, b]", r"bad.yaml' is not a task \(its fields are group, task\)"),
        ("output_type: multiple_choice", r"bad.yaml' is not a task \(its fields are output_type\)"),
        ("task: x\noutput_type: multiple_chice\ndataset_path: json", r"bad.yaml' cannot be set up"),
        ("task: x\nno_such_field: 1", r"bad.yaml' cannot be set up \(TypeError: .*no_such_field"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}", r"bad.yaml' .*gone.jsonl"),
    ],
)
def test_names_the_file_that_is_no_task(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_tasks(tiny_models.build("mixtral", num_layers=1), support.tokenizer(), [tmp_path / "bad.yaml"])


def test_asks_for_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer is None"):
        run_tasks(tiny_models.build("mixtral", num_layers=1), None, [KNOWLEDGE])


def test_says_how_to_install_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install 'llmcompressor-moe\[eval\]'"):
        run_tasks(tiny_models.build("mixtral", num_layers=1), support.tokenizer(), [KNOWLEDGE])
    assert task_selection.INSTALL


def test_reads_results_that_have_no_standard_error() -> None:
    results = {
        "results": {"x": {"alias": "x", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}},
        "versions": {"x": 2},
        "higher_is_better": {"x": {"exact_match": True}},
        "n-samples": {"x": {"original": 9, "effective": 4}},
        "n-shot": {"x": 5},
    }
    assert scores_of(results) == [
        TaskScore(
            task="x",
            metric="exact_match",
            filter="strict",
            value=0.5,
            higher_is_better=True,
            samples=4,
            num_fewshot=5,
            version="2",
        )
    ]


def interpreter(folder: Path, answer: str, *, end: str = "exit 1") -> Path:
    """Something that answers like an interpreter asked for its packages, and then ends like lm-eval."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{answer}'; exit 0; fi\n{end}\n")
    path.chmod(0o755)
    return path


def test_vllm_asks_for_lm_eval_beside_it(tmp_path: Path) -> None:
    python = interpreter(tmp_path, '{"vllm": ["vllm", "0.32.0"]}')
    with pytest.raises(ValueError, match=rf"lm-eval is not installed for {python}; {python} -m pip install"):
        run_served_tasks(DEMO_MODEL, [KNOWLEDGE], python)


def test_vllm_shows_the_end_of_a_failed_log(tmp_path: Path) -> None:
    both = '{"vllm": ["vllm", "0.32.0"], "lm_eval": ["lm_eval", "0.4.13"]}'
    python = interpreter(tmp_path, both, end="echo no memory >&2; exit 3")
    with pytest.raises(ValueError, match=r"lm-eval ended with code 3; the end of its log:\nno memory"):
        run_served_tasks(DEMO_MODEL, [KNOWLEDGE], python)
    python = interpreter(tmp_path, both, end="exec sleep 60")
    with pytest.raises(ValueError, match="took more than 1 s"):
        run_served_tasks(DEMO_MODEL, [KNOWLEDGE], python, timeout=1)


def test_vllm_names_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        run_served_tasks(tmp_path, [KNOWLEDGE], sys.executable)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tokenizer"):
        run_served_tasks(tmp_path, [KNOWLEDGE], sys.executable)
    with pytest.raises(ValueError, match="'/no/python' cannot be run"):
        run_served_tasks(DEMO_MODEL, [KNOWLEDGE], "/no/python")
    with pytest.raises(ValueError, match="vLLM is not installed"):
        run_served_tasks(DEMO_MODEL, [KNOWLEDGE], sys.executable)
    with pytest.raises(ValueError, match=r"task file 'gone\.yaml' is not there"):
        run_served_tasks(DEMO_MODEL, ["gone.yaml"], sys.executable)


@pytest.mark.serving
@pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason="vLLM's environment is not there")
def test_vllm_scores_a_trimmed_checkpoint_as_transformers_does(demo_tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "trimmed"
    recipe = [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={0: [1, 2], 5: [0]})]
    support.trim(support.load(DEMO_MODEL), recipe, no_data=True, output_dir=str(out))
    demo_tokenizer.save_pretrained(out)
    served = run_served_tasks(
        out,
        [TASKS],
        PYTHON,
        model_args={"dtype": "float32", "max_model_len": 512, "enforce_eager": True},
        environment=ENVIRONMENT,
    )
    here = run_tasks(support.load(out), demo_tokenizer, [TASKS])
    assert by_metric(served) == pytest.approx(by_metric(here), rel=1e-4)
