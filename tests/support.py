"""What many tests need: a tokenizer, calibration data, a tiny model on disk, and a quiet oneshot."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmcompressor_moe import load_trimmed_moe
from llmcompressor_moe.compat.transformers.building import class_named
from llmcompressor_moe.evaluation.history import ModelLayout
from llmcompressor_moe.report import DropReport

VOCAB = tiny_models.VOCAB
# Models that were saved once, for all tests of this process.
_MADE = tempfile.TemporaryDirectory(prefix="tiny-models-")
# Families whose models call their blocks in unlike ways.
UNLIKE_FAMILIES = [
    "qwen3_moe",
    "llama4_text",
    "gpt_oss",
    "deepseek_v4",
    "zaya",
    "granitemoehybrid",
    "qwen3_next",
    "gemma4_text",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token id: ``t0`` to ``t127``."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    )


def token_ids(samples: int = 8, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, [samples, length]."""
    return torch.randint(3, VOCAB - 8, (samples, length), generator=torch.Generator().manual_seed(seed))


def padded_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of one sequence each, 12 tokens; the last three tokens of the second are padding."""
    found = []
    for index, row in enumerate(token_ids(3, 12, 1)):
        mask = torch.ones_like(row)[None]
        if index == 1:
            mask[:, 9:] = 0
        found.append({"input_ids": row[None] * mask, "attention_mask": mask})
    return found


def dataset(ids: torch.Tensor | None = None) -> Dataset:
    """Calibration data as oneshot takes it."""
    ids = token_ids() if ids is None else ids
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})


def drop_report(kind: str, layout: ModelLayout, dropped: Any) -> DropReport:
    """What a ``Block``, ``Layer`` or ``Expert`` drop of a model would have left in its history."""
    return DropReport(
        modifier=f"{kind}DropModifier",
        num_blocks=layout.num_blocks,
        num_experts=layout.num_experts,
        scores={},
        dropped=dropped,
        kept=[],
    )


def saved(model_type: str, directory: Path, **options: Any) -> Path:
    """A tiny random model of a family, saved with a tokenizer as a user would have it."""
    path = directory / model_type
    if not path.exists():
        made = (
            Path(_MADE.name)
            / hashlib.sha256(repr((model_type, sorted(options.items()))).encode()).hexdigest()
        )
        if not made.exists():
            tiny_models.build(model_type, **options).save_pretrained(made)
            tokenizer().save_pretrained(made)
        # A copy: tests change files.
        shutil.copytree(made, path)
    return path


def forked(function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> list[multiprocessing.Process]:
    """Started processes that call a function; with several ranks as `torch.distributed.run` would start them.

    They are forked from this one, which has imported everything: imports take ten seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        process = context.Process(
            target=_in_child, args=(place | address if ranks > 1 else {}, function, arguments)
        )
        process.start()
        started.append(process)
    return started


def _in_child(environment: dict[str, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    function(*arguments)


def run_forked(function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> list[int]:
    """Exit codes of such processes, by rank; one that was killed has the negative number of the signal."""
    started = forked(function, *arguments, ranks=ranks)
    for process in started:
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def files_that_tell(*places: Path) -> list[str]:
    """Text files, given or below a directory given, that hold an absolute path of this machine."""
    secrets = [str(place) for place in (tempfile.gettempdir(), Path.home(), Path(__file__).parents[1])]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    texts = [file for file in files if file.suffix in {".json", ".jsonl", ".md", ".html", ".yaml", ".txt"}]
    assert texts
    return [str(file) for file in texts if any(f"{secret}/" in file.read_text() for secret in secrets)]


def load(path: Path) -> PreTrainedModel:
    """Load a checkpoint, trimmed or not, in fp32."""
    with load_trimmed_moe():
        cls = class_named(AutoConfig.from_pretrained(path).architectures[0])
        return cls.from_pretrained(path, dtype=torch.float32).eval()


def trim(model: PreTrainedModel, recipe: Any, **options: Any) -> PreTrainedModel:
    """Run oneshot on 8 short sequences."""
    ids = options.pop("ids", None)
    if options.pop("no_data", False):
        return oneshot(model=model, recipe=recipe, tokenizer=tokenizer(), **options)
    data = dataset(ids)
    settings = {"num_calibration_samples": len(data), "max_seq_length": 64, **options}
    return oneshot(model=model, recipe=recipe, dataset=data, tokenizer=tokenizer(), **settings)


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits on token ids, [samples, length, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=token_ids(2) if ids is None else ids, use_cache=False).logits
