"""What the modifiers of one recipe know together about the model they cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.surgery.bypass import bypass_block, bypass_moe
from llmcompressor_moe.surgery.config_changes import ConfigChanges
from llmcompressor_moe.surgery.experts import keep_experts
from llmcompressor_moe.topology import MoELayer, Topology, expert_modules, find_topology

__all__ = ["TrimSession"]

_ORIGINAL_INDEX = "_original_expert_index"


@dataclass
class TrimSession:
    """A model while a recipe runs. Indices are those of the model as it came in, whatever has been cut since.

    Blocks and MoE layers are bypassed when they are dropped and removed by `compact`; experts are removed at
    once, and every expert carries its original index, so that cuts by other modifiers in between do not
    confuse ours.
    """

    model: PreTrainedModel
    topology: Topology
    dropped_blocks: set[int] = field(default_factory=set)
    dropped_layers: set[int] = field(default_factory=set)
    finished: bool = False
    changes: ConfigChanges = field(init=False)

    def __post_init__(self) -> None:
        self.changes = ConfigChanges(self.model.config)

    @classmethod
    def begin(cls, model: PreTrainedModel) -> TrimSession:
        """Look at a model whose experts are linearized and mark its experts.

        :raises NotAnMoEError: see `find_topology`
        """
        session = cls(model, find_topology(model))
        for layer in session.topology.moe_layers.values():
            for index, expert in enumerate(expert_modules(model.get_submodule(layer.experts))):
                setattr(expert, _ORIGINAL_INDEX, index)
        return session

    @property
    def blocks(self) -> list[int]:
        """Blocks that are still there."""
        return [block.index for block in self.topology.blocks if block.index not in self.dropped_blocks]

    @property
    def layers(self) -> list[int]:
        """Blocks whose MoE layer is still there."""
        gone = self.dropped_blocks | self.dropped_layers
        return [index for index in self.topology.moe_layers if index not in gone]

    def topology_now(self) -> Topology:
        """The topology with the expert counts of this moment."""
        blocks = tuple(
            replace(block, moe=self.layer(block.index)) if block.moe is not None else block
            for block in self.topology.blocks
        )
        return replace(self.topology, blocks=blocks)

    def running_topology(self) -> Topology:
        """`topology_now` without the MoE layers that do not run any more."""
        now, running = self.topology_now(), set(self.layers)
        blocks = tuple(block if block.index in running else replace(block, moe=None) for block in now.blocks)
        return replace(now, blocks=blocks)

    def layer(self, index: int) -> MoELayer:
        """An MoE layer as it is now (its expert count may have shrunk)."""
        return replace(self.topology.moe_layers[index], num_experts=len(self.experts(index)))

    def experts(self, index: int) -> list[nn.Module]:
        """The experts an MoE layer has now."""
        return expert_modules(self.model.get_submodule(self.topology.moe_layers[index].experts))

    def expert_ids(self, index: int) -> list[int]:
        """Original indices of the experts an MoE layer has now."""
        return [getattr(expert, _ORIGINAL_INDEX) for expert in self.experts(index)]

    def drop_block(self, index: int) -> None:
        """Bypass a block."""
        bypass_block(self.model.get_submodule(self.topology.blocks[index].name))
        self.dropped_blocks.add(index)

    def drop_layer(self, index: int) -> None:
        """Bypass an MoE layer, shared experts included."""
        bypass_moe(self.model.get_submodule(self.topology.moe_layers[index].module))
        self.dropped_layers.add(index)

    def drop_experts(self, index: int, original: list[int]) -> None:
        """Remove experts by their original indices; those that are gone already are passed over."""
        gone = set(original)
        kept = [position for position, expert in enumerate(self.expert_ids(index)) if expert not in gone]
        keep_experts(self.model, self.layer(index), kept)
