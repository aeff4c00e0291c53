"""The manifest, its checks, and batches.

A manifest is a file of JSON lines, one utterance each: `audio_filepath`, `text`, `duration` in
seconds, optionally `speaker`, and any other column. A demographic group is a column.

    python -m fairasr_min.data check FILE      names every bad row: file, line, reason

Shapes: B batch, S samples at 16 kHz, L label columns, U target units.
"""

import argparse
import bisect
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fairasr_min.audio import (
    HOP,
    SAMPLE_RATE,
    AudioError,
    at_16_khz,
    audio_seconds,
    decode_audio,
    loudest_sample,
    pad_waveforms,
)
from fairasr_min.text import Tokenizer, ctc_min_frames, normalize, printable

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
MOST_SECONDS = 3600.0  # a longer "utterance" is a mistake in the manifest
SHOWN = 20  # bad rows named in one message
LONG = 500  # characters of one reason
MANY_VALUES = 50  # a label column with more values is probably not a group
NOT_GROUPS = {"audio_filepath", "text", "duration", "offset", "synthetic", "pred_text"}


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names file, line and reason."""


@dataclass(slots=True)
class Utterance:
    row: dict  # the manifest row as it stands in the file
    line: int
    path: str
    text: str  # normalised
    seconds: float
    offset: float | None = None  # start inside a longer recording (NeMo's manifests)


class BadRow(NamedTuple):
    line: int
    reason: str
    row: dict


# ---- reading and checking ------------------------------------------------------------------------


def read_manifest(
    manifest: str | Path,
    audio_root: str | Path | None = None,
    text: str = "required",
    show_progress: bool = True,
) -> tuple[list[Utterance], list[BadRow]]:
    """Every usable utterance of a manifest, and every bad row with its reason.

    text: "required" (some words), "optional" (the key must be there; no words are silence), or
    "unused". All audio is decoded once, in parallel: what cannot be decoded is known before the
    first step, not after a night.
    Raises ManifestError if the file cannot be read or holds no row.
    """
    manifest = Path(manifest)
    utterances, bad = [], []
    try:
        with open(manifest, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _read_row(line, number, manifest, audio_root, text, utterances, bad)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{manifest}: cannot be read ({error}); UTF-8 is expected") from None
    if not utterances and not bad:
        raise ManifestError(f"{manifest}: holds no rows; expected JSON lines, one utterance each")
    utterances = _without_repeats(utterances, bad)

    def problems_of(part):
        return [_audio_problem(u, may_be_silent=text == "optional" and not u.text) for u in part]

    parts = [utterances[i : i + 100] for i in range(0, len(utterances), 100)]
    quiet = not (show_progress and sys.stderr.isatty())
    bar = tqdm(desc=f"checking {manifest.name}", total=len(utterances), unit=" clips",
               leave=False, disable=quiet)  # fmt: skip
    problems = []
    with ThreadPoolExecutor() as pool, bar:
        for found in pool.map(problems_of, parts):
            problems += found
            bar.update(len(found))
    bad += [BadRow(u.line, why, u.row) for u, why in zip(utterances, problems) if why]
    return [u for u, why in zip(utterances, problems) if not why], sorted(bad, key=lambda b: b.line)


def _without_repeats(utterances: list[Utterance], bad: list[BadRow]) -> list[Utterance]:
    """The first row of each recording, or of each part of one; the others are appended to bad."""
    first, left = {}, []
    for u in utterances:
        recording = u.path if u.offset is None else (u.path, u.offset, u.seconds)
        line = first.setdefault(recording, u.line)
        if line == u.line:
            left.append(u)
        else:
            bad.append(BadRow(u.line, f"the same audio as line {line}", u.row))
    return left


def _interned(pairs: list[tuple]) -> dict:
    """A JSON object whose keys and short values are shared by all rows: half the memory."""
    return {
        sys.intern(key): sys.intern(value) if type(value) is str and len(value) < 24 else value
        for key, value in pairs
    }


def _read_row(line, number, manifest, audio_root, text, utterances, bad):
    """Parse one line; append to utterances or to bad."""
    try:
        row = json.loads(line, object_pairs_hook=_interned)
        if "\\u" in line:  # half of a surrogate pair could not be written again
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        bad.append(BadRow(number, f"not JSON ({error})", {}))
        return
    if not isinstance(row, dict):
        bad.append(BadRow(number, f"expected a JSON object, found {type(row).__name__}", {}))
        return

    def refuse(reason):
        bad.append(BadRow(number, reason, row))

    name, seconds, words = row.get("audio_filepath"), row.get("duration"), row.get("text", "")
    if not isinstance(name, str) or not name:
        return refuse("no audio_filepath")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return refuse("no duration (a number, in seconds)")
    if not 0 < seconds <= MOST_SECONDS:  # also catches NaN
        return refuse(
            f"absurd duration {seconds!r:.40}; over 0, at most {MOST_SECONDS:.0f} s are expected"
        )
    offset = row.get("offset")
    if offset is not None and (
        isinstance(offset, bool) or not isinstance(offset, int | float) or not 0 <= offset < 1e9
    ):
        return refuse(f"offset {offset!r:.40} is not a number of seconds")
    if text != "unused":
        if not isinstance(row.get("text"), str):
            return refuse("no text")
        words = normalize(words)
        if text == "required" and not words:
            return refuse("empty text")
    path, looked = _find_audio(name, manifest.parent, audio_root)
    if path is None:
        return refuse(f"no audio file at {' or '.join(looked)}")
    utterances.append(
        Utterance(row, number, path, words if text != "unused" else "", float(seconds), offset)
    )


def _find_audio(name, folder, audio_root):
    """Absolute, beside the manifest, under audio_root, or by its bare name under audio_root."""
    places = [os.path.join(folder, name)]  # an absolute name replaces the folder
    if audio_root is not None:
        places += [os.path.join(audio_root, name)] if not os.path.isabs(name) else []
        places += [os.path.join(audio_root, os.path.basename(name))]
    places = [str(Path(place)) for place in places]  # ./a.wav is a.wav
    for place in places:
        if os.path.isfile(place):
            return place, places
    return None, places


def _audio_problem(utterance: Utterance, may_be_silent: bool) -> str | None:
    """Why the audio cannot be used, or None; then `seconds` is set to what the file holds."""
    try:
        real = audio_seconds(utterance.path)
    except AudioError as error:
        return str(error)
    stated, start = utterance.seconds, utterance.offset or 0.0
    if utterance.offset is not None and start + stated > real + 0.1:
        return f"ends at {start + stated:.2f} s but {utterance.path} lasts {real:.2f} s"
    if utterance.offset is None and abs(stated - real) > max(0.1, 0.02 * real):
        return f"duration says {stated:.2f} s but {utterance.path} lasts {real:.2f} s"
    there = real if utterance.offset is None else min(stated, real - start)
    if round(there * SAMPLE_RATE) < HOP:
        return f"{there * 1000:.1f} ms of audio; less than one frame of 10 ms"
    try:
        segment = () if utterance.offset is None else (start, stated)
        loudest = loudest_sample(utterance.path, *segment)
    except AudioError as error:
        return str(error)
    if loudest == 0 and not may_be_silent:
        return f"{utterance.path}: digital silence, every sample is 0 (mean of its channels)"
    utterance.seconds = there
    return None


def check_targets(
    utterances: list[Utterance],
    encode: Callable[[str], list[int]],
    samples_to_frames: Callable[[int], int],
    unknown: int | None = None,
) -> list[BadRow]:
    """The utterances that CTC cannot learn: text outside of the units (the id `unknown` stands for
    it), or more units than encoder frames to put them on."""
    bad = []
    for u in utterances:
        ids = encode(u.text)
        need = ctc_min_frames(ids)
        have = samples_to_frames(round(u.seconds * SAMPLE_RATE))
        if unknown in ids:
            letters = [c for c in dict.fromkeys(u.text) if unknown in encode(c)]
            bad.append(BadRow(u.line, f"text has {', '.join(letters)}: not in the units", u.row))
        elif need > have:
            bad.append(BadRow(u.line, f"text needs {need} frames for CTC, audio has {have}", u.row))
    return bad


def settle(
    manifest: str | Path,
    utterances: list[Utterance],
    bad: list[BadRow],
    max_bad: int = 0,
    say: Callable[[str], None] = print,
) -> list[Utterance]:
    """Go on without up to max_bad bad rows, listed and counted by group; else ManifestError."""
    if not bad:
        return utterances
    listing = [f"  {manifest}:{b.line}: {printable(b.reason)[:LONG]}" for b in bad[:SHOWN]]
    if len(bad) > SHOWN:
        listing.append(f"  ... and {len(bad) - SHOWN:,} more (python -m fairasr_min.data check)")
    if len(bad) > max_bad:
        total = len({b.line for b in bad} | {u.line for u in utterances})
        lines = [f"{manifest}: {len(bad):,} of {total:,} rows cannot be used", *listing]
        lines.append(f"Mend or delete them, or go on without them: --max_bad {len(bad)}")
        raise ManifestError("\n".join(lines))
    lines_out = {b.line for b in bad}
    left = [u for u in utterances if u.line not in lines_out]
    if not left:
        raise ManifestError("\n".join([f"{manifest}: no usable row is left", *listing]))
    say("\n".join([f"{manifest}: going on without {len(bad):,} bad rows", *listing]))
    for line in count_by_group([b.row for b in bad], [u.row for u in utterances]):
        say(line)
    return left


def count_by_group(rows: list[dict], among: list[dict]) -> list[str]:
    """Lines such as "  gender: female 3, male 1": what a removal takes from whom."""
    lines = []
    for column in group_columns(among):
        counts = Counter(label_of(row, column) or "(missing)" for row in rows)
        lines.append(f"  {column}: " + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
    return lines


# ---- groups --------------------------------------------------------------------------------------


def label_of(row: dict, column: str) -> str | None:
    """The group of a row: a string, or None where it is absent, null, NaN or empty.

    "a+b" crosses two columns: their values joined, None if either is missing. Numbers are written
    one way: 30, 30.0 and "30" are one group.
    """
    values = []
    for name in column.split("+"):
        value = row.get(name)
        if isinstance(value, bool):
            value = str(value).lower()  # as it stands in the file
        elif isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas turns whole numbers into 30.0 where one is missing
        if value is None or value != value or str(value).strip() == "":  # NaN is not itself
            return None
        values.append(str(value).strip())
    return " + ".join(values)


def bin_of(value, edges: list[float]) -> str | None:
    """The bin of a number: with the edges 0, 18, 66, "0-17" or "18-65" or "66+". None if the value
    is no number. A bin holds its lower edge, and what lies between 17 and 18 too."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if value != value:
        return None
    names = [f"{edge:g}" for edge in edges]
    place = bisect.bisect_right(edges, value)
    if place == 0:
        return f"under {names[0]}"
    if place == len(edges):
        return f"{names[-1]}+"
    upper = edges[place]
    whole = all(float(edge).is_integer() for edge in edges)
    return f"{names[place - 1]}-{upper - 1:g}" if whole else f"{names[place - 1]} to {upper:g}"


def group_columns(rows: list[dict]) -> list[str]:
    """Columns that look like groups: 2 to 50 distinct values, fewer than rows; not `speaker`."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = []
    for name in names:
        if name in NOT_GROUPS or name in ("speaker", "cluster"):
            continue
        values = {label_of(row, name) for row in rows} - {None}
        if 2 <= len(values) <= MANY_VALUES and len(values) < len(rows):
            found.append(name)
    return found


def describe(utterances: list[Utterance]) -> dict[str, dict[str, dict]]:
    """Utterances and hours of each group of each column that looks like groups."""
    found = {}
    for column in group_columns([u.row for u in utterances]):
        groups = {}
        for u in utterances:
            group = groups.setdefault(label_of(u.row, column) or "(missing)", [0, 0.0])
            group[0] += 1
            group[1] += u.seconds / 3600
        found[column] = {k: {"utterances": n, "hours": h} for k, (n, h) in sorted(groups.items())}
    return found


def require_columns(manifest: str | Path, rows: list[dict], columns: list[str]) -> None:
    """ManifestError if one of `columns` is in no row (the message lists those there are), or holds
    lists or objects, which are no groups."""
    names = dict.fromkeys(name for row in rows for name in row)
    for column in columns:
        for name in column.split("+"):
            if name not in names:
                there = ", ".join(n for n in names if n not in NOT_GROUPS) or "none"
                raise ManifestError(f"{manifest}: no column {name!r}; columns there are: {there}")
            for row in rows:
                if isinstance(value := row.get(name), list | dict):
                    raise ManifestError(
                        f"{manifest}: column {name!r} holds {json.dumps(value)[:80]}; "
                        "groups are words or numbers"
                    )


def label_values(
    manifest: str | Path,
    utterances: list[Utterance],
    columns: list[str],
    say: Callable[[str], None] = print,
) -> dict[str, list[str]]:
    """The sorted values of each label column.

    Raises ManifestError for an unknown column, for one with fewer than two values, and for one
    with another value in every row.
    """
    require_columns(manifest, [u.row for u in utterances], columns)
    values = {}
    for column in columns:
        labels = [label_of(u.row, column) for u in utterances]
        values[column] = sorted(set(labels) - {None})
        if len(values[column]) < 2:
            raise ManifestError(
                f"{manifest}: column {column!r} has {len(values[column])} value(s); telling "
                "groups apart needs two or more (--label names another, --balance_param 0 none)"
            )
        if len(values[column]) == len(labels) - labels.count(None):
            raise ManifestError(
                f"{manifest}: column {column!r} has another value in every row: not a group"
            )
        if len(values[column]) > MANY_VALUES:
            say(f"warning: column {column!r} has {len(values[column])} values; is it a group?")
        if missing := labels.count(None):
            say(f"{column}: {missing:,} of {len(labels):,} utterances unlabelled, left out of FSC")
    return values


def label_ids(utterances: list[Utterance], values: dict[str, list[str]]) -> torch.Tensor:
    """Labels as integers, (N, L) for L columns: places in `values`, -1 for any other or missing."""
    places = {column: {value: i for i, value in enumerate(v)} for column, v in values.items()}
    ids = [[p.get(label_of(u.row, c), -1) for c, p in places.items()] for u in utterances]
    return torch.tensor(ids, dtype=torch.long).view(len(utterances), len(values))


def drop_long(
    utterances: list[Utterance], max_seconds: float, say: Callable[[str], None] = print
) -> list[Utterance]:
    """Leave out utterances over max_seconds, saying how many of whom."""
    kept = [u for u in utterances if u.seconds <= max_seconds]
    if len(kept) < len(utterances):
        dropped = [u.row for u in utterances if u.seconds > max_seconds]
        say(f"left out {len(dropped):,} of {len(utterances):,} utterances over {max_seconds} s:")
        for line in count_by_group(dropped, [u.row for u in utterances]):
            say(line)
    if not kept:
        raise ManifestError(f"no utterance lasts at most {max_seconds} s; raise --max_seconds")
    return kept


def fingerprint(file: str | Path) -> str:
    """SHA-256 of a manifest or model file: a run goes on with what it began with, or not at all.
    Raises ManifestError."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ManifestError(f"{file}: cannot be read ({error.strerror})") from None


def default_corpus(say: Callable[[str], None] = print) -> Path:
    """The folder that bare commands use: Fair-Speech if prepared, else the demo corpus, made now
    if need be. Raises ManifestError if it cannot be made."""
    fair_speech, demo = ROOT / "data" / "fair_speech", ROOT / "data" / "demo"
    if (fair_speech / "train.jsonl").exists():
        return _shown(fair_speech)
    say(
        f"corpus: {_shown(demo)}, SYNTHETIC voices: a demo, its numbers say nothing about people\n"
        "  Fair-Speech instead: python data/prepare_fair_speech.py --help\n"
        "  your own data: --manifest FILE"
    )
    if not (demo / "train.jsonl").exists():
        made = subprocess.run([sys.executable, str(ROOT / "data" / "make_demo.py")])
        if made.returncode:
            raise ManifestError("data/make_demo.py failed; its message stands above")
    return _shown(demo)


def _shown(path: Path) -> Path:
    """Relative to where we are, if it lies below: model files record this, not a home folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def is_demo(manifest: str | Path) -> bool:
    """Whether data/make_demo.py made it: small models and few epochs are enough then."""
    return (Path(manifest).parent / "corpus.json").exists()


def is_synthetic(utterances: list[Utterance]) -> bool:
    return any(u.row.get("synthetic") for u in utterances)


# ---- batches -------------------------------------------------------------------------------------


class Batches:
    """The batches of every epoch, a pure function of (seed, epoch).

    Utterances of similar length go together: sorted by a duration that is jittered anew each
    epoch (by up to 5 %), cut into batches, the batches shuffled. No utterance is left out or
    repeated. By count, batch sizes differ by one at most, so that there is no small last batch;
    by seconds, a batch holds at most about that much audio, padding included, and its size is one
    of few (of three binary digits: 4, 5, 6, 7, 8, 10, ...), since a GPU is slow with a shape that
    it meets for the first time. Sizes count all processes together: a batch has at least one
    utterance for each. The longest batch opens epoch 0, so that memory runs out at once or not at
    all.
    """

    JITTER = 0.05

    def __init__(
        self, seconds, batch_size: int, seed: int, world: int = 1, batch_seconds=None, smallest=1
    ):
        """batch_size, batch_seconds: of one process. smallest: fewest utterances of any batch.
        Raises ManifestError: too few utterances."""
        self.seconds, self.seed = np.asarray(seconds, dtype=np.float64), seed
        n, smallest = len(self.seconds), max(smallest, world)
        if n < smallest:
            raise ManifestError(f"{n} utterance(s): too few; a batch needs {smallest}")
        if batch_seconds:
            longest, sizes, done = np.sort(self.seconds)[::-1], [], 0
            while done < n:  # longest first, as in a batch
                size = int(batch_seconds // longest[done])  # of one process
                size -= size % (1 << max(0, size.bit_length() - 3))
                sizes.append(min(max(size * world, smallest), n - done))
                done += sizes[-1]
            if len(sizes) > 1 and sizes[-1] < smallest:
                leftover = sizes.pop()  # first: it moves what [-2] means
                sizes[-1] += leftover
        else:
            count = min(math.ceil(n / (batch_size * world)), n // smallest)
            sizes = [len(part) for part in np.array_split(np.empty(n), count)]
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Arrays of indices, one a batch."""
        random = np.random.default_rng([self.seed, epoch, 0])
        jitter = random.uniform(1 - self.JITTER, 1 + self.JITTER, len(self.seconds))
        jitter[self.seconds.argmax()] = 1 + self.JITTER  # the longest stays the longest
        order = np.argsort(-self.seconds * jitter, kind="stable")
        batches = np.split(order, np.cumsum(self.sizes)[:-1])
        shuffled = random.permutation(len(batches))
        if epoch == 0:
            shuffled = np.concatenate([[0], shuffled[shuffled != 0]])
        return [batches[i] for i in shuffled]


@dataclass
class Batch:
    index: list[int]  # of each utterance in the data set
    waveforms: torch.Tensor  # (B, S), zero-padded
    n_samples: torch.Tensor  # (B,)
    labels: torch.Tensor  # (B, L), -1 = unlabelled
    targets: torch.Tensor  # (B, U), zero-padded
    target_lengths: torch.Tensor  # (B,)
    draws: torch.Tensor  # (B, n_draws) uniform in [0, 1), for SpecAugment

    def _map(self, move) -> "Batch":
        return Batch(self.index, *(move(getattr(self, f.name)) for f in fields(self)[1:]))

    def to(self, device) -> "Batch":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(torch.Tensor.pin_memory)


class SpeechDataset(Dataset):
    """Utterances as tensors. An item is asked for by (epoch, index): the random numbers of its
    augmentation are drawn from (seed, epoch, index), and so are the same in any batch, worker or
    process, and after a restart."""

    def __init__(
        self,
        utterances: list[Utterance],
        seed: int = 0,
        labels: torch.Tensor | None = None,
        tokenizer: Tokenizer | None = None,
        n_draws: int = 0,
    ):
        self.utterances, self.seed, self.n_draws = utterances, seed, n_draws
        self.labels = (
            torch.empty(len(utterances), 0, dtype=torch.long) if labels is None else labels
        )
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, key: tuple[int, int]):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list:
        """A batch, which is how a DataLoader asks: files are decoded by as many threads as PyTorch
        computes with (a worker has one). What follows stays in this thread: any other would start
        PyTorch's threads once more."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            audio = pool.map(self._decode, [index for _, index in keys])
            return [self._item(*key, one) for key, one in zip(keys, audio)]

    def _decode(self, index):
        u = self.utterances[index]
        try:
            return decode_audio(u.path, *(() if u.offset is None else (u.offset, u.seconds)))
        except AudioError as error:
            # as a value: raised in a worker, it would arrive as a traceback
            return AudioError(f"{error}. Line {u.line} of the manifest; changed while we ran?")

    def _item(self, epoch, index, audio):
        if isinstance(audio, AudioError):
            return audio
        text = self.utterances[index].text
        ids = self.tokenizer.encode(text) if self.tokenizer else []
        draws = np.random.default_rng([self.seed, epoch, index + 1])  # 0 is that of Batches
        draws = torch.from_numpy(draws.random(self.n_draws, np.float32))
        return index, at_16_khz(*audio), self.labels[index], torch.tensor(ids), draws


def collate(items: list) -> Batch | AudioError:
    """Pad waveforms and targets with zeros at the end."""
    for item in items:
        if isinstance(item, AudioError):
            return item
    index, waveforms, labels, targets, draws = zip(*items)
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        list(index),
        pad_waveforms(waveforms),
        torch.tensor([len(w) for w in waveforms]),
        torch.stack(labels),
        pad([t.long() for t in targets], batch_first=True),
        torch.tensor([len(t) for t in targets]),
        torch.stack(draws),
    )


def leave_signals(worker: int) -> None:
    """For a DataLoader's workers: Ctrl-C and a scheduler's SIGTERM reach them too, but it is the
    process above that decides, and it needs them for the step at hand."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Share:
    """This process's part of each batch, from batch number `start` of the run to `stop`."""

    def __init__(self, batches: Batches, start: int, stop: int, rank: int, world: int):
        self.batches, self.start, self.stop = batches, start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = None
        for number in range(self.start, self.stop):
            if number // len(self.batches) != epoch:
                epoch = number // len(self.batches)
                plan = self.batches.epoch(epoch)
            batch = plan[number % len(self.batches)]
            yield [(epoch, int(i)) for i in batch[self.rank :: self.world]]


def stream(
    dataset: SpeechDataset,
    batches: Batches,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches number start, ..., stop - 1 of a run, counted through all its epochs.

    One stream for the whole run: a restart begins it at the batch where the last save was.
    Raises AudioError for a file that cannot be decoded.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Share(batches, start, stop, rank, world),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # else its making would draw from dropout's random numbers
    )
    for batch in loader:
        if isinstance(batch, AudioError):
            raise batch
        yield batch


# ---- python -m fairasr_min.data check ------------------------------------------------------------


def main() -> int:
    if hasattr(signal, "SIGPIPE"):  # `... | head` ends us quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(prog="python -m fairasr_min.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="name every bad row of a manifest")
    check.add_argument("manifest", metavar="FILE")
    check.add_argument("--audio_root", metavar="DIR", help="where audio with foreign paths lies")
    check.add_argument("--no_text", action="store_true", help="rows need no text (stage 1)")
    args = parser.parse_args()
    text = "unused" if args.no_text else "required"
    try:
        utterances, bad = read_manifest(args.manifest, args.audio_root, text)
    except ManifestError as error:
        print(error, file=sys.stderr)
        return 2
    # Without a model, the units are characters and the encoder's frames last 40 ms.
    if not args.no_text:
        bad += check_targets(utterances, list, lambda n: -(-(n // HOP) // 4))
    for row in bad:
        print(f"{args.manifest}:{row.line}: {printable(row.reason)[:LONG]}")
    refused = {row.line for row in bad}
    good = [u for u in utterances if u.line not in refused]
    hours = sum(u.seconds for u in good) / 3600
    print(f"{args.manifest}: {len(good):,} good rows, {hours:.2f} h; {len(refused):,} bad rows")
    for line in count_by_group([u.row for u in good], [u.row for u in good]):
        print(line)
    if bad:
        print("bad rows by group:")
        for line in count_by_group([b.row for b in bad], [u.row for u in utterances]):
            print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C too
    sys.exit(main())
