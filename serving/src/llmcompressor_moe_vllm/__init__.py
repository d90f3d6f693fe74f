"""vLLM plugin that serves MoE checkpoints whose layers differ.

Such a checkpoint carries `per_layer_config` in its (text) config:
`{"3": {"skip": ["mlp"], "num_local_experts": 0}}` says that layer 3 has no MoE feed-forward,
`{"3": {"num_local_experts": 5}}` that it has five experts. vLLM finds the plugin by its entry point and
loads it in every process; a checkpoint without `per_layer_config` never meets it. The config of DeepSeek-MoE is
the exception: the plugin brings its class.

    overrides.py    what the config says, checked, as plain data
    config_view.py  lets one config answer for one layer while that layer is built
    layers.py       builds a layer by its override: its own expert count, or no feed-forward
    building.py     builds a model by a plan and verifies that every override was applied
    loading.py      has loaders that go by the global count load each layer by its own
    transformers_backend.py
                    the same for models whose layers transformers constructs
    latent_attention.py
                    lets vLLM summarize such a config where attention is multi-head latent
    deepseek.py     a config class that neither vLLM nor transformers has
    patching.py     puts wrappers in the place of vLLM's functions
    plugin.py       the entry point
"""
