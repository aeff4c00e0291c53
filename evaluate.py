"""Stage 3 of FairASR: word error rate by group.

    python evaluate.py --by ethnicity

Decodes the test manifest to a file (hyps.jsonl: the manifest's rows plus `pred_text`) and counts
errors from that file's rows; another system's output in that form is audited by --predictions.

    python evaluate.py --predictions hyps.jsonl --by ethnicity gender ethnicity+gender
    python evaluate.py --compare before.jsonl after.csv --by ethnicity
    python evaluate.py --audio a.wav b.mp3
"""

import argparse
import csv
import json
import math
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from fairasr_min import checkpoint, data, report, runtime
from fairasr_min.audio import AudioError, read_audio
from fairasr_min.decode import decode
from fairasr_min.layers import weights_held
from fairasr_min.report_html import to_html
from fairasr_min.runtime import at_least
from fairasr_min.stats import StatisticsError
from fairasr_min.text import normalize, normalizer

MODEL = "runs/finetune/model.pt"
REPORTS = ["report.json", "report.csv", "report.md", "report.html"]
MANY_GROUPS = 200  # compared each with each, they make 20,000 pairs


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    # fmt: off
    add("--manifest", metavar="FILE",
        help="what to transcribe (test.jsonl beside the model's training manifest)")
    add("--model", default=MODEL, metavar="X", 
        help="model file of stage 2, .nemo archive, its https address or Hugging Face name "
             "(%(default)s)")
    add("--predictions", nargs="+", metavar="FILE",
        help="another system's output, instead of a model and a manifest: JSON lines, .csv or .tsv "
             "with `text` and `pred_text`; further files are compared with the first")
    add("--compare", nargs="+", metavar="FILE", help="more such files, of the same utterances")
    add("--id", metavar="COL",
        help="column by which files are joined (audio_filepath, with offset if there is one)")
    add("--audio", nargs="+", metavar="FILE", help="only print what is said in these files")
    add("--by", nargs="+", default=[], metavar="COL",
        help="group columns, one table each; a+b crosses two")
    add("--bins", nargs="+", default=[], metavar="COL=N,N",
        help="cut a column of --by, of numbers, into groups: age=0,18,30,46,66")
    add("--normalize", choices=["none", "basic", "whisper"], default="basic",
        help="of both texts before counting (%(default)s)")
    add("--reference", metavar="GROUP",
        help="hold the others against this group, instead of each against each")
    add("--cluster", metavar="COL",
        help="who may share errors (speaker if there, else cluster, else every utterance)")
    add("--min_speakers", type=at_least(1), default=1, metavar="N",
        help="groups of fewer are shown, but left out of gaps and tests (%(default)s)")
    add("--min_utterances", type=at_least(1), default=1, metavar="N", help="likewise (%(default)s)")
    add("--adjust", nargs="+", metavar="COL",
        help="also compare groups with these columns held fixed (needs statsmodels)")
    add("--draws", type=at_least(100), default=10_000, metavar="N",
        help="of the bootstrap and of the permutation test (%(default)s)")
    add("--leakage", metavar="FILE",
        help="leakage.json of `python -m fairasr_min.embed probe`, to be shown beside")
    add("--out", default="runs/evaluate", metavar="DIR",
        help="for hyps.jsonl and the report (%(default)s)")
    add("--audio_root", metavar="DIR",
        help="where the audio lies, if not where the manifest says")
    add("--max_bad", type=at_least(0), default=0, metavar="N",
        help="go on without up to this many bad rows (%(default)s)")
    add("--batch_size", type=at_least(1), default=32, metavar="N",
        help="utterances per process; the texts do not depend on it (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="of the draws (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32",
        help="of matrix products (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: a GPU if there is one (%(default)s)")
    add("--num_workers", type=at_least(0), default=0, metavar="N",
        help="processes that read audio ahead (%(default)s)")
    # fmt: on
    return p


def make_folder(args) -> None:
    """--out, before the long work. Raises UserError."""
    out = Path(args.out)
    runtime.make_folder(out)
    decoding = not (args.predictions or args.compare)
    given = [
        args.manifest,
        args.leakage,
        args.model,
        *(args.predictions or []),
        *(args.compare or []),
    ]
    given = {Path(path).resolve() for path in given if path}
    for name in ["hyps.jsonl"] * decoding + REPORTS:
        if (out / name).resolve() in given:
            raise runtime.UserError(f"{out / name} would be overwritten; give another --out")
        if (out / name).is_dir():
            raise runtime.UserError(f"{out / name} is a folder; give another --out")


def load_model_file(args, world) -> dict:
    """The model file of --model. Raises UserError, CheckpointError."""
    if args.model == MODEL and not Path(MODEL).exists():
        raise runtime.UserError(
            f"{MODEL} is not there: run python finetune.py first, or name another with --model"
        )
    with runtime.first_process_first(world):  # which may have to download it
        return checkpoint.load_model_file(args.model)


def read_manifest(args, file: dict, world) -> tuple[list[data.Utterance], dict]:
    """What the model of that file is to transcribe, and what the report will rest on."""
    trained = file["arguments"]  # none in a .nemo archive
    if args.manifest is None and trained:
        args.manifest = str(Path(trained["train_manifest"]).parent / "test.jsonl")
        args.audio_root = args.audio_root or trained["audio_root"]
    elif args.manifest is None:
        with runtime.first_process_first(world):
            args.manifest = str(data.default_corpus(world.say) / "test.jsonl")
    utterances, bad = data.read_manifest(args.manifest, args.audio_root, "optional", world.main)
    utterances = data.settle(args.manifest, utterances, bad, args.max_bad, world.say)
    return utterances, {
        "manifest": args.manifest,
        "model": args.model,
        "model_sha256": data.fingerprint(file["path"]),
        "model_commit": file["commit"],
        "manifest_sha256": data.fingerprint(args.manifest),
        "precision": args.precision,
        "trained_on": trained.get("train_manifest"),
        "bad_rows_left_out": len(bad),
    }


def read_rows(path: str, needed: tuple[str, ...]) -> list[dict]:
    """Rows of a file of predictions: JSON lines, or a table with column names (.csv, .tsv).
    Raises ManifestError."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if (suffix := Path(path).suffix.lower()) in (".csv", ".tsv"):
                csv.field_size_limit(2**31 - 1)
                table = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
                columns = table.fieldnames or []
                if twice := [c for c in columns if columns.count(c) > 1]:
                    raise data.ManifestError(f"{path}:1: column {twice[0]!r} is there twice")
                numbered = ((table.line_num, row) for row in table)
            else:
                numbered = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            for number, row in numbered:
                cells = list(row.values()) if isinstance(row, dict) else []  # of a table
                if None in cells or cells and None in row or any("\n" in c for c in cells if c):
                    raise data.ManifestError(
                        f"{path}:{number}: more or fewer cells than columns, or a line break; "
                        "a text with a comma needs quotes, and quotes need an end"
                    )
                rows.append(read_row(row, needed, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise data.ManifestError(f"{path}: cannot be read ({error}); UTF-8 is expected") from None
    if not rows:
        raise data.ManifestError(f"{path}: holds no rows")
    return rows


def read_row(row: str | dict, needed: tuple[str, ...], where: str) -> dict:
    """One row, with the texts that it needs. Raises ManifestError."""
    try:
        if isinstance(row, str):
            escapes, row = "\\u" in row, json.loads(row)
            if escapes:  # half of a surrogate pair could not be written again
                json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise data.ManifestError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise data.ManifestError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for name in needed:
        if name not in row:
            there = ", ".join(str(key) for key in row)
            raise data.ManifestError(
                f"{where}: missing {name!r}; columns there are: {there[:300]} (.csv: separated by "
                "commas, .tsv: by tabs)"
            )
        if not isinstance(row[name], str):
            raise data.ManifestError(f"{where}: {name} must be a text, not {row[name]!r:.80}")
    return row


def key_of(row: dict, column: str | None) -> str | None:
    """What names an utterance in all files: --id, else its audio (and the part of it)."""
    if column is not None:
        return None if row.get(column) in (None, "") else str(row[column])
    offset = row.get("offset")
    if isinstance(offset, int | float) or isinstance(offset, str) and offset.strip():
        offset = f" at {str(offset).removesuffix('.0')} s"  # 0 in one file, 0.0 in another
    return None if row.get("audio_filepath") is None else f"{row['audio_filepath']}{offset or ''}"


def by_key(rows: list[dict], path: str, column: str | None) -> dict[str, dict]:
    """Rows by what names them. Raises ManifestError unless each has a name of its own."""
    found = {}
    for number, row in enumerate(rows, 1):
        key = key_of(row, column)
        if key is None:
            raise data.ManifestError(
                f"{path}: row {number} has no {column or 'audio_filepath'}; systems are compared "
                "utterance by utterance: --id names the column to join by"
            )
        if key in found:
            raise data.ManifestError(f"{path}: row {number}: {key!r} is there twice; --id COL?")
        found[key] = row
    return found


def read_predictions(args) -> tuple[list[dict], dict[str, list[str]], dict, list[str]]:
    """Rows of the first file, every system's texts for them, what they are, and warnings.

    Several files are joined: what one of them lacks is left out everywhere. Raises ManifestError.
    """
    first, *others = [*(args.predictions or []), *(args.compare or [])]
    if len({first, *others}) <= len(others):
        raise data.ManifestError("the same file is given twice")
    rows = read_rows(first, ("text", "pred_text"))
    about = {"manifest": first, "manifest_sha256": data.fingerprint(first), "model": first}
    if not others:
        keys = [key for row in rows if (key := key_of(row, args.id)) is not None]
        repeats = len(keys) - len(set(keys))
        warnings = [f"{first}: {repeats} rows repeat an utterance; each is counted"]
        return rows, {first: [r["pred_text"] for r in rows]}, about, warnings if repeats else []
    warnings = []
    systems = {first: by_key(rows, first, args.id)}
    for path in others:
        systems[path] = by_key(read_rows(path, ("pred_text",)), path, args.id)
    everywhere = [key for key in systems[first] if all(key in rows for rows in systems.values())]
    every = {key for rows in systems.values() for key in rows}
    for path, there in systems.items():
        if lacking := sorted(every - set(there)):
            more = ", ..." if len(lacking) > 10 else ""
            warnings.append(
                f"{path} lacks {len(lacking):,} utterances, left out for all systems: "
                f"{', '.join(lacking[:10])}{more}"
            )
    if not everywhere:
        raise data.ManifestError(f"no utterance is in all of {', '.join(systems)}; --id COL?")
    rows = [systems[first][key] for key in everywhere]
    for path in others:
        texts = [
            (systems[path][key].get("text"), row["text"]) for key, row in zip(everywhere, rows)
        ]
        if differ := sum(isinstance(a, str) and normalize(a) != normalize(b) for a, b in texts):
            warnings.append(f"{path}: {differ:,} reference texts differ; those of {first} count")
        about[f"sha256 of {path}"] = data.fingerprint(path)
    texts = {
        path: [there[key]["pred_text"] for key in everywhere] for path, there in systems.items()
    }
    return rows, texts, about, warnings


def read_leakage(path: str) -> dict:
    """What `embed probe` wrote. Raises UserError."""
    try:
        leakage = json.loads(Path(path).read_text(encoding="utf-8"))
        for found in leakage["columns"].values():
            scores = (found["linear"], found["nonlinear"])
            shown = [found["chance"], *(score["value"] for score in scores)]
            if not all(isinstance(n, int | float) for n in shown):
                raise ValueError
            if any("interval" not in score for score in scores):
                raise ValueError
    except OSError as error:
        raise runtime.UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise runtime.UserError(f"{path}: not written by fairasr_min.embed probe") from None
    return leakage


def read_bins(args) -> dict[str, list[float]]:
    """--bins COL=EDGE,EDGE,... Raises UserError."""
    bins = {}
    for one in args.bins:
        column, _, edges = one.partition("=")
        try:
            bins[column] = [float(edge) for edge in edges.split(",")]
        except ValueError:
            bins[column] = []
        names = {f"{edge:g}" for edge in bins[column] if math.isfinite(edge)}
        if (
            not bins[column]
            or sorted(bins[column]) != bins[column]
            or len(names) < len(bins[column])
        ):
            raise runtime.UserError(f"--bins {one}: COLUMN=0,18,30 with rising numbers is expected")
        if column not in "+".join(args.by).split("+"):
            raise runtime.UserError(f"--bins {one}: --by does not name {column}")
    return bins


def numbers(values: list) -> list:
    """As numbers if all are (a table has only texts), else as texts; None where missing."""
    values = [None if value in (None, "") else value for value in values]
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return [None if value is None else str(value) for value in values]


def cluster_of(args, rows: list[dict], where: str) -> tuple[list | None, str, list[str]]:
    """Who speaks in each row (None: nobody knows), by which column, and warnings."""
    column = args.cluster
    if column is not None:
        data.require_columns(where, rows, [column])
    else:
        named = ("speaker", "cluster")
        column = next((c for c in named if any(data.label_of(r, c) for r in rows)), None)
    if column is None:
        alone = (
            "no speaker is named: intervals and tests take utterances for independent, which those "
            "of one speaker are not, and are too narrow (--cluster names a column)"
        )
        return None, "utterance", [alone]
    speakers = [data.label_of(row, column) for row in rows]
    unknown = speakers.count(None)
    speakers = [(i,) if s is None else s for i, s in enumerate(speakers)]
    warnings = [f"{unknown:,} utterances without {column}: each counts as a speaker of its own"]
    return speakers, column, warnings if unknown else []


def write_all(folder: Path, files: dict[str, str]) -> None:
    """All files or none of them: an old report beside new hypotheses would mislead.
    Raises UserError, e.g. on a full disk."""
    unfinished = {name: folder / f".{name}.{os.getpid()}.unfinished" for name in files}
    try:
        for name, content in files.items():
            unfinished[name].write_text(content, encoding="utf-8")
    except OSError as error:
        for path in unfinished.values():
            with suppress(OSError):  # a disk that can no longer be written
                path.unlink()
        raise runtime.UserError(
            f"{folder} could not be written ({error.strerror}); what was there is as it was"
        ) from None
    for name, path in unfinished.items():
        path.replace(folder / name)


def main() -> int:
    args = arguments().parse_args()
    world = runtime.setup(args.device)
    runtime.check_supported(args.precision, world.device)
    if args.audio:
        others = ("manifest", "predictions", "compare", "by")
        if idle := [f"--{name}" for name in others if getattr(args, name)]:
            raise runtime.UserError(f"--audio only prints what is said: leave out {' '.join(idle)}")
        model = checkpoint.recogniser(load_model_file(args, world)).to(world.device)
        with weights_held(), runtime.autocast(args.precision, world.device):
            for path in args.audio:
                text = model.transcribe([read_audio(path)])[0]
                world.say(text if len(args.audio) == 1 else f"{path}: {text}")
        return 0

    bins = read_bins(args)
    if args.adjust and not args.by:
        raise runtime.UserError("--adjust needs --by COL: the difference between which groups?")
    if len([*(args.predictions or []), *(args.compare or [])]) == 1 and args.compare:
        raise runtime.UserError("--compare needs two files or more (or --predictions FILE too)")
    leakage = read_leakage(args.leakage) if args.leakage else None
    try:
        clean, cleaned = normalizer(args.normalize)
    except ValueError as error:
        raise runtime.UserError(str(error)) from None
    warnings, decoding = [], not (args.predictions or args.compare)
    if decoding:
        file = load_model_file(args, world)
        model = checkpoint.recogniser(file).to(world.device)
        utterances, about = read_manifest(args, file, world)
        rows = [u.row for u in utterances]
    else:
        rows, texts, about, warnings = read_predictions(args)

    # ---- groups and speakers, before the long work
    data.require_columns(about["manifest"], rows, [*args.by, *bins, *(args.adjust or [])])
    binned = [
        {**row, **{c: data.bin_of(row.get(c), edges) for c, edges in bins.items()}} for row in rows
    ] if bins else rows  # fmt: skip
    for column in bins:
        if all(row[column] is None for row in binned):
            raise data.ManifestError(f"{about['manifest']}: --bins: no number in {column!r}")
    groups = {column: [data.label_of(row, column) for row in binned] for column in args.by}
    for column, labels in groups.items():
        if (n := len(set(labels))) > MANY_GROUPS:
            raise data.ManifestError(
                f"{about['manifest']}: column {column!r} has {n:,} values; at most {MANY_GROUPS} "
                "groups make a report (--bins cuts numbers into groups)"
            )
    covariates = {
        column: numbers([row.get(column) for row in rows]) for column in args.adjust or []
    }
    speakers, cluster, more = cluster_of(args, rows, about["manifest"])
    if args.reference and not any(args.reference in labels for labels in groups.values()):
        raise data.ManifestError(f"no column of --by has a group {args.reference!r}")
    make_folder(args)

    # ---- what was said
    if decoding:
        hours = sum(u.seconds for u in utterances) / 3600
        world.say(f"transcribing {args.manifest}: {len(utterances):,} utterances, {hours:.2f} h")
        heard = decode(model, utterances, world, args.batch_size, args.precision, args.num_workers)
        rows = [{**row, "pred_text": text} for row, text in zip(rows, heard)]
        texts = {args.model: heard}
    if not world.main:
        return 0
    if decoding:  # at once: nothing that comes after may cost the decoding
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_all(Path(args.out), {"hyps.jsonl": lines})

    # ---- the report
    references = [clean(row["text"]) for row in rows]
    texts = {name: [clean(text) for text in spoken] for name, spoken in texts.items()}
    about |= {
        "synthetic": any(r.get("synthetic") for r in rows),
        "normalization": cleaned,
        "cluster": cluster,
        "draws": args.draws,
        "seed": args.seed,
        "min_speakers": args.min_speakers,
        "min_utterances": args.min_utterances,
        "reference": args.reference,
        "bins": args.bins,
        "empty_references": references.count(""),
        "commit": runtime.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }
    out = Path(args.out)
    ids = [key_of(row, args.id) or f"row {i}" for i, row in enumerate(rows, 1)]
    result = report.make_report(
        references, texts, groups, about,
        clusters=speakers, ids=ids, reference=args.reference, min_speakers=args.min_speakers,
        min_utterances=args.min_utterances, covariates=covariates, draws=args.draws, seed=args.seed,
    )  # fmt: skip
    result["warnings"] = [*warnings, *more, *result["warnings"]]
    result["leakage"] = leakage
    written = {
        "report.json": json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.csv": report.to_csv(result),
        "report.md": report.to_markdown(result),
        "report.html": to_html(result),
    }
    write_all(out, written)
    if decoding and "training" in file:  # finetune.py has written it
        card = {**file, "config": asdict(file["config"])}
        report.write_model_card(Path(file["path"]).parent, card, result)
    print(report.to_text(result))
    names = ["hyps.jsonl"] * decoding + list(written)
    print("\nwritten: " + ", ".join(str(out / name) for name in names))
    columns = [c for c in data.group_columns(rows) if c not in args.by]
    if columns:
        hyps = out / "hyps.jsonl" if decoding else about["manifest"]
        print(f"next, without decoding again: python evaluate.py --predictions {hyps} --by COLUMN")
        print(f"  (a+b crosses two; columns that look like groups: {', '.join(columns)})")
    return 0


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError, checkpoint.CheckpointError, StatisticsError))
