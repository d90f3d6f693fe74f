"""What models larger than memory cost: memory and time of `compress` on checkpoints of real widths, against what the
hardware allows.

    python benchmarks/large.py                 # all rows; writes docs/large-models.json
    python benchmarks/large.py --rows block reap
    python benchmarks/large.py --rows fp8      # 11 GB of files: one MoE block as wide as DeepSeek-V3's

Checkpoints hold random weights: memory and time do not depend on values. Each measurement is a process of its own;
memory is anonymous memory (RssAnon), because mapped files are not the process's. The floors are measured in the same
run: copying the files, and a hand-written script that streams one known architecture, block by block.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
SAMPLES, LENGTH = 16, 256
# llm-compressor sends every token through every expert, in a dtype that CPUs emulate.
FEW_SAMPLES = {"gptq": 2}
WIDE = {"layers": 24, "hidden": 1024, "experts": 64, "top_k": 4, "width": 512}
# Row -> measurement, checkpoint, what it is divided by, largest ratio, most anonymous memory in GB.
ROWS: dict[str, tuple[str, str, str | None, float | None, float]] = {
    "block": ("two named blocks dropped, no data", "wide", "copy", 3.0, 1.2),
    "reap": ("Expert Drop of 25 % by reap", "wide", "floor", 1.5, 1.5),
    "reap8": ("the same on 8 blocks", "wide8", None, None, 1.5),
    "width8": ("Expert Width of 25 %, refitted, on 8 blocks", "wide8", None, None, 2.0),
    "raq": ("RouterAwareQuantModifier (rtn), 6 bits", "wide", None, None, 2.0),
    "gptq": ("GPTQ W4A16 on 8 blocks, 2 samples", "wide8", None, None, 2.0),
    "fp8": ("Expert Drop of 25 % by reap, one FP8 block of DeepSeek-V3's width", "fp8", None, None, 4.0),
}
RECIPES = {
    "block": "BlockDropModifier: {blocks: [3, 7]}",
    "reap": "ExpertDropModifier: {drop_ratio: 0.25, criterion: reap}",
    "reap8": "ExpertDropModifier: {drop_ratio: 0.25, criterion: reap}",
    "width8": "ExpertWidthModifier: {drop_ratio: 0.25}",
    "raq": "RouterAwareQuantModifier: {target_bits: 6.0}",
    "gptq": 'GPTQModifier: {targets: ["re:.*experts.*_proj$"], scheme: W4A16, ignore: [lm_head]}',
    "fp8": "ExpertDropModifier: {drop_ratio: 0.25, criterion: reap}",
}
# Address space beside anonymous memory: libraries, and files that are mapped.
_HARD_LIMIT = 4_000_000_000


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--work", type=Path, help="folder for checkpoints; defaults to a temporary one")
    parser.add_argument("--output", type=Path, default=DOCS / "large-models.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# Checkpoints


class Writer:
    """Writes shards of about 1 GB, so that a checkpoint never has to fit in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._tensors: dict[str, Any] = {}
        self._index: dict[str, str] = {}
        self._size = 0

    def put(self, name: str, tensor: Any) -> None:
        self._tensors[name] = tensor
        self._size += tensor.nbytes
        if self._size > 1_000_000_000:
            self._flush()

    def close(self) -> None:
        self._flush()
        (self._directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": self._index}))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._tensors:
            name = f"model-{len(set(self._index.values())):05d}.safetensors"
            save_file(self._tensors, self._directory / name, metadata={"format": "pt"})
            self._index |= dict.fromkeys(self._tensors, name)
            self._tensors, self._size = {}, 0


def noise(shape: tuple[int, ...], seed: int) -> Any:
    """bfloat16 noise; a roll of one random row after the other, since drawing billions of numbers takes minutes."""
    import torch

    base = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    count = shape[0] * shape[1]
    return base.roll(seed * 7919).repeat(-(-count // len(base)))[:count].view(shape).clone()


def make_wide(directory: Path, layers: int) -> None:
    """A Qwen3-MoE in bfloat16."""
    import torch
    from transformers import Qwen3MoeConfig

    hidden, experts, width = WIDE["hidden"], WIDE["experts"], WIDE["width"]
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        head_dim=128,
        intermediate_size=2 * hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=WIDE["top_k"],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    writer = Writer(directory)
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        writer.put(name, noise((4096, hidden), number))
    for layer in range(layers):
        at = f"model.layers.{layer}."
        rows = {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}
        for number, (name, count) in enumerate(rows.items()):
            writer.put(f"{at}self_attn.{name}_proj.weight", noise((count, hidden), layer + number))
        for name in ("q_norm", "k_norm"):
            writer.put(f"{at}self_attn.{name}.weight", torch.ones(128, dtype=torch.bfloat16))
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.put(f"{at}{name}.weight", ones.clone())
        writer.put(f"{at}mlp.gate.weight", noise((experts, hidden), layer))
        for expert in range(experts):
            for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                shape = (hidden, width) if name == "down_proj" else (width, hidden)
                writer.put(
                    f"{at}mlp.experts.{expert}.{name}.weight", noise(shape, layer * 97 + expert * 3 + number)
                )
    writer.put("model.norm.weight", ones.clone())
    writer.close()
    config.save_pretrained(directory)
    save_tokenizer(directory)


def make_fp8(directory: Path) -> None:
    """One MoE block as wide as DeepSeek-V3's, its experts in blocks of FP8, with one dense block before it."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=4096,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=2048,
        dtype="bfloat16",
        architectures=["DeepseekV3ForCausalLM"],
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    writer = Writer(directory)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
            continue
        if tensor.ndim == 2:
            writer.put(name, noise(tuple(tensor.shape), number))
        else:
            dtype = torch.float32 if "bias" in name else torch.bfloat16
            writer.put(name, torch.ones(tensor.shape, dtype=dtype))
    hidden, width = config.hidden_size, config.moe_intermediate_size
    for expert in range(config.n_routed_experts):
        for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            shape = (hidden, width) if name == "down_proj" else (width, hidden)
            at = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
            writer.put(at, (noise(shape, expert * 3 + number).float() * 4000).to(torch.float8_e4m3fn))
            writer.put(f"{at}_scale_inv", torch.full((shape[0] // 128, shape[1] // 128), 1 / 4000))
    writer.close()
    config.save_pretrained(directory)
    path = directory / "config.json"
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    save_tokenizer(directory)


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(4096)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(directory)


MAKERS: dict[str, Callable[[Path], None]] = {
    "wide": lambda path: make_wide(path, WIDE["layers"]),
    "wide8": lambda path: make_wide(path, 8),
    "fp8": make_fp8,
}


# Measurements, each in a process of its own


class PeakMemory:
    """Largest anonymous memory of this process, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            found = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, found / 1e6)
            time.sleep(0.02)


def tokens(samples: int = SAMPLES) -> Any:
    import torch

    return torch.randint(5, 4000, (samples, LENGTH), generator=torch.Generator().manual_seed(0))


def run_compress(row: str, model: Path, target: Path) -> None:
    from datasets import Dataset

    from llmcompressor_moe.compression import compress

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(f"default_stage: {{default_modifiers: {{{RECIPES[row]}}}}}")
        data, samples = Path(folder) / "data", FEW_SAMPLES.get(row, SAMPLES)
        Dataset.from_dict({"input_ids": tokens(samples).tolist()}).save_to_disk(str(data))
        dataset = None if row == "block" else data
        compress(model, recipe, dataset, target, num_samples=samples, sequence_length=LENGTH)


def run_copy(model: Path, target: Path) -> None:
    shutil.copytree(model, target)
    os.sync()


def run_floor(model: Path, target: Path) -> None:
    """Expert Drop by reap for Qwen3-MoE alone: each block read once, all samples together, written, forgotten."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

    config = AutoConfig.from_pretrained(model)
    config._attn_implementation = "sdpa"
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(model / name, "pt") for name in set(index.values())}
    target.mkdir()

    def read(name: str) -> Any:
        return files[index[name]].get_tensor(name)

    hidden = torch.nn.functional.embedding(tokens(), read("model.embed_tokens.weight").float())
    position = Qwen3MoeRotaryEmbedding(config)(hidden[:1], torch.arange(LENGTH)[None])
    count, chosen = config.num_experts, config.num_experts_per_tok
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        tensors = {name.removeprefix(at): read(name) for name in index if name.startswith(at)}
        with torch.device("meta"):
            block = Qwen3MoeDecoderLayer(config, layer)
        plain = {name: value.float() for name, value in tensors.items() if ".experts." not in name}
        block.load_state_dict(plain, assign=True, strict=False)
        with torch.no_grad():
            attended = [
                block.self_attn(
                    block.input_layernorm(one[None]), position_embeddings=position, attention_mask=None
                )[0]
                for one in hidden
            ]
            hidden = hidden + torch.cat(attended)
            flat = block.post_attention_layernorm(hidden).flatten(0, 1)
            weights, experts = torch.softmax(flat @ plain["mlp.gate.weight"].T, -1).topk(chosen)
            weights = weights / weights.sum(-1, keepdim=True)
            output, scores = torch.zeros_like(flat), torch.zeros(count, dtype=torch.float64)
            for expert in range(count):
                rows, slot = (experts == expert).nonzero(as_tuple=True)
                gate, up, down = (
                    tensors[f"mlp.experts.{expert}.{name}_proj.weight"].float()
                    for name in ("gate", "up", "down")
                )
                inputs = flat[rows]
                result = (torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
                weight = weights[rows, slot, None]
                scores[expert] = (weight[:, 0] * result.norm(dim=-1)).sum() / max(len(rows), 1)
                output.index_add_(0, rows, result * weight)
            hidden = hidden + output.view_as(hidden)
        kept = scores.argsort(descending=True)[: count - count // 4].sort().values.tolist()
        new = {f"{at}{name}": tensors[name] for name in plain}
        new[f"{at}mlp.gate.weight"] = tensors["mlp.gate.weight"][kept].contiguous()
        for to, expert in enumerate(kept):
            for name in ("gate", "up", "down"):
                moved = tensors[f"mlp.experts.{expert}.{name}_proj.weight"]
                new[f"{at}mlp.experts.{to}.{name}_proj.weight"] = moved
        save_file(new, target / f"block-{layer}.safetensors")
    rest = {name: read(name) for name in index if ".layers." not in name}
    save_file(rest, target / "rest.safetensors")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One measurement: seconds of wall and CPU time, start-up included, and GB of anonymous memory."""
    memory = PeakMemory()
    if args.measure == "fp8":
        # Data limits what is allocated, and leaves mapped files alone.
        resource.setrlimit(resource.RLIMIT_DATA, (_HARD_LIMIT, _HARD_LIMIT))
    if args.measure == "copy":
        run_copy(args.model, args.target)
    elif args.measure == "floor":
        run_floor(args.model, args.target)
    else:
        run_compress(args.measure, args.model, args.target)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "memory_gb": memory.peak}


def in_a_process(what: str, model: Path, target: Path) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, __file__, "--measure", what, "--model", str(model), "--target", str(target)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if found.returncode:
        raise RuntimeError(f"{what} failed:\n{found.stderr[-3000:]}")
    shutil.rmtree(target, ignore_errors=True)
    numbers = json.loads(found.stdout.splitlines()[-1])
    return {"seconds": time.perf_counter() - started, **numbers}


def measured(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """The rows, each with its floor measured right before it; a checkpoint is deleted after its last row."""
    floors: dict[str, dict[str, float]] = {}
    for place, row in enumerate(args.rows):
        title, checkpoint, floor, ratio, most = ROWS[row]
        model = work / checkpoint
        if not model.exists():
            MAKERS[checkpoint](model)
        if floor is not None:
            floors[floor] = in_a_process(floor, model, work / "out")
        numbers = in_a_process(row, model, work / "out")
        result = {"row": row, "title": title, **numbers, "memory_target_gb": most}
        if floor is not None:
            result |= {"floor": floor, "floor_seconds": floors[floor]["seconds"], "ratio_target": ratio}
            result["ratio"] = numbers["seconds"] / floors[floor]["seconds"]
        if args.work is None and checkpoint not in {ROWS[later][1] for later in args.rows[place + 1 :]}:
            shutil.rmtree(model)
        print(json.dumps(result), flush=True)
        yield result


def main() -> None:
    args = options()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measured(args, args.work or Path(folder)))
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    known |= {row["row"]: row for row in rows}
    args.output.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
