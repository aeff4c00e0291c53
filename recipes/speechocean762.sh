#!/usr/bin/env bash
# Real speech: the three stages on speechocean762 (children's and learners' English, 5.6 hours),
# hiding gender and age group, with SimCLR alone, in the same space, and in an independent space.
# The table in RESULTS.md: about 25 minutes a row on one CPU core.
#   bash recipes/speechocean762.sh PATH/TO/speechocean762/manifest.jsonl
set -euo pipefail
MANIFEST=$(realpath "${1:?usage: bash recipes/speechocean762.sh MANIFEST (data/README.md says which)}")
[ -f "$MANIFEST" ] || { echo "$MANIFEST: no such file" >&2; exit 2; }
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
DATA=data/speechocean762
RUNS=runs/speechocean762-$SEED

[ -e "$DATA/train.jsonl" ] || "$PYTHON" data/split_manifest.py "$MANIFEST" --out "$DATA" \
    --disjoint speaker --stratify gender age_group --test_where split=test

stages() {  # name, arguments of stage 1
    name=$1; shift
    "$PYTHON" train.py --manifest "$DATA/train.jsonl" --label gender age_group --size tiny \
        --epochs 4 --lr 1e-3 --min_lr 1e-4 --seed "$SEED" --out "$RUNS/$name/pretrain" "$@"
    "$PYTHON" finetune.py --init "$RUNS/$name/pretrain/pretrained.pt" --epochs 18 --batch_size 16 \
        --lr 3e-3 --min_lr 3e-5 --seed "$SEED" --by age_group --out "$RUNS/$name/finetune"
    "$PYTHON" evaluate.py --model "$RUNS/$name/finetune/model.pt" --by gender age_group \
        --out "$RUNS/$name/evaluate"
}

for name in ${ONLY:-simclr same_space independent_space}; do
    case $name in
        simclr) stages simclr --balance_param 0 ;;
        same_space) stages same_space --balance_param 0.1 ;;
        independent_space) stages independent_space --balance_param 0.1 --independent_space ;;
    esac
done
