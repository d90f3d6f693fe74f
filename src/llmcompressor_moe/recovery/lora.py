"""Low-rank adapters on attention, experts and routers, by peft."""

from __future__ import annotations

from typing import Literal

from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.compat.peft import adapt_exactly
from llmcompressor_moe.parts import block_of
from llmcompressor_moe.recovery.adapters import forget_topology, remember_topology, student_topology
from llmcompressor_moe.recovery.fake_quantization import has_quantized_modules
from llmcompressor_moe.recovery.parameters import set_of

__all__ = ["LoraSettings", "add_lora", "merge_lora"]

_TARGETS = ("attention", "experts", "router")

# Of weights outside of Linears: a router's is a matrix, fused experts' are stacks of matrices; less is a bias.
_DIMENSIONS = {"router": 2, "experts": 3}


class LoraSettings(BaseModel):
    """What is adapted, and by how much.

    The update of a weight is ``alpha / rank * B @ A`` (Hu et al., "LoRA", 2021, section 4.1).

    :param rank: columns of B and rows of A
    :param alpha: see above
    :param dropout: share of an adapter's inputs that is left out while it trains; attention only
    :param targets: parts of the model; experts are routed and shared ones
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "experts", "router"], ...] = ("attention",)

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError(f"name at least one of {', '.join(_TARGETS)}.")
        return tuple(dict.fromkeys(targets))

    @model_validator(mode="after")
    def _only_linears_drop_out(self) -> LoraSettings:
        others = [target for target in self.targets if target != "attention"]
        if self.dropout and others:
            raise ValueError(
                f"dropout={self.dropout} with targets={', '.join(others)}: fused experts and routers hold their "
                "weights in parameters of their own, whose inputs peft cannot drop; use dropout=0."
            )
        return self


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Put adapters around a student's weights, in place; only they train then.

    At first they change nothing. Modules keep their paths, which lead to the wrappers; see
    `adapters.student_topology` for where blocks and MoE layers stand.

    :param model: with fused or linearized experts
    :raises ValueError: it is quantized, or has none of the parts
    """
    if has_quantized_modules(model):
        raise ValueError(
            f"lora targets={', '.join(settings.targets)}: the student is quantized, and adapters cannot be merged "
            "into rounded weights without rounding them away; train its weights themselves (`train`), or put "
            "adapters on the checkpoint that it was quantized from and quantize after that."
        )
    modules, parameters = _targets(model, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # peft guesses modules where it is given none at all.
        target_modules=modules,
        target_parameters=parameters or None,
        bias="none",
    )
    remember_topology(model)
    return adapt_exactly(model, config)


def merge_lora(peft_model: PeftModel) -> PreTrainedModel:
    """The student with its adapters added to its weights; it is as if there never had been any.

    :raises ValueError: an adapter holds NaN or infinite values
    """
    model = peft_model.merge_and_unload(safe_merge=True)
    forget_topology(model)
    return model


def _targets(model: PreTrainedModel, settings: LoraSettings) -> tuple[list[str], list[str]]:
    """Paths of the Linears to be adapted, and of matrices that modules of other kinds hold."""
    topology = student_topology(model)
    modules: list[str] = []
    parameters: list[str] = []
    for target in settings.targets:
        found = len(modules) + len(parameters)
        for path, parameter in model.named_parameters():
            if set_of(path, block_of(path, topology)) != target:
                continue
            owner, _, name = path.rpartition(".")
            if _is_plain_linear(model, owner):
                modules += [owner] if name == "weight" and not _is_read_uncalled(model, owner) else []
            elif parameter.ndim == _DIMENSIONS.get(target) and min(parameter.shape) > 1:
                parameters.append(path)
        if len(modules) + len(parameters) == found:
            raise ValueError(
                f"lora targets={target!r}: {type(model).__name__} has no such weights; name other targets."
            )
    return modules, parameters


def _is_plain_linear(model: nn.Module, path: str) -> bool:
    """Some routers are Linears that return more than a product."""
    return type(model.get_submodule(path)).forward is nn.Linear.forward


def _is_read_uncalled(model: nn.Module, path: str) -> bool:
    """Whether a Linear's weight goes into a kernel of a state-space layer, past any adapter.

    Such a layer has a skip connection ``D`` of its own.
    """
    return hasattr(model.get_submodule(path.rpartition(".")[0]), "D")
