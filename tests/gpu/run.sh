#!/usr/bin/env bash
# Everything that a card must show, in one run of at most 8 minutes: bash tests/gpu/run.sh OUT [--toy]
# Packages that the machine lacks come from a folder of wheels, $WHEELS, if it is set, else from the package index.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1
shift
venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
python3 -m venv --system-site-packages "$venv"
source=(${WHEELS:+--no-index --find-links "$WHEELS"})
need=()
for pair in bitsandbytes:bitsandbytes peft:peft trl:trl datasets:datasets accelerate:accelerate typer:typer \
  pydantic:pydantic prompt_toolkit:prompt_toolkit matplotlib:matplotlib pytest:pytest filelock:filelock psutil:psutil; do
  "$venv/bin/python" -c "import ${pair%%:*}" 2>/dev/null || need+=("${pair##*:}")
done
# --no-deps: torch and transformers are the machine's own, and stay
if [ ${#need[@]} -gt 0 ]; then
  "$venv/bin/python" -m pip install -q --no-deps "${source[@]}" "${need[@]}"
fi
"$venv/bin/python" -c "import liger_kernel" 2>/dev/null ||
  "$venv/bin/python" -m pip install -q --no-deps "${source[@]}" liger-kernel || echo "without liger-kernel"
PYTHONPATH=. HF_HUB_OFFLINE=1 "$venv/bin/python" -m tests.gpu.measure --out "$out" "$@"
