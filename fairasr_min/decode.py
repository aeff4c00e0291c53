"""A whole corpus to text: used for the dev set while training and by evaluate.py."""

import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from fairasr_min.audio import AudioError
from fairasr_min.data import SpeechDataset, Utterance, collate, leave_signals
from fairasr_min.runtime import World, autocast

LONGEST = 300.0  # seconds in one piece: attention's memory grows with their square, to 4 GB here


@torch.no_grad()
def decode(
    model,
    utterances: list[Utterance],
    world: World,
    batch_size: int = 32,
    precision: str = "fp32",
    num_workers: int = 0,
) -> list[str]:
    """The text of every utterance, in their order, on every process; greedy, eval mode.

    The corpus is dealt out to the processes without repeating or padding, since each utterance
    is encoded the same whatever its batch; long ones come in smaller batches. Leaves the model in
    the mode it was in. Raises AudioError for a file that cannot be decoded.
    """
    was_training = model.training
    model.eval()
    batches, longest = [], LONGEST
    for i in np.argsort([-u.seconds for u in utterances], kind="stable"):  # like with like
        size = len(batches[-1]) if batches else batch_size
        if size < batch_size and (size + 1) * longest**2 <= LONGEST**2:
            batches[-1].append((0, int(i)))
        else:
            longest = utterances[i].seconds
            batches.append([(0, int(i))])
    mine = batches[world.rank :: world.size]
    loader = DataLoader(
        SpeechDataset(utterances),
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals,
    )
    quiet = not (world.main and sys.stderr.isatty())
    texts, error = {}, None
    for batch in tqdm(loader, "decoding", unit=" batches", leave=False, disable=quiet):
        if isinstance(batch, AudioError):
            error = str(batch)
            break
        n_samples = batch.n_samples.tolist()
        waveforms = [w[:n] for w, n in zip(batch.waveforms, n_samples)]
        with autocast(precision, world.device):
            texts.update(zip(batch.index, model.transcribe(waveforms)))
    model.train(was_training)

    shares = [(texts, error)]
    if world.size > 1:
        shares = [None] * world.size
        dist.all_gather_object(shares, (texts, error))
    for _, error in shares:  # on all processes alike, so that none waits for another
        if error:
            raise AudioError(error)
    texts = {index: text for share, _ in shares for index, text in share.items()}
    return [texts[i] for i in range(len(utterances))]
