"""What every run needs around its loop: processes, precision, learning rate, log, signals.

One process is the same path as many: torchrun only sets environment variables.
"""

import argparse
import ctypes
import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # optional
    SummaryWriter = None

LOG_EVERY = 10  # steps between two lines of log.jsonl
TOO_MANY_SKIPS = 10  # non-finite steps in a row that end a run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """A mistake of the user's: printed as it is, without a traceback."""


def at_least(low: float, kind: type = int, most: float = math.inf):
    """An argparse type: a finite number of that kind, from `low` on, `most` at most."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= most and value < math.inf):
            expected = f"from {low} on" if most == math.inf else f"from {low} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: a number {expected} is expected")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


# ---- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    rank: int  # of this process, from 0
    size: int  # processes
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print on the first process only."""
        if self.main:
            print(message, flush=True)


def setup(device: str = "auto") -> World:
    """This process's place: alone, or one of torchrun's (NCCL on GPUs, gloo on CPUs).
    Raises UserError if there is no GPU where one is asked for."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to PyTorch; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_memory()
        # oneDNN makes 40 kernels for each new shape of batch (7 % of a step in bfloat16), and by
        # default forgets those of all but 25 shapes
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    else:
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 in convolutions too
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, torch.device(device))
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - {*os.environ}:
        raise UserError(
            f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}: start several processes by "
            "torchrun, or one without WORLD_SIZE"
        )
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"--nproc_per_node: {local + 1} or more processes for {there} GPU(s)")
        torch.cuda.set_device(local)
        where = torch.device("cuda", local)
    else:
        where = torch.device("cpu")
    # what the host has to know goes from CPU to CPU, so that no host waits for its GPU
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), where)


def keep_memory() -> None:
    """Keep freed memory for the next step: glibc returns large blocks to the system, and the next
    step faults them in again, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h
        if mallopt(mmap_threshold, 2**30):  # older versions refuse so much
            mallopt(trim_threshold, -1)
            mallopt(top_pad, 2**28)


def return_memory() -> None:
    """Once an epoch: give back what lies free between blocks, which batches of ever new lengths
    would let grow for thousands of steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def run(main, mistakes: tuple[type[Exception], ...] = ()) -> None:
    """Call main() -> exit code; a user's mistake becomes its message and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter of the data
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"process {os.environ.get('RANK', '?')}: " if several else ""
    try:
        code = main()
    except (UserError, *mistakes) as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:  # outside of a loop that saves
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (MemoryError, RuntimeError) as error:
        code, reason = 2, str(error).split("\n")[0]
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if full or "can't allocate memory" in str(error):  # so says PyTorch on a CPU
            reason = reason.split("DefaultCPUAllocator: ")[-1][:200] or "the system gives no more"
            message = (
                f"out of memory ({reason}); try a smaller --batch_size or --max_seconds, in "
                "training also --activation_checkpointing"
            )
        elif reason.startswith("DataLoader worker"):  # killed: the system may lack memory
            message = f"lost a process that reads audio ({reason}); try fewer --num_workers"
        elif isinstance(error, dist.DistError) or "gloo" in reason or "by peer" in reason:
            message = f"lost another process; the cause stands above, or below ({reason})"
            if "connectFullMesh" in reason:  # they have never met
                message += "; between machines, GLOO_SOCKET_IFNAME names the interface (README)"
        else:
            raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "standard output"
        code, message = 2, f"{where}: {error.strerror}; make room, and give the command again"
    finally:
        end_workers()
    if code == 2:
        print(f"error: {rank}{message}", file=sys.stderr, flush=True)
    elif code == 0 and dist.is_initialized():  # else the others may wait for us in vain
        dist.destroy_process_group()
    sys.exit(code)


def make_folder(path: Path) -> None:
    """The folder of what will be written in the end, before the long work. Raises UserError if it
    cannot be made, or nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"--out {path}: {error.strerror}; name another place, a folder that can be written"
        ) from None


def end_workers() -> None:
    """Kill the processes that read audio, if there are any left. Python would ask them to end, and
    wait for ever: they leave signals to us (data.leave_signals)."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in children:
        child.kill()


def agree(mine: dict) -> None:
    """Wait for all processes; UserError if they do not hold the same values, e.g. where --out is
    not one folder for all of them."""
    if dist.is_initialized():
        theirs = [None] * dist.get_world_size()
        dist.all_gather_object(theirs, mine)
        for name in mine:
            values = [one.get(name) for one in theirs]
            if any(value != values[0] for value in values):
                raise UserError(
                    f"the processes do not agree on {name} ({values}): all of them need the same "
                    "command, and must see the same files, those in --out included"
                )


@contextmanager
def first_process_first(world: World):
    """What is inside runs on the first process, then on the others (a file is made only once)."""
    if not world.main:
        dist.barrier()
    yield
    if world.main and world.size > 1:
        dist.barrier()


def gather(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) of each process -> (sum of B, ...), on every process, with gradient.

    The processes may hold different numbers of rows. Each computes the same loss of the gathered
    rows; the backward pass sums their gradients, and average_gradients() divides by their number.
    """
    if not dist.is_initialized():
        return x
    counts = [torch.tensor([0]) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)]))
    counts = [int(count) for count in counts]
    filler = x.new_zeros(max(counts) - len(x), *x.shape[1:])
    parts = all_gather(torch.cat([x, filler]))
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum over processes, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def average_gradients(weights: torch.nn.Parameter) -> None:
    """Replace the gradient of joined() by its mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(weights.grad)
        weights.grad /= dist.get_world_size()


# ---- the optimizer step --------------------------------------------------------------------------


def seed_everything(seed: int, *stream: int) -> None:
    """Seed torch from (seed, stream...), e.g. the step and the rank.

    Seeding each step makes dropout a function of the step: a resumed run needs no saved generator.
    """
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) >> 1)  # 63 bits: one more would change all seeded runs


def check_supported(precision: str, device: torch.device, compiled: bool = False) -> None:
    """UserError for fp16 or --compile without a GPU; a warning for bf16 on a CPU that has no such
    products."""
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if compiled and device.type != "cuda":
        raise UserError("--compile is for a GPU; the layers' own way on a CPU is faster")
    onednn = torch.backends.mkldnn.is_available()
    fast = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = device.type == "cpu" and not fast
    if precision == "bf16" and slow and os.environ.get("RANK", "0") == "0":
        print(
            "warning: this CPU has no instructions for bf16, which will take many times as long "
            "as fp32",
            file=sys.stderr,
        )


def autocast(precision: str, device: torch.device):
    """fp32 leaves everything as it is; bf16 and fp16 run matrix products in half precision."""
    return torch.autocast(
        device.type, DTYPES[precision], enabled=precision != "fp32",
        cache_enabled=False,  # of casts, which a graph must make anew
    )  # fmt: skip


def grad_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for fp16, as far as gradients stay finite; otherwise it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def lr_at(step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Learning rate of a step: linear warm-up over a fraction of the steps, cosine to the floor,
    or to the peak if that is lower."""
    floor = min(floor, peak)
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


ROW = 64  # numbers, as a multiple of which each parameter has its place in joined()


@torch.no_grad()
def joined(model: torch.nn.Module) -> torch.nn.Parameter:
    """All parameters of a model (of one type) as one, (P,), of which they become views, as their
    gradients of its gradient: zeros, to which each backward pass adds.

    Clipping, AdamW, the mean over processes then are a few calls. A loop over 700 parameters, each
    a call of Python's, keeps a GPU waiting, and takes 3 % of a step on a CPU (RESULTS.md).
    """
    parameters = list(model.parameters())
    sizes = [-(-p.numel() // ROW) * ROW for p in parameters]
    weights = torch.nn.Parameter(parameters[0].new_zeros(sum(sizes)))
    weights.grad = torch.zeros_like(weights)
    for p, part, grad in zip(parameters, weights.split(sizes), weights.grad.split(sizes)):
        p.data = part.as_strided(p.shape, p.stride()).copy_(p)  # a convolution's in its own order
        p.grad = grad.as_strided(p.shape, p.stride())
    return weights


def update(weights, optimizer, scaler, buffers, before, grad_clip: float) -> tuple:
    """One optimizer step from the gradients at hand -> gradient norm and 1.0 if done, 0.0 if not.

    weights: joined(model), the only parameter of optimizer, which is a fused one. A norm that is
    not finite (as a non-finite loss gives) skips the step: weights and optimizer stay as they were,
    and buffers (BatchNorm's) become again what they were before. Nothing waits for the device.
    """
    average_gradients(weights)
    scaler.unscale_(optimizer)
    # row by row: in one go, a CPU's sum in float32 loses 0.8 % of the norm of size large
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(weights.grad.view(-1, ROW), dim=1))
    torch.nn.utils.clip_grads_with_norm_(weights, grad_clip, norm)
    done = norm.isfinite()
    optimizer.found_inf = 1 - done.float()  # a fused optimizer, told so, does nothing
    optimizer.step()
    scaler.update()  # to half, where unscale_() has found a number too large
    for buffer, old in zip(buffers, before):
        torch.where(done, buffer, old, out=buffer)
    optimizer.zero_grad(set_to_none=False)  # they stay where they are
    return norm, done.float()


# ---- log, progress, signals ----------------------------------------------------------------------


class Log:
    """log.jsonl, and TensorBoard where it is installed. Silent on all processes but the first.
    Raises UserError where it cannot be written, e.g. on a full disk."""

    def __init__(self, folder: Path, world: World, size: int = 0, step: int = 0):
        """size: bytes that the log had at the checkpoint of this step; the rest is cut off."""
        self.path, self.file, self.board = folder / "log.jsonl", None, None
        if world.main:
            with self._problems():
                self.file = open(self.path, "ab", buffering=0)  # nothing left over when killed
                self.file.truncate(min(size, self.file.tell()))
                self.file.seek(0, os.SEEK_END)
                if SummaryWriter:
                    self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @contextmanager
    def _problems(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror or error}); mend that, and the "
                "same command goes on from the last checkpoint"
            ) from None

    def write(self, step: int, **values) -> None:
        """One line; what is not finite becomes null, for which JSON has a word."""
        if not self.file:
            return
        plain = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, **plain, "time": round(time.time(), 3)}) + "\n"
        with self._problems():
            if self.file.write(line.encode()) < len(line):
                raise OSError("only a part of the line")
            for name, value in values.items():
                if self.board and value is not None:
                    self.board.add_scalar(name, value, step)

    def size(self) -> int:
        """Bytes written so far, all of them on the disk."""
        if not self.file:
            return 0
        with self._problems():
            os.fsync(self.file.fileno())
        return self.file.tell()


class Meter:
    """Means of the losses between two log lines, kept on the device and saved with the run. All
    processes add the same values, those of the whole batch.

    state: one sum a loss, then the steps done, those skipped, those skipped in a row until now.
    """

    def __init__(self, device: torch.device, state: list[float] | None = None):
        self.names: list[str] = []  # of the losses, in the order of their sums
        self.state = torch.tensor(state or [], device=device)

    @torch.no_grad()
    def add(self, values: dict[str, torch.Tensor], done: torch.Tensor) -> None:
        """One step's scalars, or, if it was skipped (done is 0), only that it was."""
        self.names = list(values)
        if not len(self.state):
            self.state = torch.zeros(len(values) + 3, device=self.state.device)
        sums, counts = self.state[:-3], self.state[-3:]
        sums += torch.where(done > 0, torch.stack(list(values.values())).float(), 0.0)
        counts += torch.stack([done, 1 - done, 1 - done])
        counts[2] *= 1 - done

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read."""
        sums, steps = self.state[:-3].tolist(), max(1.0, self.state[-3].item())
        skipped = self.state[-2].item()
        self.state[:-1] = 0.0
        means = {name: value / steps for name, value in zip(self.names, sums)}
        return {**means, "skipped": int(skipped)}

    def skipped_in_a_row(self) -> int:
        return int(self.state[-1].item())


class Progress:
    """A bar with losses, seconds of audio heard a second and time left; off the terminal, only the
    lines given to line()."""

    def __init__(self, name: str, first: int, last: int, world: World):
        self.world, self.quiet = world, not (world.main and sys.stderr.isatty())
        self.bar = tqdm(
            desc=name, initial=first, total=last, unit=" steps", disable=self.quiet,
            dynamic_ncols=True,
        )  # fmt: skip
        self.audio, self.began = 0.0, time.time()

    def heard(self, n_samples: torch.Tensor, rate: int = 16_000) -> None:
        self.audio += int(n_samples.sum()) / rate * self.world.size

    def show(self, means: dict[str, float]) -> None:
        """Put these values, and the seconds of audio a second, beside the bar."""
        speed = self.audio / (time.time() - self.began)
        self.bar.set_postfix_str(f"{speed:.0f} s/s, {rounded(means)}", refresh=False)

    def line(self, text: str) -> None:
        if self.world.main:
            speed = self.audio / (time.time() - self.began)
            text = f"{text} [{speed:.0f} s of audio a second]"
            print(text, flush=True) if self.quiet else self.bar.write(text)

    def update(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def rounded(values: dict[str, float]) -> str:
    """ "name 1.23, other 4.56" for people to read."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


class Stop:
    """SIGINT and SIGTERM: finish the step, save, exit. Another one, two seconds later or more, ends
    the program at once; not sooner, for torchrun passes on a Ctrl-C that we got from the terminal.
    """

    def __init__(self):
        self.signal, self.first = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if not self.signal:
            self.signal, self.first = number, time.monotonic()
        elif time.monotonic() - self.first > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> int:
        """The signal that any process got, or 0; the same answer on all of them."""
        if not dist.is_initialized():
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


def stop_if_diverged(meter: Meter, utterances: list, held: list[int], ended: bool = False) -> None:
    """UserError once many steps in a row were skipped, or, where the run has ended, more than one.
    held: the last step's utterances."""
    if (skipped := meter.skipped_in_a_row()) >= (2 if ended else TOO_MANY_SKIPS):
        heard = [utterances[i].row["audio_filepath"] for i in held]
        raise UserError(
            f"{skipped} steps in a row had a non-finite loss or gradient and were skipped: "
            "training has diverged. Try a lower --lr (in another --out). The last step held "
            f"{', '.join(heard[:8])}{', ...' if len(heard) > 8 else ''}"
        )


def commit() -> str:
    """The commit of this checkout, with "+" if files differ from it; "unknown" outside of git."""
    try:
        here = Path(__file__).parent
        git = ["git", "-C", str(here)]
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
