#!/bin/sh
# sdist -> wheel -> clean environment -> used outside the checkout.
# The installed package must have its natives, its tokenizer and its CUDA sources.
set -eu
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" -m venv "$work/build"
"$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build -q --sdist --outdir "$work" .
"$work/build/bin/pip" wheel -q --no-deps --wheel-dir "$work" "$work"/minisb-*.tar.gz

"$PYTHON" -m venv "$work/use"
"$work/use/bin/pip" install -q "$work"/minisb-*.whl
cd "$work"
"$work/use/bin/python" - <<'PY'
import importlib.util
from pathlib import Path
import minisb
from minisb import native

home = Path(minisb.__file__).parent
assert "site-packages" in str(home), home
missing = {name: reason for name, reason in native.status().items() if reason}
assert not missing, f"natives missing from the wheel: {missing}"
for wanted in ("cuda/common.cuh", "assets/stdlib-4096.tiktoken", "cpu/gla.pyx"):
    assert (home / wanted).exists(), f"{wanted} is not in the wheel"
assert importlib.util.find_spec("cuda") is None, "a folder named cuda shadows NVIDIA's package"
print("package: natives, tokenizer and CUDA sources are in the wheel")
PY
"$work/use/bin/python" -m minisb info nano > /dev/null
echo "package: ok"
