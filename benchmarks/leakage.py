"""How much of a demographic column can be read off stage-1 embeddings of unseen speakers?

    python benchmarks/leakage.py --corpus data/demo --seeds 0 1 2 --runs \\
        "simclr: --balance_param 0" "fsc 0.1: --independent_space --balance_param 0.1"

Trains stage 1 once for each run and seed (a run that is there already is not repeated), embeds the
train and test manifests (mean of the encoder's frames), fits probes on the train speakers and
reports their balanced accuracy on the test speakers; chance is 1 / number of groups. The probes are
the linear and the nonlinear one of fairasr_min/embed.py, and 15 nearest neighbours, each group's
votes weighted by its rarity, which learn nothing. Beside them: the same on the encoder before any
training, and on embeddings from which the span of the train groups' mean differences was projected
out (a linear erasure after training, which leaves a linear probe nothing by construction, and
another one perhaps a lot).

Prints a Markdown table: mean over seeds, each seed's value, and the paired difference to the first
run.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairasr_min import checkpoint, data, embed  # noqa: E402
from fairasr_min.model import FairASR  # noqa: E402
from fairasr_min.runtime import World, seed_everything  # noqa: E402


def probes(train: tuple, test: tuple) -> list[float]:
    """Balanced accuracy on test, of the probes in the table's order, fitted on train."""
    predicted = [embed.fit_predict(p, *train, test[0]) for p in embed.probes(seed=0).values()]
    predicted.append(neighbours(train, test))
    return [embed.balanced_accuracy(test[1], answers) for answers in predicted]


def neighbours(train: tuple, test: tuple, k: int = 15) -> np.ndarray:
    """The groups that the k nearest train embeddings (standardised, Euclidean) give to test."""
    scale = StandardScaler().fit(train[0])
    nearest = NearestNeighbors(n_neighbors=k).fit(scale.transform(train[0]))
    groups, counts = np.unique(train[1], return_counts=True)
    votes = train[1][nearest.kneighbors(scale.transform(test[0]), return_distance=False)]
    share = np.stack([(votes == group).mean(1) for group in groups], axis=1) / counts
    return groups[share.argmax(1)]


def erase(train: tuple, test: tuple) -> tuple:
    """Project the span of the train groups' mean differences out of both sets."""
    x, y = train
    x = (x - x.mean(0)) / x.std(0)
    means = np.stack([x[y == group].mean(0) for group in np.unique(y)])
    directions = np.linalg.svd(means - means.mean(0), full_matrices=False)[2][: len(means) - 1]
    x_test = (test[0] - train[0].mean(0)) / train[0].std(0)
    return (x - x @ directions.T @ directions, y), (
        x_test - x_test @ directions.T @ directions,
        test[1],
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", default="data/demo", help="folder with train.jsonl, test.jsonl")
    parser.add_argument("--label", default="ethnicity")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", required=True, metavar='"NAME: ARGUMENTS"')
    parser.add_argument("--out", default="runs/leakage")
    args = parser.parse_args()

    sets = []
    for name in ("train", "test"):
        path = Path(args.corpus) / f"{name}.jsonl"
        rows = data.settle(path, *data.read_manifest(path, text="unused"))
        rows = [u for u in rows if data.label_of(u.row, args.label)]
        sets.append((rows, np.array([data.label_of(u.row, args.label) for u in rows])))
    (train, y_train), (test, y_test) = sets
    classes = len(np.unique(y_train))

    def measure(model):
        vectors = [embed.embed(model, rows, World(0, 1, torch.device("cpu")), 64).astype(np.float64)
                   for rows in (train, test)]  # fmt: skip
        pair = (vectors[0], y_train), (vectors[1], y_test)
        return probes(*pair) + probes(*erase(*pair))

    rows = []
    for run in args.runs:
        name, _, arguments = run.partition(":")
        scores = []
        for seed in args.seeds:
            out = Path(args.out) / f"{name.strip().replace(' ', '_')}-{seed}"
            command = [
                sys.executable,
                str(ROOT / "train.py"),
                "--out",
                str(out),
                "--seed",
                str(seed),
            ]
            command += ["--manifest", str(Path(args.corpus) / "train.jsonl"), "--label", args.label]
            subprocess.run(command + shlex.split(arguments), check=True, stdout=subprocess.DEVNULL)
            payload = checkpoint.load_model_file(out / "pretrained.pt")
            model = FairASR(payload["config"], 0, False)
            checkpoint.load_weights(model, payload, out, ("encoder", "log_mel"))
            scores.append(measure(model))
            values = ", ".join(f"{s:.3f}" for s in scores[-1])
            print(f"{name} seed {seed}: {values}", flush=True)
        rows.append((name, np.array(scores)))
    config = payload["config"]
    scores = []
    for seed in args.seeds:
        seed_everything(seed)
        scores.append(measure(FairASR(config, 0, False)))
    rows.append(("untrained encoder", np.array(scores)))

    print(f"\nprobes for {args.label}, {len(test)} utterances of unseen speakers, ", end="")
    print(f"chance {1 / classes:.3f}\n")
    header = ["run", "linear probe", "each seed", "minus first run (sd)", "nonlinear"]
    header += ["15 neighbours", "erased: linear", "erased: nonlinear", "erased: 15 neighbours"]
    print("| " + " | ".join(header) + " |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    first = rows[0][1][:, 0]
    for name, scores in rows:
        each = ", ".join(f"{s:.3f}" for s in scores[:, 0])
        change = scores[:, 0] - first
        spread = change.std(ddof=1) if len(change) > 1 else float("nan")
        difference = "" if name == rows[0][0] else f"{change.mean():+.3f} ({spread:.3f})"
        linear, *others = scores.mean(0)
        print(f"| {name} | {linear:.3f} | {each} | {difference} |", end="")
        print("".join(f" {value:.3f} |" for value in others))


if __name__ == "__main__":
    main()
