"""Builds a model by a plan and verifies that every override was applied."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import nn

from llmcompressor_moe_vllm.config_view import allow_global_reads, global_reads_allowed
from llmcompressor_moe_vllm.layers import BuiltLayer, build_layer, leave_out
from llmcompressor_moe_vllm.loading import ExpertRank, load_by_layer
from llmcompressor_moe_vllm.overrides import (
    LayerOverride,
    Plan,
    UnsupportedOverrideError,
    global_count,
    read_plan,
)
from llmcompressor_moe_vllm.transformers_backend import layers_by_plan

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


@dataclass
class Build:
    """A model under construction: what its layers should be, and what they became."""

    plan: Plan
    num_layers: int
    done: dict[int, list[BuiltLayer]] = field(default_factory=dict)
    dropped: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Layers, and the part of each that is to be left out once the model stands."""

    def record(self, index: int, built: BuiltLayer) -> None:
        """Note what became of a layer, or of a part of it."""
        self.done.setdefault(index, []).append(built)


_current: ContextVar[Build | None] = ContextVar("llmcompressor_moe_build", default=None)


def wrap_make_layers(make_layers: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `make_layers`, building each layer of the model under construction by its override."""

    @wraps(make_layers)
    def make_planned_layers(num_hidden_layers: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        build = _current.get()
        if build is None or num_hidden_layers != build.num_layers:
            return make_layers(num_hidden_layers, layer_fn, prefix)
        return make_layers(num_hidden_layers, _planned(layer_fn, build), prefix)

    return make_planned_layers


def _planned(layer_fn: Callable[..., nn.Module], build: Build) -> Callable[..., nn.Module]:
    from vllm.config import get_current_vllm_config

    def planned_layer(prefix: str) -> nn.Module:
        # make_layers counts from the first layer of the model on every pipeline rank.
        index = int(prefix.rpartition(".")[2])
        override = build.plan.get(index, LayerOverride())
        # Unchanged layers take this way too: the global value stands for them, and reading it must not raise.
        layer, built = build_layer(
            lambda: layer_fn(prefix=prefix), override, get_current_vllm_config().compilation_config
        )
        build.record(index, built)
        if built.dropped:
            build.dropped.append((layer, built.dropped))
        return layer

    return planned_layer


def wrap_initialize_model(initialize_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """vLLM's `initialize_model`, following and verifying the plan that the model's config holds."""

    @wraps(initialize_model)
    def initialize_planned_model(
        vllm_config: "VllmConfig", *, model_config: "ModelConfig | None" = None, **kwargs: Any
    ) -> nn.Module:
        source = model_config or vllm_config.model_config
        text_config = source.hf_text_config
        plan = read_plan(text_config)
        outer = _current.get()
        if not plan or (outer is not None and outer.plan == plan):
            # A multimodal model initializes its text model by a call inside its own.
            return initialize_model(vllm_config, model_config=model_config, **kwargs)
        rank = _expert_rank(vllm_config)
        refuse_settings(vllm_config, plan, rank.ranks)
        build = Build(plan, text_config.num_hidden_layers)
        token = _current.set(build)
        try:
            with (
                global_reads_allowed(source.hf_config, text_config),
                layers_by_plan(plan, build.record),
            ):
                model = initialize_model(vllm_config, model_config=model_config, **kwargs)
        finally:
            _current.reset(token)
        for layer, name in build.dropped:
            leave_out(layer, name)
        verify(build, type(model).__name__, _owned_layers(build.num_layers))
        count = global_count(text_config, plan)
        if count is not None:
            load_by_layer(model, plan, count, rank)
        # For the weight loaders, which size their tables by the global count.
        allow_global_reads(source.hf_config, text_config)
        return model

    return initialize_planned_model


def _owned_layers(num_layers: int) -> range:
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    group = get_pp_group()
    return range(*get_pp_indices(num_layers, group.rank_in_group, group.world_size))


def _expert_rank(vllm_config: "VllmConfig") -> ExpertRank:
    if not vllm_config.parallel_config.enable_expert_parallel:
        return ExpertRank()
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    return ExpertRank(group.rank_in_group, group.world_size)


def refuse_settings(vllm_config: "VllmConfig", plan: Plan, expert_ranks: int) -> None:
    """Raise UnsupportedOverrideError for engine settings that differing layers do not go with.

    `expert_ranks` is the number of ranks that share the experts of a layer, one without expert parallelism.
    """
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb:
        raise UnsupportedOverrideError(
            "Expert load balancing (enable_eplb) needs the same experts in every MoE layer, and layers "
            f"{sorted(plan)} differ in this checkpoint's per_layer_config. Serve it without --enable-eplb."
        )
    few = [i for i, o in plan.items() if o.num_experts is not None and o.num_experts < expert_ranks]
    if few:
        raise UnsupportedOverrideError(
            f"Expert parallelism (enable_expert_parallel) over {expert_ranks} ranks leaves ranks without "
            f"an expert in layers {few}, which have fewer than {expert_ranks} in this checkpoint's "
            "per_layer_config. Use fewer ranks, or tensor parallelism alone."
        )


def verify(build: Build, architecture: str, owned: range) -> None:
    """Raise UnsupportedOverrideError unless every override of a layer in `owned` was applied.

    `owned` are the layers of this pipeline rank; the other ranks verify theirs.
    """
    for index, override in build.plan.items():
        if index not in owned:
            continue
        built = build.done.get(index)
        if built is None:
            raise UnsupportedOverrideError(
                f"Layer {index}: {_wishes(override)} cannot be honoured, because {architecture} does not "
                "build its layers through vLLM's make_layers or transformers' block classes."
            )
        _verify_layer(index, override, built, architecture)


def _verify_layer(index: int, override: LayerOverride, built: list[BuiltLayer], architecture: str) -> None:
    where = f"Layer {index} of {architecture}"
    if override.foreign and not any(b.read_per_layer_config for b in built):
        raise UnsupportedOverrideError(
            f"{where}: {_pairs(override.foreign)} cannot be honoured; the layer reads the global value. "
            "Only expert counts, the width of experts and `skip` may differ between layers here."
        )
    if override.dropped and not any(b.dropped for b in built):
        raise UnsupportedOverrideError(
            f'{where}: `skip: ["mlp"]` cannot be honoured; the layer has no MoE feed-forward of its own.'
        )
    counts = [count for b in built for count in b.expert_counts]
    if override.num_experts is not None and (not counts or set(counts) != {override.num_experts}):
        raise UnsupportedOverrideError(
            f"{where}: {_pairs(override.values)} cannot be honoured; the layer was built with "
            f"{counts or 'no'} experts."
        )
    widths = {width for b in built for width in b.expert_widths}
    if override.expert_width is not None and widths != {override.expert_width}:
        raise UnsupportedOverrideError(
            f"{where}: {_pairs(override.values)} cannot be honoured; the layer was built with experts of "
            f"{sorted(widths) or 'no'} channels."
        )


def _pairs(values: Any) -> str:
    return ", ".join(f"`{name}: {value!r}`" for name, value in values.items())


def _wishes(override: LayerOverride) -> str:
    wishes = ['`skip: ["mlp"]`'] if override.dropped else []
    return ", ".join(wishes + [_pairs(v) for v in (override.values, override.foreign) if v])
