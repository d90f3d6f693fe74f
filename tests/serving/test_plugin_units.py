"""The plugin's parts that need no vLLM."""

import copy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from llmcompressor_moe_vllm import building
from llmcompressor_moe_vllm.building import Build, refuse_settings, verify
from llmcompressor_moe_vllm.config_view import allow_global_reads, global_reads_allowed, layer_view
from llmcompressor_moe_vllm.layers import BuiltLayer, build_layer, leave_out
from llmcompressor_moe_vllm.loading import ExpertRank, load_by_layer
from llmcompressor_moe_vllm.overrides import LayerOverride, UnsupportedOverrideError, global_count, read_plan
from llmcompressor_moe_vllm.patching import wrap_everywhere
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError


def mixtral(per_layer_config: dict[str, Any] | None, **values: Any) -> Any:
    sizes = {"num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    return CONFIG_MAPPING["mixtral"](**sizes | values, per_layer_config=per_layer_config)


class TestReadPlan:
    def test_dropped_moe_and_expert_count(self):
        config = mixtral({"1": {"skip": ["mlp"], "num_local_experts": 0}, "3": {"num_local_experts": 5}})
        assert read_plan(config) == {
            1: LayerOverride(dropped=True),
            3: LayerOverride(num_experts=5, values={"num_local_experts": 5}),
        }

    def test_nothing_differs(self):
        assert read_plan(mixtral(None)) == {}
        assert read_plan(mixtral({"2": {"num_local_experts": 8}})) == {}

    def test_differences_that_do_not_concern_experts_are_left_alone(self):
        assert read_plan(mixtral({"2": {"head_dim": 16}}, head_dim=32)) == {}

    def test_alias_is_read_as_the_attribute_it_stands_for(self):
        class_ = CONFIG_MAPPING["deepseek_v3"]
        alias = next(a for a, target in class_.attribute_map.items() if target == "n_routed_experts")
        config = class_(
            num_hidden_layers=4, n_routed_experts=8, num_experts_per_tok=2, per_layer_config={2: {alias: 4}}
        )
        assert read_plan(config) == {2: LayerOverride(num_experts=4, values={"n_routed_experts": 4})}

    def test_attribute_that_is_neither_count_nor_width_is_kept_apart(self):
        config = mixtral({"1": {"skip": ["mlp"], "num_local_experts": 0}, "2": {"rms_norm_eps": 1e-3}})
        assert read_plan(config)[2] == LayerOverride(foreign={"rms_norm_eps": 1e-3})

    def test_width_of_experts(self):
        config = mixtral({"2": {"intermediate_size": 32}})
        assert read_plan(config) == {2: LayerOverride(expert_width=32, values={"intermediate_size": 32})}

    @pytest.mark.parametrize(
        ("override", "complaint"),
        [
            ({"skip": ["attention"]}, r"Layer 2: `skip` names \['attention'\]"),
            (
                {"skip": ["attention", "mlp"], "num_local_experts": 0},
                r"Layer 2: `skip` names \['attention'\]",
            ),
            ({"num_local_experts": 0}, r"Layer 2: `num_local_experts` is 0, which is not an expert count"),
            ({"num_local_experts": 9}, r"Layer 2: `num_local_experts` is 9, more than the global value 8"),
            ({"num_local_experts": 1}, r"Layer 2: `num_local_experts` is 1, fewer than the 2 experts"),
            (
                {"intermediate_size": 0},
                r"Layer 2: `intermediate_size` is 0, which is not a number of channels",
            ),
        ],
    )
    def test_refused(self, override: dict[str, Any], complaint: str):
        with pytest.raises(UnsupportedOverrideError, match=complaint):
            read_plan(mixtral({"2": override}))

    def test_transformers_that_does_not_know_the_format(self):
        config = types.SimpleNamespace(per_layer_config={"2": {"num_local_experts": 5}})
        with pytest.raises(UnsupportedOverrideError, match="Install transformers"):
            read_plan(config)
        assert read_plan(types.SimpleNamespace()) == {}


class TestLayerView:
    def test_answers_for_the_layer_also_through_copies_and_aliases(self):
        config = CONFIG_MAPPING["deepseek_v3"](
            num_hidden_layers=4, n_routed_experts=8, per_layer_config={2: {"n_routed_experts": 4}}
        )
        with layer_view({"n_routed_experts": 4}):
            assert (
                config.n_routed_experts
                == config.num_local_experts
                == copy.deepcopy(config).n_routed_experts
                == 4
            )

    def test_config_refuses_again_afterwards_even_when_the_layer_raised(self):
        config = mixtral({"2": {"num_local_experts": 5}})
        with pytest.raises(ZeroDivisionError), layer_view({"num_local_experts": 5}):
            raise ZeroDivisionError
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            _ = config.num_local_experts

    def test_leaves_uniform_configs_alone(self):
        with layer_view({"num_local_experts": 5}):
            assert mixtral(None).num_local_experts == 8

    def test_tells_whether_the_layer_asked_for_its_own_config(self):
        config = mixtral({"2": {"num_local_experts": 5}})
        with layer_view({"num_local_experts": 5}) as reads:
            _ = config.num_local_experts
            assert not reads.per_layer_config
            assert config.per_layer_config[1].num_local_experts == 8
        assert reads.per_layer_config

    def test_global_reads_are_allowed_only_inside(self):
        config = mixtral({"2": {"num_local_experts": 5}})
        with global_reads_allowed(config, mixtral(None)):
            assert config.num_local_experts == 8
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            _ = config.num_local_experts


@dataclass
class Registry:
    """Stands for vLLM's CompilationConfig, in which layers register themselves."""

    static_forward_context: dict[str, nn.Module] = field(default_factory=dict)
    static_all_moe_layers: list[str] = field(default_factory=list)


class Attention(nn.Module):
    pass


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.moe_config = types.SimpleNamespace(num_logical_experts=count, intermediate_size=64)
        self.w13 = nn.Parameter(torch.ones(count, 4))


def decoder_layer(
    registry: Registry, prefix: str, config: Any, moe: bool = True, nested: bool = False
) -> nn.Module:
    layer, outer = nn.Module(), nn.Module()
    layer.attn = Attention()
    registry.static_forward_context[f"{prefix}.attn"] = layer.attn
    layer.norm = nn.LayerNorm(4)
    if moe:
        layer.ffn = nn.Module()
        layer.ffn.gate = nn.Linear(4, config.num_local_experts)
        layer.ffn.experts = Experts(config.num_local_experts)
        registry.static_forward_context[f"{prefix}.ffn.experts"] = layer.ffn.experts
        registry.static_all_moe_layers.append(f"{prefix}.ffn.experts")
    outer.block = layer
    return outer if nested else layer


class TestBuildLayer:
    config = mixtral({"1": {"skip": ["mlp"], "num_local_experts": 0}, "3": {"num_local_experts": 5}})

    def build(self, override: LayerOverride, **kwargs: bool) -> tuple[nn.Module, BuiltLayer, Registry]:
        registry = Registry({"0.attn": Attention(), "0.ffn.experts": Experts(8)}, ["0.ffn.experts"])
        config = copy.deepcopy(self.config)
        allow_global_reads(config)
        make = lambda: decoder_layer(registry, "1", config, **kwargs)  # noqa: E731
        return *build_layer(make, override, registry), registry

    def test_own_expert_count(self):
        layer, built, _ = self.build(LayerOverride(num_experts=5, values={"num_local_experts": 5}))
        assert layer.ffn.gate.out_features == 5
        assert built == BuiltLayer(None, (5,), False, (64,))

    @pytest.mark.parametrize("nested", [False, True])
    def test_dropped_feed_forward(self, nested: bool):
        layer, built, registry = self.build(LayerOverride(dropped=True), nested=nested)
        name = "block.ffn" if nested else "ffn"
        assert built == BuiltLayer(name, (), False)
        assert not [p for n, p in layer.named_parameters() if "ffn" in n and p.numel()]
        leave_out(layer, name)
        hidden = torch.randn(3, 4)
        assert torch.equal(layer.get_submodule(name)(hidden, None, flag=True), torch.zeros(3, 4))
        assert set(registry.static_forward_context) == {"0.attn", "0.ffn.experts", "1.attn"}
        assert registry.static_all_moe_layers == ["0.ffn.experts"]
        assert not [n for n, _ in layer.named_parameters() if "ffn" in n]

    def test_layer_without_moe_is_returned_as_it_is(self):
        layer, built, _ = self.build(LayerOverride(dropped=True), moe=False)
        assert built == BuiltLayer(None, (), False)
        assert not hasattr(layer, "ffn")


class TestVerify:
    whole = range(4)

    def test_width_that_was_not_applied(self):
        override = LayerOverride(expert_width=32, values={"intermediate_size": 32})
        assert "experts of [64] channels" in self.complaint(override, BuiltLayer(None, (8,), False, (64,)))
        verify(Build({2: override}, 4, {2: [BuiltLayer(None, (8,), False, (32,))]}), "SomeModel", self.whole)

    def complaint(self, override: LayerOverride, *built: BuiltLayer) -> str:
        with pytest.raises(UnsupportedOverrideError) as caught:
            verify(Build({2: override}, 4, {2: list(built)} if built else {}), "SomeModel", self.whole)
        return str(caught.value)

    def test_all_applied(self):
        plan = {
            1: LayerOverride(dropped=True),
            2: LayerOverride(num_experts=5, values={"num_local_experts": 5}),
        }
        done = {1: [BuiltLayer("mlp", (), False)], 2: [BuiltLayer(None, (5,), False)]}
        verify(Build(plan, 4, done), "SomeModel", self.whole)

    def test_layers_of_other_pipeline_ranks_are_theirs(self):
        plan = {0: LayerOverride(dropped=True), 3: LayerOverride(dropped=True)}
        done = {0: [BuiltLayer("mlp", (), False)]}
        verify(Build(plan, 4, done), "SomeModel", range(0, 2))
        with pytest.raises(UnsupportedOverrideError, match="Layer 3"):
            verify(Build(plan, 4, done), "SomeModel", range(2, 4))

    def test_layers_built_elsewhere(self):
        complaint = self.complaint(LayerOverride(dropped=True))
        assert "Layer 2" in complaint and "SomeModel does not build its layers through" in complaint

    def test_count_that_the_layer_did_not_read(self):
        override = LayerOverride(num_experts=5, values={"num_local_experts": 5})
        assert "`num_local_experts: 5`" in self.complaint(override, BuiltLayer(None, (8,), False))
        assert "no experts" in self.complaint(override, BuiltLayer(None, (), False))

    def test_dense_layer_cannot_drop_a_moe(self):
        assert "no MoE feed-forward" in self.complaint(
            LayerOverride(dropped=True), BuiltLayer(None, (), False)
        )

    def test_attribute_that_only_an_architecture_knowing_the_format_can_honour(self):
        override = LayerOverride(foreign={"head_dim": 16})
        assert "`head_dim: 16`" in self.complaint(override, BuiltLayer(None, (8,), False))
        verify(Build({2: override}, 4, {2: [BuiltLayer(None, (8,), True)]}), "SomeModel", self.whole)


class TestRefuseSettings:
    dropped: dict[int, LayerOverride] = {1: LayerOverride(dropped=True)}  # noqa: RUF012
    counted: dict[int, LayerOverride] = {2: LayerOverride(num_experts=5)}  # noqa: RUF012

    def settings(self, eplb: bool = False, expert_parallel: bool = False) -> Any:
        parallel = types.SimpleNamespace(enable_eplb=eplb, enable_expert_parallel=expert_parallel)
        return types.SimpleNamespace(parallel_config=parallel)

    def test_load_balancing(self):
        with pytest.raises(UnsupportedOverrideError, match=r"enable_eplb.*layers \[1\]"):
            refuse_settings(self.settings(eplb=True), self.dropped, 1)

    def test_expert_parallelism_with_fewer_experts_than_ranks(self):
        with pytest.raises(UnsupportedOverrideError, match=r"over 8 ranks .* layers \[2\], which have fewer"):
            refuse_settings(self.settings(expert_parallel=True), self.dropped | self.counted, 8)
        refuse_settings(self.settings(expert_parallel=True), self.dropped | self.counted, 5)


class TestLoading:
    class Stacked(nn.Module):
        """Reshapes what it loads by the count in the config, and takes a rank's equal share of that."""

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.held: dict[str, list[int]] = {}

        def load_weights(self, weights: Any) -> set[str]:
            half = self.config.num_local_experts // 2
            return self.load_share(half, weights=weights, ep_rank_end=2 * half)

        def load_share(self, ep_rank_start: int, ep_rank_end: int, weights: Any) -> set[str]:
            found = {name: weight.view(self.config.num_local_experts, -1)[:, 0] for name, weight in weights}
            self.held |= {
                name: rows[ep_rank_start:ep_rank_end].tolist()
                for name, rows in found.items()
                if "layers" in name
            }
            return set(found)

    weights = (
        ("embed", torch.zeros(8, 2)),
        ("layers.0.w", torch.arange(8).repeat_interleave(4)),
        ("layers.1.w", torch.arange(5).repeat_interleave(4)),
        ("layers.2.w", torch.arange(8).repeat_interleave(4)),
    )

    @pytest.mark.parametrize(
        ("rank", "held"),
        [
            (ExpertRank(), {0: range(8), 1: range(5), 2: range(8)}),
            (ExpertRank(0, 2), {0: range(4), 1: range(3), 2: range(4)}),
            (ExpertRank(1, 2), {0: range(4, 8), 1: range(3, 5), 2: range(4, 8)}),
            (ExpertRank(2, 3), {0: range(6, 8), 1: range(4, 5), 2: range(6, 8)}),
        ],
    )
    def test_stacked_experts_are_loaded_by_the_count_of_their_layer(self, rank, held):
        config = mixtral({"1": {"num_local_experts": 5}})
        plan = read_plan(config)
        allow_global_reads(config)
        stacked = self.Stacked(config)
        with pytest.raises(RuntimeError, match="invalid for input of size 20"):
            stacked.load_weights(self.weights)
        load_by_layer(nn.Sequential(stacked, Attention()), plan, global_count(config, plan), rank)
        assert stacked.load_weights(self.weights) == {name for name, _ in self.weights}
        assert stacked.held == {f"layers.{layer}.w": list(rows) for layer, rows in held.items()}

    def test_loaders_that_ask_the_fused_moe_stay_as_they_are(self):
        class Placed(nn.Module):
            def load_weights(self, weights: Any) -> set[str]:
                return set()

        placed = Placed()
        load_by_layer(placed, {1: LayerOverride(num_experts=5)}, 8, ExpertRank(0, 2))
        assert "load_weights" not in vars(placed)

    def test_plan_without_counts_has_no_global_count(self):
        config = mixtral({"1": {"skip": ["mlp"], "num_local_experts": 0}})
        assert global_count(config, read_plan(config)) is None


def test_wrapper_stands_wherever_the_function_was_imported(monkeypatch: pytest.MonkeyPatch):
    home, user = types.ModuleType("home_of_f"), types.ModuleType("user_of_f")
    home.f = user.f = lambda: 1
    monkeypatch.setitem(sys.modules, "home_of_f", home)
    monkeypatch.setitem(sys.modules, "user_of_f", user)
    for _ in range(2):
        wrap_everywhere(home, "f", lambda f: lambda: f() + 1)
    assert home.f() == user.f() == 2


class TestInitializeModel:
    """The two wrappers together, around a stand-in for vLLM's model building."""

    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> Registry:
        registry = Registry()
        stub = types.ModuleType("vllm.config")
        stub.get_current_vllm_config = lambda: types.SimpleNamespace(compilation_config=registry)
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.config", stub)
        monkeypatch.setattr(building, "_owned_layers", range)
        return registry

    def settings(self, config: Any) -> Any:
        parallel = types.SimpleNamespace(enable_eplb=False, enable_expert_parallel=False)
        model = types.SimpleNamespace(hf_config=config, hf_text_config=config)
        return types.SimpleNamespace(parallel_config=parallel, model_config=model)

    def builder(self, registry: Registry, through_make_layers: bool = True) -> Callable[..., nn.Module]:
        def make_layers(count: int, layer_fn: Callable[..., nn.Module], prefix: str) -> nn.ModuleList:
            return nn.ModuleList(layer_fn(prefix=f"{prefix}.{i}") for i in range(count))

        make = building.wrap_make_layers(make_layers) if through_make_layers else make_layers

        def initialize(vllm_config: Any, *, model_config: Any = None) -> nn.Module:
            config = vllm_config.model_config.hf_config
            model = nn.Module()
            model.table = config.num_local_experts
            model.layers = make(4, lambda prefix: decoder_layer(registry, prefix, config), "layers")
            return model

        return initialize

    per_layer = {"1": {"skip": ["mlp"], "num_local_experts": 0}, "3": {"num_local_experts": 5}}  # noqa: RUF012

    def experts(self, model: nn.Module) -> list[int | None]:
        parts = [getattr(layer.ffn, "experts", None) for layer in model.layers]
        return [None if part is None else len(part.w13) for part in parts]

    def test_layers_follow_the_config_and_loaders_may_read_the_global_count(self, registry: Registry):
        config = mixtral(self.per_layer)
        model = building.wrap_initialize_model(self.builder(registry))(self.settings(config))
        assert self.experts(model) == [8, None, 8, 5]
        assert model.table == config.num_local_experts == 8

    def test_text_model_inside_a_multimodal_one(self, registry: Registry):
        inner = building.wrap_initialize_model(self.builder(registry))

        def outer(vllm_config: Any, *, model_config: Any = None) -> nn.Module:
            return inner(self.settings(copy.deepcopy(vllm_config.model_config.hf_text_config)))

        model = building.wrap_initialize_model(outer)(self.settings(mixtral(self.per_layer)))
        assert self.experts(model) == [8, None, 8, 5]

    def test_uniform_model_is_built_as_ever(self, registry: Registry):
        model = building.wrap_initialize_model(self.builder(registry))(self.settings(mixtral(None)))
        assert self.experts(model) == [8, 8, 8, 8]

    def test_failure_leaves_the_config_refusing(self, registry: Registry):
        config = mixtral(self.per_layer)
        build = building.wrap_initialize_model(self.builder(registry, through_make_layers=False))
        with pytest.raises(UnsupportedOverrideError, match="Layer 1"):
            build(self.settings(config))
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            _ = config.num_local_experts
