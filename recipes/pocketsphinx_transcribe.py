"""A recogniser that is not ours: PocketSphinx transcribes a manifest, for evaluate.py to audit.

    python recipes/pocketsphinx_transcribe.py data/speechocean762/test.jsonl --out hyps.jsonl

Writes the manifest's rows plus `pred_text`, as JSON lines in the manifest's order. It uses the US
English model inside the package (`pip install pocketsphinx`) with the package's settings, except
that at most 3,000 hidden Markov models are active in a frame instead of 30,000: a third faster.
Interrupted, the same command goes on where it was.

Another system is audited the same way: whatever writes such a file will do.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairasr_min import data, runtime  # noqa: E402
from fairasr_min.audio import AudioError, read_audio  # noqa: E402

_decoder = None  # of this process


def begin() -> None:
    """Load the model, once a process."""
    global _decoder
    import pocketsphinx

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process above
    torch.set_num_threads(1)  # --jobs says how many cores
    _decoder = pocketsphinx.Decoder(maxhmmpf=3000, loglevel="ERROR")


def transcribe(u: data.Utterance) -> str | AudioError:
    try:
        segment = () if u.offset is None else (u.offset, u.seconds)
        waveform = read_audio(u.path, *segment)
    except AudioError as error:  # as a value: raised here, it would arrive as a traceback
        return error
    pcm = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()
    # The front end's estimate of the noise would stay for the next utterance, and texts would
    # depend on what was transcribed before.
    _decoder.reinit_feat()
    _decoder.start_utt()
    _decoder.process_raw(pcm, full_utt=True)  # cepstral means are those of this utterance
    _decoder.end_utt()
    best = _decoder.hyp()
    return best.hypstr if best else ""


def done_before(path: Path, utterances: list[data.Utterance]) -> int:
    """How many utterances an earlier run has written; half a line at the end is cut off.
    Raises UserError if they are of another manifest."""
    if not path.exists():
        return 0
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        for row in rows:
            row.pop("pred_text")
    except (ValueError, KeyError, TypeError, AttributeError):
        rows = [None]  # of nobody
    if rows != [u.row for u in utterances[: len(rows)]]:
        raise runtime.UserError(f"{path} is of another manifest; delete it, or give another --out")
    with open(path, "r+b") as file:
        file.truncate(len(whole) + 1 if rows else 0)
    return len(rows)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("manifest", metavar="MANIFEST")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    p.add_argument("--audio_root", metavar="DIR", help="where audio with foreign paths lies")
    p.add_argument("--jobs", type=runtime.at_least(1), default=1, metavar="N", help="processes")
    args = p.parse_args()
    try:
        version = importlib.metadata.version("pocketsphinx")
    except importlib.metadata.PackageNotFoundError:
        raise runtime.UserError("no pocketsphinx here: pip install pocketsphinx") from None
    utterances, bad = data.read_manifest(args.manifest, args.audio_root, "optional")
    utterances = data.settle(args.manifest, utterances, bad)

    # Under another name until complete: half a corpus audited by mistake would look like a result.
    unfinished = args.out.with_name(f"{args.out.name}.unfinished")
    if args.out.exists():
        raise runtime.UserError(f"{args.out} is there already; delete it, or give another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left = utterances[done_before(unfinished, utterances) :]
    hours = sum(u.seconds for u in left) / 3600
    print(f"PocketSphinx {version}: {len(left):,} utterances to transcribe, {hours:.2f} h")
    start = time.monotonic()
    # spawn: forking a process that has threads may hang
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), begin)
    try:
        with open(unfinished, "a", encoding="utf-8") as file:
            texts = tqdm(
                pool.map(transcribe, left), total=len(left), unit=" clips",
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
            for u, text in zip(left, texts, strict=True):
                if isinstance(text, AudioError):
                    raise text
                file.write(json.dumps({**u.row, "pred_text": text}, ensure_ascii=False) + "\n")
                file.flush()
    except BrokenProcessPool:
        raise runtime.UserError("a decoding process was killed; the same command goes on") from None
    except KeyboardInterrupt:
        raise runtime.UserError("interrupted; the same command goes on") from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one here would leave processes
        pool.shutdown(cancel_futures=True)
    unfinished.replace(args.out)
    print(f"{args.out}: {(time.monotonic() - start) / 60:.1f} minutes with {args.jobs} process(es)")
    return 0


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError))
