"""Ways to break a good checkpoint on disk, with nothing but JSON and safetensors."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmcompressor_moe.check import CheckReport, check_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a JSON object, let `change` work on it in place, write it back."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def set_config(path: Path, **values: Any) -> None:
    """Set top-level fields of config.json."""
    edit_json(path / "config.json", lambda config: config.update(values))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Load the only weight file, let `change` work on its tensors in place, write it back."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / WEIGHTS, {"format": "pt"})


def drop(path: Path, *parts: str) -> None:
    """Delete all tensors whose name holds one of `parts`; there must be some."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        gone = [name for name in tensors if any(part in name for part in parts)]
        assert gone, f"no tensor holds {parts}"
        for name in gone:
            del tensors[name]

    edit_tensors(path, change)


def rename(path: Path, change: Callable[[str], str]) -> None:
    """Rename tensors."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(path, apply)


def shard(path: Path, files: int = 3) -> list[str]:
    """Split the only weight file into shards with an index; returns the shard names."""
    tensors = load_file(path / WEIGHTS)
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {name: names[i % files] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file, {"format": "pt"})
    (path / WEIGHTS).unlink()
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file without touching its data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def codes(report: CheckReport, severity: str = "error") -> set[str]:
    """Codes of all findings of a severity."""
    return {finding.code for finding in report.findings if finding.severity.value == severity}


def errors(path: Path, **options: int) -> set[str]:
    """Codes of all errors that a check of `path` finds."""
    return codes(check_checkpoint(path, **options))


def finding(path: Path, code: str, **options: int):
    """The first finding with a code; the test fails if there is none."""
    report = check_checkpoint(path, **options)
    found = [f for f in report.findings if f.code == code]
    assert found, f"no {code} in {[str(f) for f in report.findings]}"
    return found[0]
