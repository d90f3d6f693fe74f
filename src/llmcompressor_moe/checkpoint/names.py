"""Save experts under the names that their family's checkpoints use.

llm-compressor names the Linears of an expert gate_proj, up_proj and down_proj. Some families' checkpoints say
w1, w3 and w2 (Mixtral); both transformers and vLLM look for those, and leave what they do not find at random.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from llmcompressor_moe.topology import text_config

__all__ = ["ExpertNames", "expert_names", "rename_tensors"]

_PER_EXPERT = re.compile(r"experts\.\*\.(?P<name>[\w.]+)\.weight$")
_EXPERT_PATH = re.compile(
    r"(?P<moe>\.[\w]+)(?P<experts>\.experts\.\d+\.)(?P<name>gate_proj|up_proj|down_proj)(?P<rest>\.|$)"
)


@dataclass(frozen=True)
class ExpertNames:
    """How a family's checkpoints name an expert's Linears, and the MoE layer they stand in.

    :param projections: gate_proj, up_proj, down_proj -> the family's names
    :param modules: name of the MoE layer in transformers -> in the family's checkpoints, where they differ
    """

    projections: dict[str, str]
    modules: dict[str, str]

    def apply(self, name: str) -> str:
        """A tensor or module name with the family's own names in it."""

        def own(match: re.Match[str]) -> str:
            moe = self.modules.get(match["moe"], match["moe"])
            return f"{moe}{match['experts']}{self.projections[match['name']]}{match['rest']}"

        return _EXPERT_PATH.sub(own, name)

    def spellings(self, name: str) -> list[str]:
        """Every name under which readers may look up a module: MoE layer and projections, each in either
        naming.
        """
        layer_only = self.apply_layer(name)
        return list(dict.fromkeys([name, layer_only, self.apply(name)]))

    def apply_layer(self, name: str) -> str:
        """A module name with the family's own name of the MoE layer, its projections left as they are."""
        for ours, own in self.modules.items():
            name = re.sub(rf"{re.escape(ours)}(?=\.|$)", own, name)
        return name


def expert_names(config: PreTrainedConfig) -> ExpertNames | None:
    """The names of a family; None where they are gate_proj, up_proj and down_proj, or where experts are
    stored fused.

    :param config: of the whole model; some families give the names for that alone
    """
    kinds = dict.fromkeys((text_config(config).model_type, config.model_type))
    return next(filter(None, map(_names_of, kinds)), None)


def _names_of(model_type: str) -> ExpertNames | None:
    projections: dict[str, str] = {}
    modules: dict[str, str] = {}
    for transform in get_checkpoint_conversion_mapping(model_type) or []:
        sources, targets = transform.source_patterns, transform.target_patterns
        if isinstance(transform, WeightConverter):
            names = [match["name"] for match in map(_PER_EXPERT.search, sources) if match]
            if len(names) == 2 and targets[0].endswith("experts.gate_up_proj"):
                projections["gate_proj"], projections["up_proj"] = names
            elif len(names) == 1 and targets[0].endswith(("experts.down_proj", "experts.up_proj")):
                projections[targets[0].rpartition(".")[2]] = names[0]
        elif isinstance(transform, WeightRenaming) and len(sources) == 1:
            old, new = (re.fullmatch(r"\\?(\.\w+)\\?\.", pattern) for pattern in (sources[0], targets[0]))
            if old and new:
                modules[new[1]] = old[1]
    if not projections or all(name == own for name, own in projections.items()):
        return None
    return ExpertNames(projections, modules)


def rename_tensors(directory: Path, rename: Callable[[str], str]) -> int:
    """Rename tensors in every safetensors file of a directory and in its index; the data is copied, never
    parsed.

    :return: number of tensors renamed
    """
    count = 0
    for path in sorted(directory.glob("*.safetensors")):
        count += _rename_in_file(path, rename)
    index_path = directory / "model.safetensors.index.json"
    if count and index_path.exists():
        index = json.loads(index_path.read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return count


def _rename_in_file(path: Path, rename: Callable[[str], str]) -> int:
    with path.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(size))
        renamed = {name if name == "__metadata__" else rename(name): entry for name, entry in header.items()}
        changed = sum(name not in header for name in renamed)
        if not changed:
            return 0
        if len(renamed) != len(header):
            raise ValueError(f"{path.name}: two tensors would get the same name.")
        raw = json.dumps(renamed, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        temporary = path.with_suffix(".renaming")
        with temporary.open("wb") as target:
            target.write(len(raw).to_bytes(8, "little"))
            target.write(raw)
            shutil.copyfileobj(source, target, 16 * 1024 * 1024)
    temporary.replace(path)
    return changed
