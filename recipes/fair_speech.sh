#!/usr/bin/env bash
# Fair-Speech with the hyper-parameters of the paper's code, from scratch (which starts from NVIDIA's
# stt_en_conformer_ctc_small). Not run by us: the audio is behind Meta's licence form.
#   bash recipes/fair_speech.sh FOLDER_OF_CLIPS METADATA.tsv
set -euo pipefail
USAGE="usage: bash recipes/fair_speech.sh FOLDER_OF_CLIPS METADATA.tsv"
AUDIO=$(realpath "${1:?$USAGE}")
METADATA=$(realpath "${2:?$USAGE}")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
[ -e data/fair_speech/train.jsonl ] || \
    "$PYTHON" data/prepare_fair_speech.py --audio "$AUDIO" --metadata "$METADATA"
"$PYTHON" train.py --independent_space --balance_param 0.1
"$PYTHON" finetune.py
"$PYTHON" evaluate.py --by age gender ethnicity first_language socioeconomic_bkgd
