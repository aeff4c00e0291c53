"""Make the demo corpus: SYNTHETIC speech with a planted disparity, spoken by espeak-ng.

    python data/make_demo.py             # data/demo: 2500 train, 240 dev, 640 test utterances

Nobody is recorded and nobody is described. The speakers are settings of a synthesiser, the groups
have neutral names (`group_a`, ...; MEANING below says what they stand for), and one column,
`ethnicity`, carries a disparity that we put there, so that there is something to find, to train
against and to measure. Its group_c is rare in train and has harder voices; dev and test hold equal
thirds, so that it can be measured. The other columns are spread evenly over the groups of
`ethnicity`, so that none of them explains the gap. Small corpora have fewer speakers, at least
three utterances each, and every group keeps at least one speaker in every split.

Sentences, splits, speakers and noise come from the seed alone. The audio does not quite:
espeak-ng's samples differ slightly from call to call, so corpus.json holds their SHA-256.
"""

import argparse
import ctypes
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE = 16_000  # Hz

# ---- who speaks: the constants to tune -----------------------------------------------------------

SPEAKERS = {"train": 104, "dev": 18, "test": 48}  # nobody is in two splits
RARE = {"group_a": 0.62, "group_b": 0.32, "group_c": 0.06}  # share of the speakers, by ethnicity
EVEN = {"group_a": 1 / 3, "group_b": 1 / 3, "group_c": 1 / 3}
SHARE = {"train": RARE, "dev": EVEN, "test": EVEN}
VOICES = {  # ethnicity -> gender -> variants of espeak-ng; no variant is in two groups
    "group_a": {"group_a": ["m1", "m3", "m4", "m5", "m6"], "group_b": ["f1", "f2", "f3", "f4"]},
    "group_b": {
        "group_a": ["m7", "marcelo", "michel", "miguel", "robert"],
        "group_b": ["steph", "belinda", "linda", "aunty"],
    },
    "group_c": {"group_a": ["croak", "whisper"], "group_b": ["grandma", "whisperf"]},
}
RATES = {"group_a": (120, 135), "group_b": (136, 150), "group_c": (151, 165)}  # words a minute
ACCENTS = {  # "en" is espeak-ng's name for British English, en-029 for Caribbean
    "group_a": "en-us",
    "group_b": "en",
    "group_c": "en-gb-x-rp",
    "group_d": "en-gb-scotland",
    "group_e": "en-029",
}
STATUS = ["group_a", "group_b", "group_c"]
PITCH = (35, 65)  # and pitch range, of espeak-ng's 0..99; 50 is the variant's own
SNR = (35.0, 45.0)  # dB of the speech over white noise: digital silence is not speech
EDGE = 0.05  # seconds of noise before and after: espeak-ng starts and stops abruptly

MEANING = {  # column -> value -> what the neutral name stands for
    "age": {group: "speaks {} to {} words a minute".format(*r) for group, r in RATES.items()},
    "gender": {"group_a": "lower pitched voices", "group_b": "higher pitched voices"},
    "first_language": {group: f"accent {accent}" for group, accent in ACCENTS.items()},
    "socioeconomic_bkgd": {group: "assigned at random: a null control" for group in STATUS},
    "ethnicity": {
        group: f"{'the planted one: ' if group == 'group_c' else ''}{RARE[group]:.0%} of the "
        f"speakers in train, voices {', '.join(sum(names.values(), []))}"
        for group, names in VOICES.items()
    },
}

# ---- what is said --------------------------------------------------------------------------------

GRAMMAR = """
sentence: call {name} at {place}, please call {name} and {name} {when},
  set a timer for {number} minutes, set a {food} timer for {number} {unit},
  set an alarm for {time} on {day}, wake me up at {time} {date},
  play {genre} music in the {room}, play some {genre} music for {name}, play {song} by the {band},
  turn the {device} in the {room} {switch}, turn {switch} the {colour} {device} in the {room},
  dim the lights in the {room} to {number} percent, set the {room} to {number} degrees,
  what is the weather in {city} on {day}, will it {weather} in {city} {when},
  send a message to {name} saying {message}, tell {name} that {message},
  remind me to {task} at {time}, remind {name} to {task} {when},
  don't let me forget to {task} on {day}, read my last {digit} messages from {name},
  add {food} and {food} to my {list} list, find a recipe for {food} with {food},
  how far is it from {city} to {city}, book a flight from {city} to {city} on {day},
  book a table for {digit} in {city} {when}, where's the nearest {shop} in {city},
  what's {number} plus {number}
name: alice, anna, ben, carla, daniel, emma, george, hannah, jack, james, julia, kevin, laura, lucy,
  maria, michael, oliver, paul, peter, rachel, robert, sarah, simon, susan, thomas, victor
city: amsterdam, athens, berlin, boston, chicago, dallas, dublin, geneva, houston, lisbon, london,
  madrid, miami, paris, prague, rome, seattle, tokyo, toronto, vienna
day: monday, tuesday, wednesday, thursday, friday, saturday, sunday
date: today, tomorrow, this evening, on {day}, next {day}
when: tonight, in the morning, {date}, {date}, at {time}
digit: two, three, four, five, six, seven, eight, nine
hour: {digit}, {digit}, ten, eleven
time: {hour} o'clock, half past {hour}, quarter to {hour}, {hour} thirty, noon, midnight
tens: twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety
number: {digit}, ten, eleven, twelve, fifteen, {tens}, {tens} {digit}
unit: seconds, minutes, hours
place: home, work, school, the office, the station, the airport, the hotel
room: kitchen, bedroom, bathroom, garage, hall, garden, living room, basement
device: lamp, light, heater, fan, radio, television, oven, printer
switch: on, off
colour: red, blue, green, yellow, white, black, silver
genre: jazz, rock, folk, soul, classical, dance, piano, country
noun: river, road, summer, fire, window, mountain, ocean, dream, shadow
song: {colour} {noun}, my {noun}, {noun} and {noun}
band: tigers, wolves, sailors, strangers, dragons, pilots
weather: rain, snow, be sunny, be cold, be windy
food: apples, bread, butter, cheese, chicken, coffee, fish, honey, milk, onions, pasta, pepper,
  potatoes, rice, salad, soup, sugar, tomatoes
list: shopping, party, holiday
shop: bank, bakery, library, pharmacy, market, museum, cinema
message: i'm on my way, i'm running late, i'll be there {when}, dinner is ready,
  we need more {food}, the {device} is broken, the meeting is at {time}
task: call {name}, pick up {name}, buy {food}, feed the {pet}, water the plants, clean the {room},
  pay the rent, wash the car, visit the {shop}, fix the {device}
pet: cat, dog, horse
"""
SLOTS = {
    line.split(":")[0]: line.split(":")[1].strip().split(", ")
    for line in GRAMMAR.replace("\n  ", " ").strip().split("\n")
}


def generator(seed, purpose):
    """A random generator for one purpose, so that more draws for one do not change another."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def draw_sentence(rng):
    """One sentence of the grammar: slots are filled until none is left."""
    text = "{sentence}"
    while slot := re.search(r"{(\w+)}", text):
        choices = SLOTS[slot[1]]
        text = text[: slot.start()] + choices[rng.integers(len(choices))] + text[slot.end() :]
    return text


def draw_sentences(seed, sizes):
    """split -> sentences, none twice anywhere; dev and test use only words that train has."""
    rng = generator(seed, "sentences")
    seen, sentences = set(), {}
    for split, size in sizes.items():  # train comes first
        known = {word for text in sentences.get("train", []) for word in text.split()}
        sentences[split] = []
        for _ in range(100 * size):
            text = draw_sentence(rng)
            words = text.split()
            long = [word for word in words if len(word) > 3]
            silly = len(set(long)) < len(long)  # "from paris to paris"
            if silly or text in seen or (known and not known.issuperset(words)):
                continue
            seen.add(text)
            sentences[split].append(text)
            if len(sentences[split]) == size:
                break
        else:
            raise ValueError(f"the grammar has no {size} distinct sentences for {split}")
    return sentences


# ---- speakers ------------------------------------------------------------------------------------


def spread(rng, choices, n):
    """n values, every choice as often as every other (give or take one), in random order."""
    choices = rng.permutation(list(choices)).tolist()
    return [choices[i % len(choices)] for i in rng.permutation(n)]


def plan(seed, sizes):
    """Everything but the sound -> speakers: split, voice, espeak-ng's parameters (rate in words a
    minute), SNR in dB, and the rows of the manifest, their duration still missing."""
    sentences, speakers = draw_sentences(seed, sizes), []
    for split, size in sizes.items():
        rng = generator(seed, f"speakers of {split}")
        n = min(SPEAKERS[split], size // 3)
        counts = {group: max(1, round(share * n)) for group, share in SHARE[split].items()}
        counts["group_a"] += n - sum(counts.values())
        texts = iter(np.array_split(sentences[split], n))
        for ethnicity, count in counts.items():
            columns = {key: spread(rng, MEANING[key], count) for key in MEANING}
            columns["ethnicity"] = [ethnicity] * count
            variants = {
                gender: iter(spread(rng, names, columns["gender"].count(gender)))
                for gender, names in VOICES[ethnicity].items()
            }
            for values in zip(*columns.values()):
                name, labels = f"speaker_{len(speakers):03d}", dict(zip(columns, values))
                accent, variant = (
                    ACCENTS[labels["first_language"]],
                    next(variants[labels["gender"]]),
                )
                rate = round(rng.uniform(*RATES[labels["age"]]))
                pitch, pitch_range = rng.integers(*PITCH, 2).tolist()
                speaker = {"split": split, "voice": f"{accent}+{variant}", "rows": []}
                speaker |= {"rate": rate, "pitch": pitch, "pitch_range": pitch_range}
                speaker |= {"snr": round(rng.uniform(*SNR), 1)}
                for i, text in enumerate(next(texts).tolist()):
                    path = f"audio/{name}/{name}_{i:03d}.flac"
                    row = {"audio_filepath": path, "text": text, "duration": None, "speaker": name}
                    speaker["rows"].append(row | labels | {"synthetic": True})
                speakers.append(speaker)
    return speakers


# ---- synthesis -----------------------------------------------------------------------------------


@functools.cache
def espeak():
    """Load espeak-ng, once a process -> library, list its samples arrive in, their rate in Hz."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    # 2: AUDIO_OUTPUT_SYNCHRONOUS, samples go to the callback; 0x8000: on errors return, not exit
    rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    if rate <= 0:
        raise ValueError(f"espeak-ng cannot read its data in {espeakng_loader.get_data_path()}")
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))  # 16 bit
        return 0

    library.espeak_SetSynthCallback(receive)
    library.receive = receive  # C does not count references
    library.espeak_Info.restype = ctypes.c_char_p
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(ctypes.c_char_p * 3)
    return library, chunks, rate


def set_voice(voice):
    """Switch to "accent+variant". espeak-ng overlooks a wrong variant, so look what it has."""
    library = espeak()[0]
    failed = library.espeak_SetVoiceByName(voice.encode())
    name, languages, identifier = library.espeak_GetCurrentVoice().contents  # b"gmw/en-US+f1"
    if failed or re.split(r"[/\\]", identifier.decode())[-1].lower() != voice.lower():
        raise ValueError(f"espeak-ng has no voice {voice}")


def synthesise(text, snr, rng):
    """A sentence in the current voice -> 16 kHz samples (S,) int16, speech snr dB above noise."""
    library, chunks, rate = espeak()
    chunks.clear()
    data = text.encode() + b"\0"
    # from character (1) 0 to no given end (0), UTF-8 (1)
    failed = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)
    speech = np.frombuffer(b"".join(chunks), np.int16).astype(np.float64)
    if failed or not speech.any():
        raise ValueError(f"espeak-ng cannot say {text!r}")

    # Resample by cutting the spectrum, over a whole number of 20 ms: 441 samples become 320.
    frame, pad = rate // 50, round(EDGE * rate)
    speech = np.pad(speech, (pad, pad + -(len(speech) + 2 * pad) % frame))
    n = len(speech) // frame * (SAMPLE_RATE // 50)
    speech = np.fft.irfft(np.fft.rfft(speech)[: n // 2 + 1], n)

    speech *= 0.5 * 32767 / np.abs(speech).max()  # one peak for all: loudness tells no group
    noise = rng.standard_normal(n) * np.sqrt(np.mean(speech**2)) * 10 ** (-snr / 20)
    return (speech + noise).round().astype(np.int16)


def speak(job):
    """Write the FLAC files of one speaker -> rows with durations (s), espeak-ng's version."""
    import soundfile

    speaker, folder, seed = job
    set_voice(speaker["voice"])
    for number, name in ((1, "rate"), (3, "pitch"), (4, "pitch_range")):
        if espeak()[0].espeak_SetParameter(number, speaker[name], 0):
            raise ValueError(f"espeak-ng refuses the {name} {speaker[name]}")
    for row in speaker["rows"]:
        path = folder / row["audio_filepath"]
        path.parent.mkdir(exist_ok=True)
        samples = synthesise(row["text"], speaker["snr"], generator(seed, path.name))
        soundfile.write(path, samples, SAMPLE_RATE, "PCM_16")
        row["duration"] = len(samples) / SAMPLE_RATE
    return speaker["rows"], espeak()[0].espeak_Info(None).decode()


# ---- files ---------------------------------------------------------------------------------------

README = """# SYNTHETIC speech: no person speaks here, and no person is described

Made by `data/make_demo.py` with espeak-ng {espeak_ng}. The columns have the names of a real corpus,
so that the same commands run on both; their values are settings of a synthesiser. Numbers measured
here tell whether a program works. They tell nothing about people.

{planted_disparity}

| column | value | stands for |
| --- | --- | --- |
{table}

Settings, counts and the SHA-256 of the audio are in `corpus.json`.
"""
PLANTED = (
    f"Planted disparity: group_c of ethnicity is {RARE['group_c']:.0%} of the speakers in train; "
    f"its voices ({', '.join(sum(VOICES['group_c'].values(), []))}) are harder, and nobody else "
    "has them. dev and test hold equal thirds."
)


def follow_parent():
    """In a worker: leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_corpus(folder, speakers, settings, jobs):
    """Write audio, manifests, corpus.json and README.md into a folder -> corpus.json as a dict."""
    from tqdm import tqdm

    (folder / "audio").mkdir()
    rows = {split: [] for split in SPEAKERS}
    # spawn: a worker starts clean, with neither our lock nor our signal handler
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), follow_parent)
    try:
        spoken = pool.map(speak, [(speaker, folder, settings["seed"]) for speaker in speakers])
        bar = tqdm(spoken, "synthesis", len(speakers), unit=" speakers", disable=None)
        for speaker, result in zip(speakers, bar):
            done, version = result
            rows[speaker["split"]] += done
    finally:
        pool.shutdown(cancel_futures=True)

    audio, counts = hashlib.sha256(), {}
    for split in rows:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[split]))
        for row in rows[split]:
            audio.update((folder / row["audio_filepath"]).read_bytes())
        for group in [*VOICES, "all"]:
            mine = [row for row in rows[split] if group in (row["ethnicity"], "all")]
            counts.setdefault(split, {})[group] = {
                "utterances": len(mine),
                "speakers": len({row["speaker"] for row in mine}),
                "hours": round(sum(row["duration"] for row in mine) / 3600, 4),
            }
    about = {
        "synthetic": True,
        "settings": settings,
        "espeak_ng": version,
        "planted_disparity": PLANTED,
        "meaning": MEANING,
        "counts": counts,
        "audio_sha256": audio.hexdigest(),  # of all FLAC files, in the order of the manifests
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")
    table = [f"| {key} | {k} | {v} |" for key in MEANING for k, v in MEANING[key].items()]
    (folder / "README.md").write_text(README.format(**about, table="\n".join(table)))
    return about


def make(out, speakers, settings, jobs):
    """Build in a hidden folder beside `out` and rename it at the end: all or nothing."""
    work = out.parent / f".{out.name}.making"
    work.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.flock(os.open(work, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until we end
    except BlockingIOError:
        raise ValueError(f"another run is making {os.path.relpath(out)}") from None
    try:
        shutil.rmtree(work / "audio", ignore_errors=True)  # of a run that was killed
        about = write_corpus(work, speakers, settings, jobs)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return about


def already_there(out, settings):
    """True if `out` is this corpus, False if it is free, else an error that says what differs."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = dict(json.loads((out / "corpus.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{os.path.relpath(out)} is no demo corpus: choose --out") from None
    differs = [
        f"{k} {there.get(k)} there, {v} here" for k, v in settings.items() if there.get(k) != v
    ]
    differs += [f"no {split}.jsonl" for split in SPEAKERS if not (out / f"{split}.jsonl").is_file()]
    if differs:
        why = f"is there with other settings ({'; '.join(differs)})"
        raise ValueError(f"{os.path.relpath(out)} {why}: delete the folder or choose --out")
    return True


# ---- command line --------------------------------------------------------------------------------


def main():
    start = time.time()
    parser = argparse.ArgumentParser(description="Make the SYNTHETIC demo corpus with espeak-ng.")
    default = ROOT / "data" / "demo"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: data/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, speakers and noise")
    for split, size in ("train", 2500), ("dev", 240), ("test", 640):
        parser.add_argument(f"--{split}", type=int, default=size, help=f"utterances ({size})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    sizes = {split: getattr(args, split) for split in SPEAKERS}
    if min(sizes.values()) < 9 or args.jobs < 1 or args.seed < 0:
        raise ValueError("takes 9 utterances or more in a split, 1 job or more, a seed from 0 on")

    out = args.out.resolve()
    speakers = plan(args.seed, sizes)
    digest = hashlib.sha256(json.dumps(speakers).encode()).hexdigest()[:12]
    settings = {"seed": args.seed, **sizes, "plan": digest}  # other constants, other plan
    if already_there(out, settings):
        print(f"{os.path.relpath(out)}: the synthetic corpus is there, with the same settings")
        return
    about = make(out, speakers, settings, args.jobs)

    print(f"{os.path.relpath(out)}: synthetic, espeak-ng {about['espeak_ng']}, seed {args.seed}")
    print(f"{'split':5}  {'ethnicity':9}  utterances  speakers  hours")
    for split, groups in about["counts"].items():
        for group, count in groups.items():
            numbers = "{:10}  {:8}  {:5.2f}".format(*count.values())
            print(f"{split:5}  {group:9}  {numbers}  synthetic")
    print(f"made in {time.time() - start:.0f} seconds; next:")
    folder = os.path.relpath(out)
    files = f" --manifest {folder}/train.jsonl --dev_manifest {folder}/dev.jsonl"
    print(
        f"python train.py{'' if out == default else files} --independent_space --balance_param 0.1"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except KeyboardInterrupt:
        print("make_demo: stopped, nothing is left behind", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ImportError as error:
        sys.exit(f"make_demo: {error}: pip install -r requirements.txt")
    except (ValueError, OSError, BrokenProcessPool) as error:
        sys.exit(f"make_demo: {error}")
