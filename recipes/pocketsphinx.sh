#!/usr/bin/env bash
# A real system on real speech: PocketSphinx, with the US English model in its package, transcribes
# the test part of speechocean762; evaluate.py audits what it wrote by gender, age group and both.
# 20 minutes on a core of its own; JOBS=2 uses two. Interrupted, it goes on where it was.
#   bash recipes/pocketsphinx.sh PATH/TO/speechocean762/manifest.jsonl
set -euo pipefail
MANIFEST=$(realpath "${1:?usage: bash recipes/pocketsphinx.sh MANIFEST (data/README.md says which)}")
[ -f "$MANIFEST" ] || { echo "$MANIFEST: no such file" >&2; exit 2; }
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=data/speechocean762
RUNS=runs/pocketsphinx
PACKAGE=$RUNS/package # beside our packages, which stay as requirements.txt made them

[ -e "$DATA/test.jsonl" ] || "$PYTHON" data/split_manifest.py "$MANIFEST" --out "$DATA" \
    --disjoint speaker --stratify gender age_group --test_where split=test
# --no-deps: the only one, sounddevice, is for microphones
[ -e "$PACKAGE/pocketsphinx" ] || \
    "$PYTHON" -m pip install --quiet --no-deps --target "$PACKAGE" pocketsphinx==5.1.1
[ -e "$RUNS/hyps.jsonl" ] || \
    PYTHONPATH=$PACKAGE "$PYTHON" recipes/pocketsphinx_transcribe.py "$DATA/test.jsonl" \
    --out "$RUNS/hyps.jsonl" --jobs "${JOBS:-1}"
"$PYTHON" evaluate.py --predictions "$RUNS/hyps.jsonl" --by gender age_group gender+age_group \
    --out "$RUNS/audit"
