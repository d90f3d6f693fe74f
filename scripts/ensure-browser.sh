#!/usr/bin/env bash
# Makes sure that a Chromium is on the path for the tests of HTML pages (pytest -m browser); installs Debian's where
# there is none. It changes nothing when one is there.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then
        exit 0
    fi
done

if ! command -v apt-get > /dev/null; then
    echo "No Chromium on the path and no apt-get: install chromium with the system's package manager." >&2
    exit 1
fi
root=()
if [ "$(id -u)" -ne 0 ]; then
    root=(sudo)
fi
echo "Installing chromium for the tests of HTML pages"
"${root[@]}" apt-get update --quiet=2
# Chromium draws no text without any font.
"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --quiet=2 --yes --no-install-recommends chromium fonts-dejavu-core
