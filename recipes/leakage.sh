#!/usr/bin/env bash
# Does stage 1 hide the group? The leakage tables in RESULTS.md, on the synthetic demo corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
"$PYTHON" data/make_demo.py
"$PYTHON" benchmarks/leakage.py --runs \
    "simclr: --balance_param 0" \
    "FSC 0.1: --independent_space --balance_param 0.1" \
    "FSC 1: --independent_space --balance_param 1" \
    "FSC 10: --independent_space --balance_param 10" \
    "FSC 10, others: --independent_space --balance_param 10 --fsc_positives others"
