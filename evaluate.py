"""Stage 3 of FairASR: word error rate by group.

    python evaluate.py --by ethnicity

Decodes the test manifest to a file (hyps.jsonl: the manifest's rows plus `pred_text`) and counts
errors from that file's rows; another system's output in that form is audited by --predictions.

    python evaluate.py --predictions hyps.jsonl --by ethnicity gender ethnicity+gender
    python evaluate.py --audio a.wav b.mp3
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from fairasr_min import checkpoint, data, report, runtime, wer
from fairasr_min.audio import AudioError, audio_seconds, read_audio
from fairasr_min.decode import LONGEST, decode
from fairasr_min.runtime import at_least
from fairasr_min.text import NORMALIZATION, normalize

MODEL = "runs/finetune/model.pt"


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
    add("--predictions", metavar="FILE",
        help="JSON lines with `text` and `pred_text`, instead of a model and a manifest")
    add("--audio", nargs="+", metavar="FILE", help="only print what is said in these files")
    add("--by", nargs="+", default=[], metavar="COL",
        help="group columns, one table each; a+b crosses two")
    add("--out", default="runs/evaluate", metavar="DIR",
        help="for hyps.jsonl, report.json, report.md (%(default)s)")
    add("--audio_root", metavar="DIR",
        help="where the audio lies, if not where the manifest says")
    add("--max_bad", type=at_least(0), default=0, metavar="N",
        help="go on without up to this many bad rows (%(default)s)")
    add("--batch_size", type=at_least(1), default=32, metavar="N",
        help="utterances per process; the texts do not depend on it (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", 
        help="recorded; nothing is random here yet")
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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise runtime.UserError(f"--out {out}: {error.strerror}; name a folder") from None
    if args.manifest and Path(args.manifest).resolve() == (out / "hyps.jsonl").resolve():
        raise runtime.UserError(f"{args.manifest} would be overwritten; give another --out")


def load_model(args):
    """The recogniser of --model. Raises UserError, CheckpointError."""
    if args.model == MODEL and not Path(MODEL).exists():
        raise runtime.UserError(
            f"{MODEL} is not there: run python finetune.py first, or name another with --model"
        )
    return checkpoint.load_model(args.model)


def transcribe(args, world) -> tuple[list[dict], dict]:
    """The manifest's rows with `pred_text`, and what made them."""
    with runtime.first_process_first(world):  # which may have to download it
        model = load_model(args).to(world.device)
    about = checkpoint.load_model_file(args.model)
    trained = about["arguments"]  # none in a .nemo archive
    if args.manifest is None and trained:
        args.manifest = str(Path(trained["train_manifest"]).parent / "test.jsonl")
        args.audio_root = args.audio_root or trained["audio_root"]
    elif args.manifest is None:
        with runtime.first_process_first(world):
            args.manifest = str(data.default_corpus(world.say) / "test.jsonl")
    utterances, bad = data.read_manifest(
        args.manifest, args.audio_root, "optional", world.main, LONGEST
    )
    utterances = data.settle(args.manifest, utterances, bad, args.max_bad, world.say)
    data.require_columns(args.manifest, [u.row for u in utterances], args.by)
    hours = sum(u.seconds for u in utterances) / 3600
    world.say(f"transcribing {args.manifest}: {len(utterances):,} utterances, {hours:.2f} h")
    make_folder(args)
    texts = decode(model, utterances, world, args.batch_size, args.precision, args.num_workers)
    rows = [{**u.row, "pred_text": text} for u, text in zip(utterances, texts)]
    return rows, {
        "manifest": args.manifest,
        "model": args.model,
        "model_sha256": data.fingerprint(about["path"]),
        "model_commit": about["commit"],
        "manifest_sha256": data.fingerprint(args.manifest),
        "precision": args.precision,
        "trained_on": trained.get("train_manifest"),
        "bad_rows_left_out": len(bad),
    }


def read_predictions(args) -> tuple[list[dict], dict]:
    """Rows of another system's output. Raises ManifestError."""
    rows = []
    try:
        lines = Path(args.predictions).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise data.ManifestError(f"{args.predictions}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("expected a JSON object")
            if not (isinstance(row["text"], str) and isinstance(row["pred_text"], str)):
                raise TypeError("text and pred_text must be strings")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else error
            raise data.ManifestError(f"{args.predictions}:{number}: {reason}") from None
        rows.append(row)
    if not rows:
        raise data.ManifestError(f"{args.predictions}: holds no rows")
    data.require_columns(args.predictions, rows, args.by)
    make_folder(args)
    return rows, {
        "manifest": args.predictions,
        "manifest_sha256": data.fingerprint(args.predictions),
        "model": "whatever wrote that file",
    }


def write_all(folder: Path, files: dict[str, str]) -> None:
    """All files or none of them: an old report beside new hypotheses would mislead.
    Raises UserError, e.g. on a full disk."""
    unfinished = {name: folder / f".{name}.unfinished" for name in files}
    try:
        for name, content in files.items():
            unfinished[name].write_text(content, encoding="utf-8")
    except OSError as error:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
        raise runtime.UserError(
            f"{folder} could not be written ({error.strerror}); what was there is as it was"
        ) from None
    for name, path in unfinished.items():
        path.replace(folder / name)


def main() -> int:
    args = arguments().parse_args()
    world = runtime.setup(args.device)
    runtime.check_precision(args.precision, world.device)
    if args.audio:
        model = load_model(args).to(world.device)
        for path in args.audio:
            if (seconds := audio_seconds(path)) > LONGEST:
                raise AudioError(f"{path}: {seconds:.0f} s; at most {LONGEST:.0f} s, cut it up")
            text = model.transcribe([read_audio(path)])[0]
            world.say(text if len(args.audio) == 1 else f"{path}: {text}")
        return 0

    rows, about = read_predictions(args) if args.predictions else transcribe(args, world)
    if not world.main:
        return 0

    errors = [wer.count_errors(normalize(r["text"]), normalize(r["pred_text"])) for r in rows]
    groups = {column: [data.label_of(r, column) for r in rows] for column in args.by}
    about |= {
        "synthetic": any(r.get("synthetic") for r in rows),
        "normalization": NORMALIZATION,
        "empty_references": sum(e.words == 0 for e in errors),
        "seed": args.seed,
        "commit": runtime.commit(),
        "command": shlex.join(["python", *sys.argv]),
    }
    result, out = report.make_report(errors, groups, about), Path(args.out)
    written = {
        "hyps.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "report.json": json.dumps(result, indent=2, ensure_ascii=False) + "\n",
        "report.md": report.to_markdown(result),
    }
    if args.predictions:
        del written["hyps.jsonl"]  # it is the input
    write_all(out, written)
    print(report.to_text(result))
    print("\nwritten: " + ", ".join(str(out / name) for name in written))
    columns = [c for c in data.group_columns(rows) if c not in args.by]
    if columns:
        hyps = args.predictions or out / "hyps.jsonl"
        print(f"next, without decoding again: python evaluate.py --predictions {hyps} --by COLUMN")
        print(f"  (a+b crosses two; columns that look like groups: {', '.join(columns)})")
    return 0


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError, checkpoint.CheckpointError))
