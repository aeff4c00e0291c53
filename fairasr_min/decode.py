"""A whole corpus through a model: to text (the dev set while training, evaluate.py), or to whatever
else comes of each utterance (embed.py)."""

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from fairasr_min.audio import AudioError
from fairasr_min.data import SpeechDataset, Utterance, collate, leave_signals
from fairasr_min.layers import weights_held
from fairasr_min.model import LONGEST
from fairasr_min.runtime import World, autocast


def decode(
    model,
    utterances: list[Utterance],
    world: World,
    batch_size: int = 32,
    precision: str = "fp32",
    num_workers: int = 0,
) -> list[str]:
    """The text of every utterance, in their order, on every process; greedy, eval mode.

    Leaves the model in the mode it was in. Raises AudioError as encode_corpus does.
    """
    was_training = model.training
    model.eval()

    def transcribe(waveforms, n_samples):
        waveforms = [w[:n] for w, n in zip(waveforms, n_samples.tolist())]
        with autocast(precision, world.device):
            return model.transcribe(waveforms)

    try:
        return encode_corpus(transcribe, utterances, world, batch_size, num_workers)
    finally:
        model.train(was_training)


@torch.no_grad()
def encode_corpus(
    encode: Callable[[torch.Tensor, torch.Tensor], Sequence],
    utterances: list[Utterance],
    world: World,
    batch_size: int = 32,
    num_workers: int = 0,
    name: str = "decoding",
) -> list:
    """What encode(waveforms (B, S), n_samples (B,)) returns, B items on the CPU, for every
    utterance, in their order, on every process. name: of the progress bar.

    The corpus is dealt out to the processes without repeating or padding, since each utterance
    is encoded the same whatever its batch; long ones come in smaller batches, or alone. Raises
    AudioError for a file that cannot be decoded.
    """
    # a batch: (epoch, index) as a data set wants them, though nothing here depends on an epoch
    batches, longest = [], 0.0  # seconds, in the last batch
    for i in np.argsort([-u.seconds for u in utterances], kind="stable"):  # like with like
        full = not batches or len(batches[-1]) == batch_size
        # attention takes memory by the square of the longest: no more than a clip of LONGEST does
        if full or (len(batches[-1]) + 1) * longest**2 > LONGEST**2:
            batches.append([])
            longest = utterances[i].seconds
        batches[-1].append((0, int(i)))
    mine = batches[world.rank :: world.size]
    loader = DataLoader(
        SpeechDataset(utterances),
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals,
    )
    quiet = not (world.main and sys.stderr.isatty())
    results, error = {}, None
    with weights_held():
        for batch in tqdm(loader, name, unit=" batches", leave=False, disable=quiet):
            if isinstance(batch, AudioError):
                error = str(batch)
                break
            results.update(zip(batch.index, encode(batch.waveforms, batch.n_samples)))

    shares = [(results, error)]
    if world.size > 1:
        shares = [None] * world.size
        dist.all_gather_object(shares, (results, error))
    for _, error in shares:  # on all processes alike, so that none waits for another
        if error:
            raise AudioError(error)
    results = {index: result for share, _ in shares for index, result in share.items()}
    return [results[i] for i in range(len(utterances))]
