"""A long recording in windows against the same recording in one piece.

    python benchmarks/long_audio.py join --manifest data/demo/test.jsonl --seconds 600 --out D
    python benchmarks/long_audio.py measure --model runs/finetune/model.pt --manifest D/test.jsonl

`join` puts utterances in random order, with pauses of 0.2 to 1 s between them, into clips of at
most that length. `measure` transcribes the first clip of a manifest with different windows, each in
a process of its own: CPU seconds, memory, word errors against what was said and against the
text of the recording in one piece (LONGEST inf), and the share of encoder frames whose best class
is another one than there.
"""

import argparse
import json
import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fairasr_min import checkpoint, model, wer  # noqa: E402
from fairasr_min.audio import SAMPLE_RATE, read_audio  # noqa: E402
from fairasr_min.text import ctc_collapse, normalize  # noqa: E402

EDGE = 800  # samples at the end of a demo utterance that are noise alone: the pauses sound like it
SETTINGS = [(math.inf, 0), *((300, c) for c in (0, 1, 5, 20, 60)), (60, 5), (60, 20), (30, 5)]


def rows_of(manifest: Path) -> list[dict]:
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [{**row, "path": manifest.parent / row["audio_filepath"]} for row in rows]


def join(args) -> None:
    draw = torch.Generator().manual_seed(args.seed)
    rows = rows_of(args.manifest)
    args.out.mkdir(parents=True, exist_ok=True)
    clips = []
    for i in torch.randperm(len(rows), generator=draw).tolist():
        waveform = read_audio(rows[i]["path"])
        pause = int(SAMPLE_RATE * (0.2 + 0.8 * torch.rand((), generator=draw)))
        pause = torch.randn(pause, generator=draw) * waveform[-EDGE:].std()
        n = len(waveform) + len(pause)
        if not clips or clips[-1]["n"] + n > args.seconds * SAMPLE_RATE:
            clips.append({"n": 0, "parts": [], "texts": []})
        clips[-1]["n"] += n
        clips[-1]["parts"] += [waveform, pause]
        clips[-1]["texts"].append(rows[i]["text"])
    lines = []
    for i, clip in enumerate(clips):
        name = f"{args.manifest.stem}_{i:04}.wav"
        soundfile.write(args.out / name, torch.cat(clip["parts"]).numpy(), SAMPLE_RATE)
        row = {"audio_filepath": name, "text": " ".join(clip["texts"]), "synthetic": True}
        lines.append(json.dumps({**row, "duration": clip["n"] / SAMPLE_RATE}) + "\n")
    (args.out / args.manifest.name).write_text("".join(lines), encoding="utf-8")
    print(f"{args.out / args.manifest.name}: {len(clips)} clips")


@torch.no_grad()
def transcribe(path, waveform, longest, context) -> tuple[list[int], str, float, float]:
    """Best class of each frame, text, seconds, and by how many GB memory grew at most."""
    recogniser = checkpoint.load_model(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.LONGEST = min(longest, len(waveform) / SAMPLE_RATE)
    model.CONTEXT = context
    start = time.process_time()
    features = recogniser.log_mel(waveform[None], torch.tensor([len(waveform)]))
    best, lengths = model.in_windows(recogniser.best_classes, *features, recogniser.config)
    seconds = time.process_time() - start
    ids = best[0, : int(lengths)].tolist()
    text = normalize(recogniser.tokenizer.decode(ctc_collapse(ids, recogniser.blank)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return ids, text, seconds, grown / 2**20


def measure(args) -> None:
    row = rows_of(args.manifest)[0]
    waveform, said = read_audio(row["path"]), normalize(row["text"])
    print(f"{len(waveform) / SAMPLE_RATE:.0f} s, {len(said.split())} words")
    print("LONGEST CONTEXT | CPU s |    GB | WER, said | WER, one piece | other frames")
    whole = None
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for setting in SETTINGS:
            done = pool.submit(transcribe, args.model, waveform, *setting)
            ids, text, seconds, peak = done.result()
            whole = whole or (ids, text)
            other = sum(a != b for a, b in zip(ids, whole[0], strict=True)) / len(ids)
            rates = (wer.count_errors(true, text).wer for true in (said, whole[1]))
            said_wer, whole_wer = (math.nan if rate is None else rate for rate in rates)
            print(
                f"{setting[0]:7} {setting[1]:7} | {seconds:5.1f} | {peak:5.2f} | "
                f"{said_wer:9.2%} | {whole_wer:14.2%} | {other:.2%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("join")
    one.add_argument("--manifest", type=Path, required=True)
    one.add_argument("--seconds", type=float, default=600)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("measure")
    two.add_argument("--model", required=True)
    two.add_argument("--manifest", type=Path, required=True)
    args = parser.parse_args()
    {"join": join, "measure": measure}[args.command](args)


if __name__ == "__main__":
    main()
