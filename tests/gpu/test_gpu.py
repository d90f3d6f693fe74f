"""What needs CUDA: `make gpu`. Nothing here runs without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
    open_moe,
)
from llmcompressor_moe.profile.forward import run_batches
from llmcompressor_moe.profile.lockstep import run_lockstep
from llmcompressor_moe.profile.options import run_options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[2]
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoehybrid")


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row[None]} for row in support.token_ids(6)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    found: dict[int, torch.Tensor] = {}
    run_batches(
        model, rows(), None, None, on_logits=lambda index, values: found.update({index: values.cpu()})
    )
    return torch.cat([found[index] for index in sorted(found)])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_opened_models_run_on_the_device(model_type: str, tmp_path: Path) -> None:
    path = support.saved(model_type, tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = False
    opened = open_moe(path)
    assert next(opened.parameters()).device.type == "cuda"
    torch.testing.assert_close(logits(opened), logits(support.load(path)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_device_makes_the_plan_of_the_cpu(model_type: str, tmp_path: Path) -> None:
    path = support.saved(model_type, tmp_path)
    plans = []
    for name, model in (("opened", open_moe(path)), ("loaded", support.load(path))):
        report = tmp_path / f"{name}.json"
        recipe = ExpertDropModifier(num_drop=2, criterion="reap", report_path=str(report))
        if model_type == "llama4_text":
            recipe = ExpertDropModifier(num_drop=2, criterion="frequency", report_path=str(report))
        support.trim(model, recipe)
        plans.append(json.loads(report.read_text())["dropped"])
    assert plans[0] == plans[1]


def test_hidden_states_wait_in_the_memory_of_the_host(tmp_path: Path) -> None:
    model = open_moe(support.saved("mixtral", tmp_path))
    expected = logits(model)
    with run_options(max_memory=1, wave_tokens=24, scratch=tmp_path):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_memory_on_the_device_does_not_grow_with_blocks(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        directory = tmp_path / str(layers)
        directory.mkdir()
        path = support.saved(
            "qwen3_moe", directory, num_layers=layers, hidden_size=512, moe_intermediate_size=512
        )
        model = open_moe(path)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            run_lockstep(model, [{name: value.cuda() for name, value in row.items()} for row in rows()])
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]


def test_recipes_run_on_the_device(tmp_path: Path) -> None:
    path, out = support.saved("qwen3_moe", tmp_path), tmp_path / "out"
    recipe = [
        LayerDropModifier(num_drop=1),
        BlockDropModifier(num_drop=1),
        ExpertDropModifier(num_drop=2),
        RouterAwareQuantModifier(
            schemes=["W4A16", "W8A16"], group_size=32, target_bits=6.5, algorithm="gptq"
        ),
    ]
    model = support.trim(open_moe(path), recipe, output_dir=str(out))
    torch.testing.assert_close(logits(open_moe(out)), logits(model), atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_tasks_dispatch_over_two_devices(tmp_path: Path) -> None:
    from llmcompressor_moe.loading import load_callable

    model = load_callable(support.saved("mixtral", tmp_path, num_layers=8))
    assert len({parameter.device for parameter in model.parameters()}) > 1


@pytest.mark.skipif(not (ROOT / ".venv-vllm/bin/python").exists(), reason="no environment with vLLM")
def test_quantized_experts_run_in_the_kernels_of_vllm(tmp_path: Path) -> None:
    path, out = (
        support.saved("qwen3_moe", tmp_path, hidden_size=256, moe_intermediate_size=256),
        tmp_path / "out",
    )
    recipe = [ExpertDropModifier(num_drop=2), RouterAwareQuantModifier(schemes=["W4A16"], target_bits=5)]
    support.trim(open_moe(path, dtype="bfloat16"), recipe, output_dir=str(out))
    script = (
        "import sys; from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.3)\n"
        "out = llm.generate({'prompt_token_ids': [5, 6, 7, 8]}, SamplingParams(max_tokens=4, temperature=0))\n"
        "print(len(out[0].outputs[0].token_ids))\n"
    )
    done = subprocess.run(
        [str(ROOT / ".venv-vllm/bin/python"), "-c", script, str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    if "No module named" in done.stderr or ("CPU" in done.stderr and done.returncode):
        pytest.skip("vLLM in .venv-vllm is the build for CPUs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "4"


def test_calibration_costs_on_the_device(tmp_path: Path) -> None:
    """Writes ratios beside the test's files; see benchmarks/calibration.py."""
    output = tmp_path / "benchmarks.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/calibration.py"),
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(
        [*command, "--rounds", "2", "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(output.read_text())
