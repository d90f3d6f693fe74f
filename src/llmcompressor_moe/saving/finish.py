"""The last step of a recipe: from a model with bypassed parts to one that stock transformers could have
built.
"""

from __future__ import annotations

from llmcompressor_moe.checkpoint.opened import opened_from
from llmcompressor_moe.saving.save import save_says_what_it_is
from llmcompressor_moe.surgery.compact import remove_blocks, skip_layers, sync_config
from llmcompressor_moe.surgery.repack import repack_experts
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["finish"]


def finish(session: TrimSession) -> None:
    """Remove bypassed blocks and MoE layers, renumber, rewrite the config, put unquantized experts back into
    fused modules, and make saving tell the truth. Does nothing the second time.
    """
    if session.finished:
        return
    model, topology = session.model, session.topology
    skip_layers(model, topology, session.dropped_layers - session.dropped_blocks)
    remove_blocks(model, topology.stack, session.dropped_blocks)
    sync_config(model)
    if opened_from(model) is None:
        repack_experts(model)
    save_says_what_it_is(model, session.changes)
    session.finished = True
