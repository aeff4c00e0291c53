"""Utterance embeddings in a file, and how well groups can be read from them (leakage).

    python -m fairasr_min.embed write --model X --manifest FILE --out embeddings.npz
    python -m fairasr_min.embed probe --embeddings embeddings.npz --manifest FILE --by gender \\
        --out DIR

`write` takes any of our model files, stage 1 too, or a .nemo archive. The file holds `x` (N, D),
the mean of the encoder's valid frames; `ids` (N,), the audio_filepath of each row (with `offset`,
`#t=START,END` behind it); `x_random` (N, D), the same from that encoder with random weights; and
`model`, its name. x and ids are enough for `probe`: embeddings of any other system can be measured,
too.

`probe` trains a linear and a nonlinear classifier to name the group of utterances from the
embedding, and tests them on speakers that they never heard. It writes leakage.json and, for each
column, a picture of the embeddings in two dimensions.
"""

import argparse
import html
import io
import json
import os
import re
import warnings
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from threadpoolctl import threadpool_limits

from fairasr_min import checkpoint, data, runtime, stats
from fairasr_min.audio import AudioError
from fairasr_min.decode import encode_corpus
from fairasr_min.model import FairASR, in_windows, masked_mean
from fairasr_min.runtime import UserError, World, at_least, autocast

FOLDS = 5
FEWEST_SPEAKERS = 5  # of a group: one for each fold
DRAWN = 2000  # points of a picture
MEANING = """\
How to read this: balanced accuracy is the mean over groups of the share of utterances that are
recognised. A high one means that the group can be read from the embedding; one near chance, that
these two probes could not read it: another one may. Intervals (95 %) are for new speakers and the
probes as trained; other training speakers would move scores near chance further. Leakage and gaps
in word error rate are no proxies for one another."""


# ---- embeddings ----------------------------------------------------------------------------------


def embed(
    model: torch.nn.Module,
    utterances: list[data.Utterance],
    world: World,
    batch_size: int = 32,
    precision: str = "fp32",
    num_workers: int = 0,
) -> np.ndarray:
    """Utterance embeddings h (N, D) float32 in the order of the utterances, on every process: the
    mean over valid frames of model.encoder. They do not depend on the batches. Leaves the model in
    eval mode. Raises AudioError for a file that cannot be decoded.
    """
    model.to(world.device).eval()

    def encode(waveforms, n_samples):
        features = model.log_mel(waveforms.to(world.device), n_samples.to(world.device))
        with autocast(precision, world.device):
            h, lengths = in_windows(model.encoder, *features, model.encoder.config)
        return masked_mean(h, lengths).cpu().numpy()

    return np.stack(encode_corpus(encode, utterances, world, batch_size, num_workers, "embedding"))


def row_id(row: dict) -> str:
    """audio_filepath; a part of a recording adds its seconds, as in a URL: a.wav#t=1.5,4.0."""
    name, start = row["audio_filepath"], row.get("offset")
    return name if start is None else f"{name}#t={float(start)},{float(start) + row['duration']}"


def read_embeddings(path: str | Path) -> dict:
    """x (N, D) float64, ids (N,), x_random (N, D) or None, model. Raises UserError for what is not
    an embeddings file; runs no code in it (allow_pickle=False)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            there = {name: file[name] for name in file.files}
        x, ids, random = there["x"], there["ids"], there.get("x_random")
        for name, array in {"x": x, "x_random": x if random is None else random}.items():
            if array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind != "f":
                raise ValueError(f"{name} is no matrix of real numbers, at least two in a row")
            if len(array) != len(ids) or not (np.abs(array) < 1e30).all():  # also NaN
                raise ValueError(f"{name} has other rows than ids, or numbers that are absurd")
        if ids.ndim != 1 or ids.dtype.kind != "U" or not 0 < len(ids) == len(set(ids.tolist())):
            raise ValueError("ids are not a different text for each row")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # numpy raises whatever the bytes lead it to
        reason = f"no array {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.split("\n")[0][:200]
        if "pickle" in reason:  # the message recommends to run the code in it
            reason = "no arrays of plain numbers and texts"
        raise UserError(f"{path}: damaged, or not an embeddings file ({reason})") from None
    return {
        "x": x.astype(np.float64),
        "ids": ids.tolist(),
        "x_random": None if random is None else random.astype(np.float64),
        "model": str(there.get("model", "unknown")),
    }


# ---- the probe -----------------------------------------------------------------------------------


def probes(seed: int) -> dict:
    """The two classifiers, untrained. The nonlinear one is a network with one hidden layer: its
    time grows with N, not with the square as that of an RBF machine, and it reads more than nearest
    neighbours do (RESULTS.md)."""
    return {
        "linear": LogisticRegression(max_iter=2000),
        "nonlinear": MLPClassifier((64,), alpha=1.0, random_state=seed),
    }


def fit_predict(probe, x: np.ndarray, labels: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Labels (M,) of x_test (M, D) by a probe that is fitted on x (N, D) and labels (N,).
    Dimensions are standardised, and groups weigh the same whatever their size."""
    scale = StandardScaler().fit(x)
    weights = compute_sample_weight("balanced", labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not quite converged is a probe, too
        fitted = clone(probe).fit(scale.transform(x), labels, sample_weight=weights)
    return fitted.predict(scale.transform(x_test))


def held_out(
    probe, x: np.ndarray, labels: np.ndarray, speakers: np.ndarray, seed: int
) -> np.ndarray:
    """The label (N,) that a probe gives each utterance, fitted on those of other speakers: five
    folds of whole speakers, each with about the same share of each group."""
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    predicted = np.empty_like(labels)
    for train, test in folds.split(x, labels, speakers):
        predicted[test] = fit_predict(probe, x[train], labels[train], x[test])
    return predicted


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over groups of the share recognised: 1 / groups by chance, or for any constant answer,
    however unequal the groups."""
    return float(np.mean([(predicted[labels == g] == g).mean() for g in np.unique(labels)]))


def score(labels: np.ndarray, predicted: np.ndarray, speakers: np.ndarray, seed: int) -> dict:
    """Balanced accuracy with its 95 % interval (None: speakers vary too little to tell), drawn over
    speakers: wrong answers are counted as word errors are, one word an utterance, whose mean rate
    over groups is 1 - balanced accuracy. The probe stays as trained: with other training speakers
    it would vary, too, and near chance that matters (85 % covered in simulation, RESULTS.md)."""
    wrong = (labels != predicted).astype(np.int64)
    names = labels.astype(str).tolist()
    macro = stats.rates_by_group(wrong, np.ones_like(wrong), speakers, names, seed=seed).macro
    interval = macro.interval and [max(0.0, 1 - macro.interval.high), 1 - macro.interval.low]
    return {"value": balanced_accuracy(labels, predicted), "interval": interval}


def leakage(
    x: np.ndarray, x_random: np.ndarray | None, labels: list[str], speakers: list, seed: int
) -> dict:
    """One column's part of leakage.json. x, x_random (N, D); labels and speakers, N each."""
    groups = sorted(set(labels))
    place = {group: i for i, group in enumerate(groups)}
    y = np.array([place[label] for label in labels])
    who = np.unique(np.array(speakers, dtype=object), return_inverse=True)[1]
    counts = np.bincount(y)
    part = {
        "majority": float(counts.max() / len(y)),
        "chance": 1 / len(groups),
        "speakers": int(who.max()) + 1,
        "groups": dict(zip(groups, counts.tolist())),
    }
    for prefix, vectors in {"": x, "random_init_": x_random}.items():
        for name, probe in probes(seed).items():
            part[prefix + name] = None
            if vectors is not None:
                part[prefix + name] = score(y, held_out(probe, vectors, y, who, seed), who, seed)
    return part


def choose_speakers(rows: list[dict], column: str | None) -> tuple[str, list[Hashable]]:
    """(column, its value in each row, None where it is missing). Without --speaker: speaker, else
    cluster, else each utterance is taken for a speaker of its own, with a warning. Raises UserError
    for a --speaker column without values."""
    for name in [column] if column else ["speaker", "cluster"]:
        speakers = [data.label_of(row, name) for row in rows]
        if any(speakers):
            return name, speakers
    if column:
        raise UserError(f"--speaker {plain(column)}: no row has a value there")
    print(
        "warning: no column speaker or cluster: utterances are held out instead of speakers. Where "
        "a speaker has several, the probes may recognise voices, and the scores be too high"
    )
    return "utterance", list(range(len(rows)))


def choose_rows(column: str, labels: list, speakers: list) -> np.ndarray:
    """Places of the rows that are probed: those with a label and a known speaker, of groups with
    five speakers or more. Prints what is left out. Raises UserError if no two groups are left."""
    known = [i for i, who in enumerate(speakers) if who is not None and labels[i] is not None]
    if missing := len(labels) - len(known):
        print(f"{plain(column)}: {missing:,} rows without label or speaker are left out")
    heard = {}
    for i in known:
        heard.setdefault(labels[i], set()).add(speakers[i])
    small = sorted(label for label, who in heard.items() if len(who) < FEWEST_SPEAKERS)
    if len(heard) - len(small) < 2:
        raise UserError(
            f"column {plain(column)!r} has {len(heard) - len(small)} group(s) of {FEWEST_SPEAKERS} "
            f"speakers or more, and {len(small)} smaller: a probe needs two; leave it out of --by"
        )
    if small:
        names = ", ".join(plain(label) for label in small[:10]) + (", ..." if small[10:] else "")
        print(f"warning: {plain(column)}: fewer than {FEWEST_SPEAKERS} speakers, left out: {names}")
    return np.array([i for i in known if labels[i] not in small])


# ---- what is shown -------------------------------------------------------------------------------


def plain(text: str, limit: int = 60) -> str:
    """Text from the data without what a terminal or XML would take for more than text."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]",
                  "\ufffd", text)  # fmt: skip
    return text if len(text) <= limit else text[: limit - 1] + "…"


def table(column: str, part: dict) -> str:
    """A column's part of leakage.json, for the terminal."""

    def cell(score):
        if score is None:
            return "not in the file"
        low, high = score["interval"] or (np.nan, np.nan)
        return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"

    groups = ", ".join(f"{plain(name)} {n:,}" for name, n in part["groups"].items())
    lines = [
        f"{plain(column)}: {sum(part['groups'].values()):,} utterances ({groups}), "
        f"{part['speakers']:,} speakers",
        f"  {'balanced accuracy':20}{'this encoder':24}random weights",
    ]
    for name in ("linear", "nonlinear"):
        lines.append(f"  {name:20}{cell(part[name]):24}{cell(part[f'random_init_{name}'])}")
    return "\n".join(lines) + (
        f"\n  {'chance':20}{part['chance']:.3f}; also that of always naming the largest group, "
        f"which is right in {part['majority']:.3f} of the utterances"
    )


def projections(x: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """(N, 2) of each kind, from standardised dimensions."""
    x = StandardScaler().fit_transform(x)
    pca = PCA(min(50, *x.shape), svd_solver="full").fit(x)
    first = pca.transform(x)
    shares = " and ".join(f"{100 * share:.0f} %" for share in pca.explained_variance_ratio_[:2])
    near = TSNE(random_state=seed, perplexity=min(30, len(x) / 4))
    return {
        f"PCA: {shares} of the variance": first[:, :2],
        "t-SNE: only who is near whom means something": near.fit_transform(first),
    }


SHAPES = [  # markers, about 8 pixels wide, as relative SVG paths: told apart without colour
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "m0-4.5l4.5 8h-9z",
    "m-3.2-3.2h6.4v6.4h-6.4z",
    "m-1.2-4.5h2.4v3.3h3.3v2.4h-3.3v3.3h-2.4v-3.3h-3.3v-2.4h3.3z",
    "m0 4.5l4.5-8h-9z",
    "m0-5l3.5 5l-3.5 5l-3.5-5z",
    "m-4.5-1.2h9v2.4h-9z",
]
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#808080"]
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --line: #bbb }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e6e6; --line: #555 } }
text { font: 14px system-ui, sans-serif; fill: var(--ink) }
path { stroke: var(--paper); stroke-width: 0.6 }
"""


def picture(title: str, panels: dict[str, np.ndarray], labels: Sequence[str]) -> str:
    """A self-contained SVG: the points (N, 2) of each panel, with colour and shape of their label
    (N,). The labels are text in it, whatever they hold."""
    side, names = 440, sorted(set(labels))
    look = {  # 49 different pairs
        name: (SHAPES[i % 7], COLOURS[(i + i // 7) % 7]) for i, name in enumerate(names)
    }

    def mark(label, x, y):
        shape, colour = look[label]
        return f'<path fill="{colour}" d="M{x:.1f} {y:.1f}{shape}"/>'

    def words(x, y, text):
        return f'<text x="{x}" y="{y}">{html.escape(plain(text))}</text>'

    out = [words(20, 28, title)]
    for k, (name, points) in enumerate(panels.items()):
        left, top = 20 + k * (side + 20), 70
        spread = np.maximum(np.ptp(points, axis=0), 1e-9)
        points = (points - points.min(axis=0)) / spread * (side - 24) + (left + 12, top + 12)
        out.append(words(left, top - 10, name))
        out.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" '
                   'stroke="var(--line)"/>')  # fmt: skip
        out += [mark(label, *point) for label, point in zip(labels, points)]
    for i, name in enumerate(names):
        x, y = 30 + i % 2 * (side + 20), side + 100 + i // 2 * 24
        out += [mark(name, x, y - 5), words(x + 14, y, name)]
    width = 20 + len(panels) * (side + 20)
    height = side + 100 + (len(names) + 1) // 2 * 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{html.escape(plain(title))}</title><style>{STYLE}</style>"
        f'<rect width="{width}" height="{height}" fill="var(--paper)"/>\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


# ---- commands ------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises UserError, e.g. on a full disk."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):  # a disk that can no longer be written
            unfinished.unlink()
        raise UserError(f"{path} could not be written ({error.strerror})") from None


def write(args) -> None:
    world = runtime.setup(args.device)
    runtime.check_supported(args.precision, world.device)
    if (out := Path(args.out)).is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {out / 'embeddings.npz'}")
    if out.resolve() in (Path(args.manifest).resolve(), Path(args.model).resolve()):
        raise UserError(f"--out {out} would be overwritten; name another file")
    runtime.make_folder(out.parent)
    with runtime.first_process_first(world):  # which may have to download it
        payload = checkpoint.load_model_file(args.model)
    utterances, bad = data.read_manifest(args.manifest, args.audio_root, "unused", world.main)
    utterances = data.settle(args.manifest, utterances, bad, args.max_bad, world.say)
    if data.is_synthetic(utterances):
        world.say("SYNTHETIC voices: the embeddings say nothing about people")
    hours = sum(u.seconds for u in utterances) / 3600
    world.say(f"embedding {args.manifest}: {len(utterances):,} utterances, {hours:.2f} h, twice")

    settings = (utterances, world, args.batch_size, args.precision, args.num_workers)
    runtime.seed_everything(args.seed)
    model = FairASR(payload["config"], 0, False)  # its head is not used
    checkpoint.load_weights(model, payload, args.model, ("log_mel",))
    x_random = embed(model, *settings)
    checkpoint.load_weights(model, payload, args.model, ("encoder",))
    x = embed(model, *settings)
    for vectors, who in ((x, "the model"), (x_random, "an encoder with random weights")):
        if not np.isfinite(vectors).all():
            first = utterances[int((~np.isfinite(vectors)).any(axis=1).argmax())]
            raise UserError(
                f"{first.path}: {who} gives an embedding that is not finite; is the model damaged, "
                f"or --precision {args.precision} too small for it?"
            )
    if world.main:
        file = io.BytesIO()
        ids = np.array([row_id(u.row) for u in utterances])
        np.savez(file, x=x, ids=ids, x_random=x_random, model=np.array(str(args.model)))
        write_file(out, file.getvalue())
        print(f"{out} written: x {x.shape[0]:,} x {x.shape[1]}")


def read_rows(manifest: str | Path, ids: Sequence[str]) -> list[dict | None]:
    """The manifest's first row of each id, None where it has none. No audio is needed. Raises
    ManifestError if the file cannot be read or has nothing of them."""
    found = {}
    try:
        with open(manifest, encoding="utf-8-sig") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    found.setdefault(row_id(row), row)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    pass  # `write` did not embed it, either
    except (OSError, UnicodeDecodeError) as error:
        raise data.ManifestError(f"{manifest}: cannot be read ({error})") from None
    rows = [found.get(name) for name in ids]
    if not any(rows):
        raise data.ManifestError(
            f"{manifest}: has none of the {len(ids):,} utterances embedded ({plain(ids[0])}, ...)"
        )
    return rows


@threadpool_limits.wrap(limits=1)  # more only wait for one another here, and round differently
def probe(args) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("probe runs on one process: start it without torchrun")
    there = read_embeddings(args.embeddings)
    rows = read_rows(args.manifest, there["ids"])
    here = np.array([row is not None for row in rows])
    if not here.all():
        print(f"{(~here).sum():,} embeddings have no row in {args.manifest}: left out")
    rows = [row for row in rows if row is not None]
    x, x_random = there["x"][here], there["x_random"]
    x_random = None if x_random is None else x_random[here]
    if np.ptp(x, axis=0).max() == 0:
        raise UserError(f"{args.embeddings}: all embeddings are the same; nothing can be read")
    by = list(dict.fromkeys(args.by))
    data.require_columns(args.manifest, rows, by + ([args.speaker] if args.speaker else []))
    speaker, speakers = choose_speakers(rows, args.speaker)
    labels = {column: [data.label_of(row, column) for row in rows] for column in by}
    chosen = {column: choose_rows(column, labels[column], speakers) for column in by}
    runtime.make_folder(Path(args.out))

    synthetic = any(row.get("synthetic") for row in rows)
    voices = "SYNTHETIC voices: " if synthetic else ""
    print(f"{voices}{len(rows):,} embeddings of {x.shape[1]} numbers by {plain(there['model'])}")
    if speaker != "speaker":
        print(f"a speaker is here what has one value of {plain(speaker)!r}")
    result = {"model": there["model"], "n": len(rows), "speaker_column": speaker,
              "synthetic": synthetic, "seed": args.seed, "columns": {}}  # fmt: skip
    for column, i in chosen.items():
        result["columns"][column] = leakage(
            x[i],
            None if x_random is None else x_random[i],
            [labels[column][j] for j in i],
            [speakers[j] for j in i],
            args.seed,
        )
        print(f"\n{table(column, result['columns'][column])}", flush=True)
    print(f"\n{MEANING}")

    drawn = np.random.default_rng(args.seed).permutation(len(rows))[:DRAWN]  # in a fair order
    flat = projections(x[drawn], args.seed)
    for column, i in chosen.items():
        shown = np.isin(drawn, i)
        title = f"{voices}{column}, {shown.sum():,} of {len(rows):,} utterances"
        panels = {name: points[shown] for name, points in flat.items()}
        image = picture(title, panels, [labels[column][j] for j in drawn[shown]])
        name = quote(column, safe="+ ", errors="replace")[:100]  # also of ../column
        write_file(Path(args.out) / f"embeddings-{name}.svg", image.encode())
    write_file(Path(args.out) / "leakage.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"\n{args.out}: leakage.json, and a picture of each column (embeddings-*.svg)")


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fairasr_min.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    # fmt: off
    add = commands.add_parser("write", help="embed every utterance of a manifest").add_argument
    add("--model", required=True, metavar="X",
        help="model file of any stage, .nemo archive, its https address or Hugging Face name")
    add("--manifest", required=True, metavar="FILE", help="what to embed; no text is needed")
    add("--out", required=True, metavar="FILE.npz", help="x, ids, x_random, model")
    add("--audio_root", metavar="DIR",
        help="where the audio lies, if not where the manifest says")
    add("--max_bad", type=at_least(0), default=0, metavar="N",
        help="go on without up to this many bad rows (%(default)s)")
    add("--batch_size", type=at_least(1), default=32, metavar="N",
        help="utterances per process; the embeddings do not depend on it (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="of the random weights of x_random (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32",
        help="of matrix products (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: a GPU if there is one (%(default)s)")
    add("--num_workers", type=at_least(0), default=0, metavar="N",
        help="processes that read audio ahead (%(default)s)")

    add = commands.add_parser("probe", help="what can be read from embeddings").add_argument
    add("--embeddings", required=True, metavar="FILE.npz")
    add("--manifest", required=True, metavar="FILE", help="its columns; audio is not needed")
    add("--by", required=True, nargs="+", metavar="COL", help="group columns; a+b crosses two")
    add("--speaker", metavar="COL", help="who speaks (speaker, else cluster, else nobody knows)")
    add("--out", required=True, metavar="DIR", help="for leakage.json and embeddings-COL.svg")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="of folds, probes, intervals and pictures (%(default)s)")
    # fmt: on
    return p


def main() -> int:
    args = arguments().parse_args()
    {"write": write, "probe": probe}[args.command](args)
    return 0


if __name__ == "__main__":
    runtime.run(
        main, (data.ManifestError, checkpoint.CheckpointError, AudioError, stats.StatisticsError)
    )
