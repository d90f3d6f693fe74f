"""One of several ranks that trim a model together: run by test_ranks.py through torch.distributed.run.

python -m torch.distributed.run --nproc_per_node 2 tests/one_rank.py BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import support
import torch
from torch import distributed as dist

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier


def main(base: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ids = support.token_ids()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        # Each rank brings its own part of the data, as upstream asks for.
        ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
    recipe = [
        LayerDropModifier(num_drop=1, report_path=f"{out}-layer.json"),
        BlockDropModifier(num_drop=1, metric="kl", report_path=f"{out}-block.json"),
        ExpertDropModifier(num_drop=2, criterion="reap", report_path=f"{out}-expert.json"),
    ]
    model = support.trim(support.load(base), recipe, ids=ids, output_dir=str(out))
    print("logits", float(support.logits(model).double().sum()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
