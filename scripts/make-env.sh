#!/usr/bin/env bash
# Makes the environment that llm-compressor and this project run in, with everything pinned that the tests ran on.
# Run it again at any time; it changes nothing when everything is in place.
#
#   scripts/make-env.sh [FOLDER]      FOLDER is .venv unless told; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.venv}
stack=constraints/reference.txt

if [ ! -x "$folder/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
fi
python=$folder/bin/python

if ! cat "$stack" pyproject.toml | cmp --silent - "$folder/stack.txt"; then
    # torch by itself first: it may come from another index, and everything else is built against it.
    "$python" -m pip install --quiet "$(grep '^torch==' "$stack")"
    "$python" -m pip install --quiet --constraint "$stack" --editable '.[dev]'
    cat "$stack" pyproject.toml > "$folder/stack.txt"
fi

"$python" - <<'CHECK'
import importlib.metadata as metadata

print(f"llm-compressor {metadata.version('llmcompressor')} with transformers {metadata.version('transformers')}")
CHECK
