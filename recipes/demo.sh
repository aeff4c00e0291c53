#!/bin/sh
# The main job end to end on the synthetic demo corpus: about five minutes on two CPU cores.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
"$PYTHON" data/make_demo.py
"$PYTHON" train.py --manifest data/demo/train.jsonl --independent_space --balance_param 0.1
"$PYTHON" finetune.py
"$PYTHON" evaluate.py --by ethnicity gender age
