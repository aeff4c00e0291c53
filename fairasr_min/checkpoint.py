"""Files: model files that others read, and checkpoints from which a run goes on.

    python -m fairasr_min.checkpoint info MODEL             # sizes, options, vocabulary
    python -m fairasr_min.checkpoint export MODEL OUT.nemo  # for NeMo

MODEL, as for --init and --model, is one of our model files, a .nemo archive, the https address of
either, or a name on Hugging Face such as nvidia/stt_en_conformer_ctc_small.

Everything is plain data, loaded with weights_only=True: a file from a stranger runs no code.
Everything is written beside its place and moved there when complete: a kill leaves the last one.
"""

import argparse
import json
import os
import pickle
import signal
import sys
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fairasr_min.audio import N_FFT, LogMel
from fairasr_min.conformer import Conformer, ConformerConfig
from fairasr_min.download import DownloadError, local_file
from fairasr_min.model import ConformerCTC
from fairasr_min.nemo import NemoError, check_whole, export, read_nemo
from fairasr_min.text import NORMALIZATION, Tokenizer

FORMAT = 1
MAY_DIFFER = {  # when resuming
    "out", "device", "max_steps", "num_workers", "resume_ckpt", "activation_checkpointing",
    "compile", "save_every",
}  # fmt: skip
_locks = []  # open files: closing one would give its folder free
_seen = {}  # what resume() found in a folder, which start() must find, too
OURS = ("pretrained.pt", "model.pt", "checkpoint.pt", "previous.pt", "log.jsonl")


class CheckpointError(ValueError):
    """A file that cannot be read, written or used; the message says which, why, and what to do."""


# ---- files ---------------------------------------------------------------------------------------


def save(path: str | Path, payload: dict) -> None:
    """Write a file whole or not at all. Raises CheckpointError, e.g. on a full disk."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # a disk that can no longer be written
            unfinished.unlink()
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            error = error.__context__  # while torch.save still closed its archive
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} could not be written ({reason}); what was there before is whole. Make room, "
            "and the same command goes on from the last checkpoint"
        ) from None


def load(path: str | Path) -> dict:
    """A file written by save(), tensors on the CPU. Raises CheckpointError."""
    try:
        _check_members(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose text recommends to run the code in it
            reason = "not plain data"
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file ({reason})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a file of this project (format {FORMAT})")
    return payload


def _check_members(path: str | Path) -> None:
    """ValueError if a file in PyTorch's format (a zip archive, nothing compressed) is damaged, or
    says that it holds more than its own size: memory is only taken for what is really there."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed; PyTorch's own files are not")
        if sum(m.file_size for m in members) > os.path.getsize(path):
            raise ValueError("says that it holds more than it does")
        if damaged := archive.testzip():  # reads it once; torch.load looks at no checksum
            raise ValueError(f"wrong checksum of {damaged}")


# ---- model files ---------------------------------------------------------------------------------


def save_model(
    path: str | Path,
    kind: str,
    config: ConformerConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: bytes | None,
    arguments: dict,
    **about,
) -> None:
    """kind "encoder" (stage 1: encoder and front end, and the CTC head and tokenizer of the
    recogniser it was started from, if any) or "ctc" (stage 2: the whole recogniser).

    about: label columns and their values, commit, corpus, ... as plain data.
    """
    save(
        path,
        {
            "format": FORMAT,
            "kind": kind,
            "config": asdict(config),
            # copies: a view would bring along all that it is a view of
            "weights": {name: w.detach().to("cpu", copy=True) for name, w in weights.items()},
            "tokenizer": tokenizer,
            "normalization": NORMALIZATION,
            "arguments": arguments,
            **about,
        },
    )


def load_model_file(source: str | Path) -> dict:
    """A model file, checked: config is a ConformerConfig, "path" is where it lies. What others
    made, a .nemo archive, is given the same form. Raises CheckpointError."""
    try:
        path = local_file(source, _check_whole)
        if path.suffix == ".nemo":
            about = {"format": FORMAT, "kind": "ctc", "normalization": NORMALIZATION}
            about |= {"arguments": {}, "labels": {}, "commit": None, "path": path}
            return {**about, **read_nemo(path)}
    except (DownloadError, NemoError) as error:
        raise CheckpointError(str(error)) from None
    payload = {**load(path), "path": path}
    if payload.get("kind") not in ("encoder", "ctc"):
        what = f"kind {payload.get('kind')!r} is no model file"
        if payload.get("kind") == "state":
            what = "the state of a run; its model is pretrained.pt or model.pt beside it"
        raise CheckpointError(f"{path}: {what}")
    try:
        payload["config"] = ConformerConfig(**payload["config"])
        _check_sizes(payload["config"], payload["weights"])
        if payload["kind"] == "ctc" or payload["tokenizer"] is not None:
            Tokenizer(bytes(payload["tokenizer"]))
        there = payload["normalization"]
        for name in ("arguments", "labels", "dev"):
            if not isinstance(payload.setdefault(name, {}), dict):
                raise ValueError(f"{name} {payload[name]!r}")
        payload.setdefault("commit", None)
    except Exception as error:  # a file from a stranger may hold anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: damaged, or made by another version ({reason})") from None
    if there != NORMALIZATION:
        print(f"warning: {path} was trained on {there} texts, not {NORMALIZATION}", file=sys.stderr)
    return payload


def _check_sizes(config: ConformerConfig, weights: dict[str, torch.Tensor]) -> None:
    """ValueError if encoder and front end of this config are not those of these weights. The file's
    size bounds that of the weights: a model built after this check takes no more memory."""
    bins = config.front_end.get("n_fft", N_FFT) // 2 + 1
    if weights["log_mel.mel"].shape != (config.n_mels, bins):
        raise ValueError(f"log_mel.mel is not that of {config.n_mels} mel bins")
    LogMel(config.n_mels, **config.front_end)  # which refuses options that make no sense
    if config.d_model % config.n_heads or config.conv_kernel % 2 == 0:
        raise ValueError(f"{config.n_heads} heads, kernel {config.conv_kernel}")
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    if config.n_layers != len(layers):
        raise ValueError(f"{config.n_layers} layers, and weights of {len(layers)}")
    with torch.device("meta"):  # shapes without memory
        expected = Conformer(config).state_dict()
    for name, weight in expected.items():
        there = weights.get(f"encoder.{name}")
        if there is None or there.shape != weight.shape:
            shape = "missing" if there is None else tuple(there.shape)
            raise ValueError(f"encoder.{name}: {shape}, expected {tuple(weight.shape)}")
        if not there.isfinite().all():
            raise ValueError(f"encoder.{name}: NaN or infinite numbers")


def _check_whole(path: Path, suffix: str) -> None:
    """ValueError unless a download, of whatever name, is all that it should be."""
    if suffix == ".nemo":
        check_whole(path)
    else:
        load(path)


def load_weights(model: torch.nn.Module, payload: dict, path: str | Path, parts: tuple) -> None:
    """Copy the named parts ("encoder", "log_mel", "decoder") of a model file into a model.

    Raises CheckpointError if names or shapes do not all fit.
    """
    for part in parts:
        prefix = f"{part}."
        weights = {
            k[len(prefix) :]: w for k, w in payload["weights"].items() if k.startswith(prefix)
        }
        try:
            getattr(model, part).load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path}: weights do not fit ({reason})") from None


def load_model(source: str | Path) -> ConformerCTC:
    """A recogniser ready to transcribe (eval mode, CPU) from a model file of stage 2, or whatever
    else has a CTC head. Raises CheckpointError; for a stage-1 file, saying what to run.
    """
    return recogniser(load_model_file(source))


def recogniser(payload: dict) -> ConformerCTC:
    """The same from what load_model_file returns."""
    path = payload["path"]
    if payload["kind"] != "ctc":
        raise CheckpointError(
            f"{path}: an encoder without a CTC head (stage 1); "
            f"first run: python finetune.py --init {path}"
        )
    model = ConformerCTC(payload["config"], Tokenizer(payload["tokenizer"]))
    load_weights(model, payload, path, ("encoder", "log_mel", "decoder"))
    return model.eval()


# ---- resuming ------------------------------------------------------------------------------------


def save_state(folder: Path, state: dict) -> None:
    """checkpoint.pt, keeping the one before as previous.pt."""
    current = folder / "checkpoint.pt"
    fresh = folder / ".checkpoint.fresh"
    save(fresh, {"format": FORMAT, "kind": "state", **state})
    if current.exists():
        os.replace(current, folder / "previous.pt")
    os.replace(fresh, current)


def load_state(path: str | Path) -> dict:
    """The full state of a run. Raises CheckpointError."""
    payload = load(path)
    if payload.get("kind") != "state":
        raise CheckpointError(f"{path}: a model file, not the state of a run; use --init for it")
    expected = {"arguments": dict, "step": int, "log_size": int, "meter": list}
    if "best" in payload:  # of stage 2
        expected |= {"best": float | None, "since_best": int}
    for name, kind in expected.items():
        value = payload.get(name)
        if not isinstance(value, kind) or (kind is int and value < 0):
            raise CheckpointError(
                f"{path}: {name} is {str(value)[:50]!r}: not the state of a run, or of another "
                "version of this project"
            )
    return {**payload, "path": path}


def resume(folder: Path, arguments: dict, resume_ckpt: str | None = None) -> dict | None:
    """The state that a run goes on from, or None for a new run. Writes nothing.

    That is the last whole checkpoint in `folder` (.checkpoint.fresh: one whose saving was cut off
    before it had its name); if there is none, the file resume_ckpt.
    Raises CheckpointError if the run there had other arguments, if the folder holds files of a run
    whose arguments are not known, or if all its checkpoints are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out {folder} is a file; name a folder")
    try:
        _seen[folder] = _there(folder)
        before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        same_arguments(before, arguments, folder)
    except FileNotFoundError:
        found = [name for name in OURS if (folder / name).exists()]
        if found:
            raise CheckpointError(
                f"{folder} holds {found[0]} of a run without its args.json; use another --out"
            ) from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/args.json: {error}; use another --out") from None
    problems = []
    for name in ("checkpoint.pt", ".checkpoint.fresh", "previous.pt"):
        if not (folder / name).exists():
            continue
        try:
            state = load_state(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        same_arguments(state["arguments"], arguments, folder / name)
        for problem in problems:
            print(f"warning: {problem}; going on from {folder / name}", file=sys.stderr)
        return state
    if problems:
        raise CheckpointError("\n".join(problems) + f"\nDelete {folder} to start anew")
    if resume_ckpt is None:
        return None
    state = load_state(resume_ckpt)
    same_arguments(state["arguments"], arguments, resume_ckpt)
    return {**state, "log_size": 0}  # its log stays where it is


def same_arguments(before: dict, now: dict, where: Path | str) -> None:
    """Two runs' arguments; where: whose `before` are. Raises CheckpointError, which lists the
    differences, if there are any that matter when resuming."""
    now = json.loads(json.dumps(now))  # as it is after writing and reading
    if before.get("stage") != now.get("stage"):
        raise CheckpointError(f"{where} is of stage {before.get('stage')}, not {now.get('stage')}")
    differ = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted({*before, *now} - MAY_DIFFER)
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{where} holds a run with other arguments:\n"
            + "\n".join(differ)
            + "\nGive the same to go on with it, or another --out to begin a new one"
        )


def restore(state: dict, **parts) -> None:
    """Give model, optimizer, scaler, ... the state that they had. Raises CheckpointError."""
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{state['path']}: its {name} is of another size or kind, or of an older version "
                f"of this project ({reason}); put back the checkpoint of this run, go on with the "
                "version that began it, or begin a new one with another --out"
            ) from None


def start(folder: Path, arguments: dict) -> None:
    """Make the folder of a run, hold it until this process ends, and write down its arguments.
    Raises CheckpointError, also if another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if _seen.get(folder, _there(folder)) != _there(folder):
            raise CheckpointError(
                f"--out {folder}: another process has written there meanwhile; the same command "
                "again looks at what is there now"
            )
        for leftover in folder.glob(".*.unfinished"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        fresh = folder / ".checkpoint.fresh"
        if fresh.exists() and not (folder / "checkpoint.pt").exists():
            os.replace(fresh, folder / "checkpoint.pt")
        fresh.unlink(missing_ok=True)
        text = json.dumps(arguments, indent=2) + "\n"
        unfinished = folder / ".args.json.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / "args.json")
    except OSError as error:
        raise CheckpointError(f"--out {folder}: {error.strerror or error}; mend that") from None


def _there(folder: Path) -> dict[str, int]:
    """When each file of a run was written."""
    times = {}
    for name in (*OURS, "args.json", ".checkpoint.fresh"):
        with suppress(FileNotFoundError):
            times[name] = (folder / name).stat().st_mtime_ns
    return times


def _lock(folder: Path) -> None:
    """Refuse a second run in the same folder: each would overwrite the other's files."""
    lock = open(folder / ".lock", "a")
    _locks.append(lock)
    if fcntl:
        try:
            # of this process, not of its workers: a kill releases it at once
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise CheckpointError(
                f"--out {folder}: another process is at work there; wait for it or stop it, "
                "or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks


# ---- the command line ----------------------------------------------------------------------------


def describe(source: str | Path) -> str:
    """What a model file holds, in lines for people to read. Raises CheckpointError, for what we do
    not carry too."""
    payload = load_model_file(source)
    config = asdict(payload["config"])
    front_end = config.pop("front_end")
    with torch.device("meta"):  # counts what tied layers share once
        encoder = sum(p.numel() for p in Conformer(payload["config"]).parameters())
    head = sum(w.numel() for k, w in payload["weights"].items() if k.startswith("decoder."))
    about = {
        "file": f"{payload['path']} ({payload['kind']}), supported",
        "parameters": f"{encoder + head:,}: encoder {encoder:,}, CTC head {head:,}",
        "encoder": ", ".join(f"{k} {v}" for k, v in config.items()),
        "front end": ", ".join(f"{k} {v}" for k, v in front_end.items()) or "the usual",
    }
    if payload["tokenizer"]:
        pieces = Tokenizer(payload["tokenizer"]).pieces()
        about["vocabulary"] = f"{len(pieces)} units: {' '.join(pieces[:20])} ..."
    if payload.get("set_aside"):
        about["only for training in NeMo, not taken over"] = ", ".join(payload["set_aside"])
    about |= {k: payload[k] for k in ("labels", "arguments", "commit") if payload.get(k)}
    return "\n".join(f"{name}: {value}" for name, value in about.items())


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="sizes, options, vocabulary; refuses what we do not carry"
    )
    info.add_argument("model", metavar="MODEL")
    give = commands.add_parser("export", help="write an archive that NeMo reads")
    give.add_argument("model", metavar="MODEL")
    give.add_argument("out", metavar="OUT.nemo")
    args = p.parse_args()
    if hasattr(signal, "SIGPIPE"):  # `... | head` ends us quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if args.command == "info":
            print(describe(args.model))
        elif Path(args.out).suffix != ".nemo":
            raise CheckpointError(f"{args.out}: the archive's name must end in .nemo")
        elif Path(args.out).resolve() == Path(args.model).resolve():
            raise CheckpointError(f"{args.out}: is the model itself; name another file")
        else:
            export(load_model(args.model), args.out)
            print(f"{args.out} written: EncDecCTCModelBPE.restore_from({args.out!r}) reads it")
    except (CheckpointError, NemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
