"""Meta's Fair-Speech, as downloaded, to train.jsonl, dev.jsonl and test.jsonl.

    python data/prepare_fair_speech.py --audio asr_fairness_audio --metadata metadata.tsv

The metadata is tab-separated: hash_name, transcription, and five labels; the audio of a row is
hash_name.wav, anywhere under --audio. In order: read the metadata, find and measure the audio,
leave out what cannot be used (listed) and what lasts over 17.5 s (counted by group), split
81/9/10 stratified jointly over the five labels, write manifests and summary.md.

There is no speaker column in Fair-Speech: the same people are in train, dev and test, and word
error rates are those of seen speakers. `cluster`, the five labels together, is the nearest
substitute.

--test_list takes test_manifest.json of the original FairASR repository, and makes exactly its
clips the test set.
"""

import argparse
import csv
import os
import shlex
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from split_manifest import Unit, json_lines, read_rows, refuse_overwriting, split, summary, write

from fairasr_min import data
from fairasr_min.audio import HOP, SAMPLE_RATE, AudioError, audio_seconds
from fairasr_min.data import BadRow, ManifestError
from fairasr_min.text import normalize

OUT = Path(__file__).resolve().parent / "fair_speech"
LABELS = ("age", "gender", "first_language", "socioeconomic_bkgd", "ethnicity")
COLUMNS = ("hash_name", "transcription", *LABELS)
EXTENSIONS = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
FRACTIONS = (0.81, 0.09, 0.1)  # 9:1 into train and test, then dev out of train the same way
EMPTY = "empty transcription"
EXPECTED_EMPTY = 1  # the released file has exactly one; more of them count as bad rows


# ---- the metadata --------------------------------------------------------------------------------


def clean(text: str) -> str:
    """The `basic` normalisation, and Latin letters without accents: Beyoncé -> beyonce.

    The transcribers wrote accents now and then, in two spellings; nobody hears them. Marks that
    belong to a letter of another script are part of it and stay.
    """
    kept, base = [], " "
    for char in unicodedata.normalize("NFD", normalize(text)):
        if unicodedata.category(char)[0] != "M":
            base = char
        elif not base.isalpha() or "LATIN" in unicodedata.name(base, ""):
            continue
        kept.append(char)
    return normalize("".join(kept))  # puts the other scripts' letters together again


def read_metadata(metadata: Path) -> tuple[list[tuple[int, dict]], list[BadRow]]:
    """(line, row) of every usable row in the order of the file, and every bad row.

    A row has the seven columns, and the normalised transcription as `text`.
    Raises ManifestError if the file cannot be read, is not tab-separated, or lacks a column.
    """
    rows, bad, seen = [], [], {}
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = reader.fieldnames or []
            if len(names) < 2:
                raise ManifestError(
                    f"{metadata}: not tab-separated; expected the columns {', '.join(COLUMNS)}"
                )
            if missing := [name for name in COLUMNS if name not in names]:
                raise ManifestError(
                    f"{metadata}: no column {missing[0]!r}; columns there are: {', '.join(names)}"
                )
            for fields in reader:
                row = {column: (fields[column] or "").strip() for column in COLUMNS}
                row["text"] = clean(row["transcription"])
                line, name = reader.line_num, row["hash_name"]
                absent = [column for column in COLUMNS if not row[column]]
                if None in fields:
                    bad.append(BadRow(line, "more fields than columns", row))
                elif absent and absent != ["transcription"]:
                    bad.append(BadRow(line, f"no {', '.join(absent)}", row))
                elif name in seen:
                    bad.append(BadRow(line, f"{name} stands already in line {seen[name]}", row))
                elif not row["text"]:
                    bad.append(BadRow(line, EMPTY, row))
                else:
                    rows.append((line, row))
                seen.setdefault(name, line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{metadata}: cannot be read ({error})") from None
    if not rows:
        raise ManifestError(f"{metadata}: holds no usable row")
    return rows, bad


# ---- the audio -----------------------------------------------------------------------------------


def index_audio(folder: Path) -> dict[str, Path]:
    """Name without extension -> audio file, in the folder or below; .wav and the least deep first.

    Raises ManifestError if there is none.
    """
    if not folder.is_dir():
        raise ManifestError(f"--audio {folder} is not a folder")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]
    if not files:
        raise ManifestError(f"--audio {folder}: no {', '.join(sorted(EXTENSIONS))} in it or below")
    files.sort(key=lambda p: (p.suffix.lower() != ".wav", len(p.parts), str(p)))
    found = {}
    for path in files:
        found.setdefault(path.stem, path)
    return found


def measure(path: Path) -> float | str:
    """Seconds of audio, or the reason why the clip cannot be used."""
    if not path.is_file():
        return f"no audio file {path}, nor below that folder"
    try:
        seconds = audio_seconds(path)
    except AudioError as error:
        return str(error)
    return seconds if int(seconds * SAMPLE_RATE) >= HOP else f"{path}: less than 10 ms of audio"


def add_audio(rows: list[tuple[int, dict]], audio: Path, out: Path):
    """Metadata rows -> (manifest rows sorted by hash_name, bad rows).

    Audio below the manifests' folder or beside it is named relative to them, so that all can be
    moved together; audio elsewhere by its absolute path.
    """
    audio, out = Path(os.path.realpath(audio)), Path(os.path.realpath(out))
    found = index_audio(audio)
    paths = [found.get(row["hash_name"], audio / f"{row['hash_name']}.wav") for _, row in rows]
    with ThreadPoolExecutor(8) as pool:
        measured = list(
            tqdm(
                pool.map(measure, paths),
                "reading audio headers",
                len(paths),
                unit=" clips",
                leave=False,
                disable=not sys.stderr.isatty(),
            )
        )
    clips, bad = [], []
    for (line, row), path, seconds in zip(rows, paths, measured):
        if isinstance(seconds, str):
            bad.append(BadRow(line, seconds, row))
            continue
        name = os.path.relpath(path, out) if path.is_relative_to(out.parent) else str(path)
        clips.append(
            {
                "audio_filepath": name,
                "text": row["text"],
                "duration": seconds,
                **{column: row[column] for column in LABELS},
                "cluster": " | ".join(row[column] for column in LABELS),
                "hash_name": row["hash_name"],
            }
        )
    return sorted(clips, key=lambda clip: clip["hash_name"]), bad


def settle(metadata: Path, bad: list[BadRow], max_bad: int) -> list[str]:
    """The bad rows as lines of text. Raises ManifestError if they are more than max_bad."""
    in_order = sorted(bad, key=lambda row: row.line)
    lines = [f"{metadata.name}:{row.line}: {row.reason}" for row in in_order]
    empty = sum(row.reason == EMPTY for row in bad)
    counted = len(bad) - (empty if empty <= EXPECTED_EMPTY else 0)
    if counted > max_bad:
        shown = [f"  {line}" for line in lines[: data.SHOWN]]
        if len(lines) > data.SHOWN:
            shown.append(f"  ... and {len(lines) - data.SHOWN:,} more")
        raise ManifestError(
            f"{counted:,} rows cannot be used; mend them, or go on without them: "
            f"--max_bad {counted}\n" + "\n".join(shown)
        )
    return lines


# ---- the split -----------------------------------------------------------------------------------


def split_clips(clips: list[dict], seed: int, test_names=frozenset()) -> dict[str, list[dict]]:
    """Manifest rows -> train, dev, test; 81/9/10, or test_names as test and 9:1 of the others.

    Stratified jointly over the five labels: in each of their combinations, test gets its tenth
    rounded up or down, and dev its tenth of what is left. Ethnicity stands first, so that its
    groups get theirs as exactly (see take). Needs no audio; the order of the rows does not matter.
    """
    units = [
        Unit(clip["hash_name"], tuple(clip[column] for column in reversed(LABELS)), [clip])
        for clip in clips
    ]
    test = [unit for unit in units if unit.name in test_names]
    others = [unit for unit in units if unit.name not in test_names]
    parts = split(others, FRACTIONS, seed, test)
    return {name: sorted(part, key=lambda clip: clip["hash_name"]) for name, part in parts.items()}


def read_test_list(test_list: str, clips: list[dict], why: dict[str, str]) -> set[str]:
    """The hash names in a list of test clips. Raises ManifestError naming those not in `clips`.

    why: hash_name -> what kept it from being in `clips`.
    """
    names = {Path(row["audio_filepath"]).stem for row in read_rows(test_list, ["audio_filepath"])}
    missing = sorted(names - {clip["hash_name"] for clip in clips})
    if missing:
        lines = [f"  {name}: {why.get(name, 'not in the metadata')}" for name in missing]
        if len(lines) > data.SHOWN:
            lines[data.SHOWN :] = [f"  ... and {len(lines) - data.SHOWN:,} more"]
        raise ManifestError(
            f"{test_list}: {len(missing):,} of its {len(names):,} clips are not to be had\n"
            + "\n".join(lines)
        )
    return names


# ---- command line --------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--audio", metavar="DIR", required=True, help="the folder of clips, with subfolders")
    add("--metadata", metavar="FILE", required=True, help="the tab-separated list of clips")
    add("--out", metavar="DIR", default=str(OUT), help="default: data/fair_speech")
    add("--test_list", metavar="FILE", help="take this list's clips as test set (JSON lines)")
    add("--seed", metavar="N", type=int, default=0, help="of the split (default: 0)")
    add(
        "--max_seconds",
        metavar="F",
        type=float,
        default=17.5,
        help="leave out longer clips (default: %(default)s, as in the original)",
    )
    add(
        "--max_bad",
        metavar="N",
        type=int,
        default=0,
        help="go on without up to N rows that cannot be used (default: 0; the one empty "
        "transcription of the released file is left out without being counted)",
    )
    return parser


def main() -> int:
    args = arguments().parse_args()
    metadata, out = Path(args.metadata), Path(args.out)
    refuse_overwriting(out)

    rows, bad = read_metadata(metadata)
    clips, bad_audio = add_audio(rows, Path(args.audio), out)
    bad += bad_audio
    listing = settle(metadata, bad, args.max_bad)
    long = [clip for clip in clips if clip["duration"] > args.max_seconds]
    clips = [clip for clip in clips if clip["duration"] <= args.max_seconds]

    names = set()
    if args.test_list:
        why = {row.row["hash_name"]: f"{metadata}:{row.line}: {row.reason}" for row in bad}
        why |= {clip["hash_name"]: f"lasts {clip['duration']:.2f} s" for clip in long}
        names = read_test_list(args.test_list, clips, why)
    parts = split_clips(clips, args.seed, names)

    original = {row["hash_name"]: row["transcription"] for _, row in rows}
    changed = sum(clip["text"] != original[clip["hash_name"]] for clip in clips)
    left_out = {f"over {args.max_seconds:g} s": long, "unusable": [row.row for row in bad]}
    test = f"the {len(names):,} clips of {Path(args.test_list).name}" if names else "drawn"
    report = "\n".join(
        [
            "# Fair-Speech, prepared by data/prepare_fair_speech.py",
            "",
            f"Metadata {metadata.name}, SHA-256 {data.fingerprint(metadata)}.",
            f"Test set {test}; seed {args.seed}. Percentages are of the column they stand in.",
            f"Normalisation changed {changed:,} of {len(clips):,} texts.",
            "",
            summary(parts | left_out, list(reversed(LABELS))),
            "",
            f"Unusable rows: {len(listing)}",
            *(f"- {line}" for line in listing),
        ]
    )
    print(report)
    files = {f"{name}.jsonl": json_lines(part) for name, part in parts.items()}
    write(out, files | {"summary.md": report + "\n"})

    print("\nwritten: " + ", ".join(str(out / name) for name in [*files, "summary.md"]))
    which = f"--manifest {shlex.quote(str(out / 'train.jsonl'))} " if out.resolve() != OUT else ""
    print(f"next: python train.py {which}--independent_space --balance_param 0.1")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
