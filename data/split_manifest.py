"""Cut a manifest into train, dev and test.

    python data/split_manifest.py MANIFEST --out DIR --stratify gender age_group --disjoint speaker

--stratify gives every split its share of each group, jointly over the columns; --disjoint keeps
all utterances of one speaker in one split; --test_where split=test keeps a corpus's own test part
and cuts only dev out of the rest. No audio is read. Rows keep their columns and their order;
relative paths are rewritten to hold from DIR.

In the order you meet them: sampling, files and tables (both also used by prepare_fair_speech.py),
this script's own steps, command line.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairasr_min import data
from fairasr_min.data import ManifestError

SPLITS = ("train", "dev", "test")
KEYS = {"audio_filepath": str, "duration": (int, float)}  # of a manifest row, as needed here

# ---- sampling ------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What goes to one split as a whole: an utterance, or all those of one speaker."""

    name: str
    stratum: tuple[str, ...]  # its label in each of the columns to stratify by, "" if missing
    rows: list[dict]


def random_number(*what) -> int:
    """A big random number that depends on `what` alone: on no generator, order, or version."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, what)).encode()).digest())


def take(units: list[Unit], share: float, *seed) -> tuple[list[Unit], list[Unit]]:
    """Systematic sampling -> (the units taken, the rest).

    The units stand in line by stratum, in random order inside. Whoever walks along takes a unit
    whenever the utterances taken fall half that unit behind `share` of the utterances passed;
    how far behind the walk starts is random. So utterances, as units, give exactly
    round(share * all of them), and every stratum its expected number rounded up or down; so does
    every group of the first column, whose strata stand together. With speakers as units, the same
    holds to within the largest speaker.
    """
    if not units:
        return [], []
    total = sum(len(unit.rows) for unit in units)
    goal = round(share * total)
    # From half a unit of average size behind to half a unit ahead. Counted in utterances * total,
    # that is in whole numbers: no rounding error can shift a count.
    start = random_number(*seed) % len(units) - len(units) // 2
    behind = start * total**2 // len(units) ** 2
    taken, rest = [], []
    for unit in sorted(units, key=lambda u: (u.stratum, random_number(*seed, u.name))):
        behind += len(unit.rows) * goal
        if 2 * behind >= len(unit.rows) * total:
            behind -= len(unit.rows) * total
            taken.append(unit)
        else:
            rest.append(unit)
    return taken, rest


def split(
    units: list[Unit], fractions: tuple[float, float, float], seed: int, test: list[Unit] = ()
) -> dict[str, list[dict]]:
    """Rows of train, dev and test: test out of all units (unless given), then dev out of the rest.

    The fractions are in this order. A split of fraction 0 is left out; ManifestError if another
    one gets nothing.
    """
    train_share, dev_share, test_share = fractions
    rest = units
    if not test:
        test, rest = take(units, test_share, seed, "test")
    dev, train = take(rest, dev_share / (train_share + dev_share), seed, "dev")
    parts = {}
    for name, part, share in zip(SPLITS, (train, dev, test), fractions):
        if part:
            parts[name] = [row for unit in part for row in unit.rows]
        elif share > 0:
            raise ManifestError(
                f"{name} would be empty: {len(units)} utterances (or speakers) are too few to split"
            )
    return parts


# ---- files and tables ----------------------------------------------------------------------------


def read_rows(manifest: str | Path, keys=tuple(KEYS)) -> list[dict]:
    """Rows of a file of JSON lines. Raises ManifestError naming file, line and reason."""
    rows = []
    try:
        with open(manifest, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ManifestError(f"{manifest}:{number}: not JSON ({error})") from None
                for key in keys:
                    if not isinstance(row, dict) or not isinstance(row.get(key), KEYS[key]):
                        raise ManifestError(f"{manifest}:{number}: no {key}")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{manifest}: cannot be read ({error})") from None
    if not rows:
        raise ManifestError(f"{manifest}: holds no rows; expected JSON lines, one utterance each")
    return rows


def refuse_overwriting(out: Path) -> None:
    """ManifestError if there are manifests in `out`: runs may rest on them."""
    if out.exists() and not out.is_dir():
        raise ManifestError(f"--out {out} is a file; name a folder")
    there = [f"{name}.jsonl" for name in SPLITS if (out / f"{name}.jsonl").exists()]
    if there:
        raise ManifestError(
            f"--out {out} already holds {', '.join(there)}; delete them or name another --out"
        )


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(out: Path, files: dict[str, str]) -> None:
    """Write files by name, each whole or not at all. Raises ManifestError, e.g. on a full disk."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / f"{name}.unfinished").write_text(content, encoding="utf-8")
        for name in reversed(files):  # the first, train.jsonl, last: the scripts look for it
            os.replace(out / f"{name}.unfinished", out / name)
    except OSError as error:
        for name in files:
            if out.is_dir():
                (out / f"{name}.unfinished").unlink(missing_ok=True)
        raise ManifestError(f"--out {out} could not be written ({error})") from None


def table(rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as text; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def summary(parts: dict[str, list[dict]], columns: list[str], distinct: str | None = None) -> str:
    """Two tables: size of each part (splits, what was left out); its groups, counted by column.

    distinct: a column whose values are counted in the first table.
    """
    sizes = [["", "utterances", "hours", *([f"{distinct}s"] if distinct else [])]]
    for name, rows in parts.items():
        hours = sum(row.get("duration", 0) for row in rows) / 3600
        sizes.append([name, f"{len(rows):,}", f"{hours:.2f}"])
        if distinct:
            sizes[-1].append(f"{len({data.label_of(row, distinct) for row in rows}):,}")
    groups = [["column", "group", *parts]]
    for column in columns:
        counts = {
            name: Counter(data.label_of(row, column) or "(missing)" for row in rows)
            for name, rows in parts.items()
        }
        for group in sorted(set().union(*counts.values()), key=_in_order):
            shares = [f"{n[group]:,} ({_percent(n[group], n.total())})" for n in counts.values()]
            groups.append([column, group, *shares])
    return "\n\n".join(table(rows) for rows in (sizes, groups) if len(rows) > 1)


def _in_order(group: str) -> str:
    return group.zfill(9) if group.isdigit() else group  # ages: 9 before 10


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


# ---- this script's own steps ---------------------------------------------------------------------


def make_units(rows: list[dict], stratify: list[str], disjoint: str | None) -> list[Unit]:
    """Utterances, or speakers with the stratum that most of their utterances are in.

    Raises ManifestError if a row has no speaker: nobody could tell where it may go.
    """

    def stratum(row):
        return tuple(data.label_of(row, column) or "" for column in stratify)

    if disjoint is None:
        return [Unit(json.dumps(row, sort_keys=True), stratum(row), [row]) for row in rows]
    by_speaker = {}
    for row in rows:
        by_speaker.setdefault(data.label_of(row, disjoint), []).append(row)
    if None in by_speaker:
        first = by_speaker[None][0]["audio_filepath"]
        raise ManifestError(
            f"--disjoint {disjoint}: {len(by_speaker[None]):,} rows have none, first {first}"
        )
    units = []
    for speaker, theirs in by_speaker.items():
        counts = Counter(map(stratum, theirs))
        units.append(Unit(speaker, max(sorted(counts), key=counts.get), theirs))
    return units


def own_test(rows: list[dict], where: str) -> tuple[list[dict], list[dict]]:
    """--test_where COLUMN=VALUE -> (rows of the corpus's own test part, all others)."""
    column, _, value = where.partition("=")
    test = [row for row in rows if data.label_of(row, column) == value]
    if not test or len(test) == len(rows):
        values = sorted({data.label_of(row, column) or "(missing)" for row in rows})
        raise ManifestError(
            f"--test_where {where}: {len(test)} of {len(rows):,} rows; "
            f"values of {column!r} are: {', '.join(values[: data.SHOWN])}"
        )
    return test, [row for row in rows if data.label_of(row, column) != value]


def rebase(name: str, old: Path, new: Path) -> str:
    """A path that is relative to one manifest's folder, for a manifest in another.

    Absolute paths, and those found elsewhere (--audio_root), stay as they are.
    """
    place = old / name
    if os.path.isabs(name) or not place.exists():
        return name
    # Real folders: ".." after a link leads elsewhere. The clip itself may be a link.
    return os.path.relpath(Path(os.path.realpath(place.parent)) / place.name, os.path.realpath(new))


# ---- command line --------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", help="JSON lines, one utterance each")
    add("--out", metavar="DIR", required=True, help="gets train.jsonl, dev.jsonl, test.jsonl")
    add("--stratify", metavar="COL", nargs="+", default=[], help="columns, the main one first")
    add("--disjoint", metavar="COL", help="usually speaker: no value is in two splits")
    add(
        "--fractions",
        metavar=("TRAIN", "DEV", "TEST"),
        nargs=3,
        type=float,
        default=(0.8, 0.1, 0.1),
        help="of the utterances; 0 for a split that is not wanted (default: 0.8 0.1 0.1)",
    )
    add(
        "--test_where",
        metavar="COL=VALUE",
        help="these rows are the test set; train and dev share the rest as in --fractions",
    )
    add("--seed", metavar="N", type=int, default=0, help="default: 0")
    return parser


def check_arguments(args) -> None:
    """ManifestError for values that argparse cannot judge."""
    train, dev, test = args.fractions
    if not (train > 0 and dev >= 0 and test >= 0 and abs(train + dev + test - 1) < 1e-6):
        raise ManifestError("--fractions: three numbers that add up to 1, the first above 0")
    if args.test_where and "=" not in args.test_where:
        raise ManifestError(f"--test_where {args.test_where}: expected COLUMN=VALUE")


def main() -> int:
    args = arguments().parse_args()
    check_arguments(args)
    manifest, out = Path(args.manifest), Path(args.out)
    refuse_overwriting(out)

    rows = read_rows(manifest)
    columns = [*args.stratify, args.disjoint, (args.test_where or "").partition("=")[0]]
    data.require_columns(manifest, rows, [column for column in columns if column])

    test = []
    if args.test_where:
        own, rest = own_test(rows, args.test_where)
        test = make_units(own, args.stratify, args.disjoint)
        units = make_units(rest, args.stratify, args.disjoint)
        both = {unit.name for unit in test} & {unit.name for unit in units}
        if args.disjoint and both:
            raise ManifestError(
                f"--test_where {args.test_where}: {len(both)} values of {args.disjoint!r} are also "
                f"in the other rows ({', '.join(sorted(both)[:5])}); leave one of the two away"
            )
    else:
        units = make_units(rows, args.stratify, args.disjoint)
    parts = split(units, args.fractions, args.seed, test)

    groups = dict.fromkeys([*args.stratify, *data.group_columns(rows)])
    print(summary(parts, list(groups), args.disjoint) + "\n")
    if not args.disjoint and any(data.label_of(row, "speaker") for row in rows):
        print("note: the same speakers are in several splits; --disjoint speaker keeps them apart")

    place = {id(row): i for i, row in enumerate(rows)}
    files = {}
    for name, part in parts.items():
        part.sort(key=lambda row: place[id(row)])  # as in the manifest
        for row in part:
            row["audio_filepath"] = rebase(row["audio_filepath"], manifest.parent, out)
        files[f"{name}.jsonl"] = json_lines(part)
    write(out, files)
    print("written: " + ", ".join(str(out / name) for name in files))
    print(f"next: python -m fairasr_min.data check {out / 'train.jsonl'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
