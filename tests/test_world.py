"""The world-size law: two processes compute the loss and the gradients of one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fairasr_min import losses, runtime
from fairasr_min.audio import length_mask
from fairasr_min.conformer import ConformerConfig
from fairasr_min.model import ConformerCTC, FairASR

CONFIG = ConformerConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    conv_kernel=5,
    subsampling_channels=4,
    dropout=0,
    dropout_att=0,
)
LABELS = torch.tensor([[0, 0], [1, 1], [0, -1], [2, 1], [1, 0], [0, 1], [-1, -1], [2, 0]])

# name, stage, utterances (7: one process has 4, the other 3), independent space, label columns
CASES = {
    "same space": (1, 8, False, [0]),
    "independent space": (1, 8, True, [0]),
    "two labels, uneven": (1, 7, True, [0, 1]),
    "plain SimCLR, uneven": (1, 7, False, []),
    "CTC": (2, 8, False, []),
    "CTC, uneven": (2, 7, False, []),
}


def one_step(stage, n, independent, columns, rank=0, size=1):
    """Loss, gradients and buffers after one training step on this process's share."""
    generator = torch.Generator().manual_seed(1)
    n_frames = torch.randint(12, 60, (n,), generator=generator)
    features = torch.randn(2, n, 60, 80, generator=generator)
    features = features * length_mask(n_frames, 60)[:, :, None]
    targets = torch.randint(0, 5, (n, 2), generator=generator)
    mine = slice(rank, None, size)
    torch.manual_seed(0)
    if stage == 1:
        model = FairASR(CONFIG, len(columns), independent)
        z, reversed_z = model(
            torch.cat([features[0, mine], features[1, mine]]), n_frames[mine].repeat(2)
        )
        z1, z2 = map(runtime.gather, z.chunk(2))
        loss = losses.info_nce(z1, z2)
        for column, r in zip(columns, reversed_z):
            r1, r2 = map(runtime.gather, r.chunk(2))
            y = runtime.gather(LABELS[:n][mine][:, column])
            loss = loss + 0.7 * losses.sup_con(r1, r2, y) / len(columns)
    else:
        model = ConformerCTC(CONFIG, vocab_size=5)
        log_probs, lengths = model.log_probs(features[0, mine], n_frames[mine])
        each = losses.ctc_loss(log_probs, lengths, targets[mine], torch.full((len(lengths),), 2))
        loss = each.sum() * size / runtime.total(torch.tensor(len(each)))
    loss.backward()
    runtime.average_gradients(model)
    grads = {k: p.grad for k, p in model.named_parameters()}
    value = runtime.total(loss) / size
    return value, grads, dict(model.named_buffers())


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {name: one_step(*case, rank, 2) for name, case in CASES.items()}
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(two_processes, name):
    value, grads, buffers = one_step(*CASES[name])
    for results in two_processes:
        value2, grads2, buffers2 = results[name]
        assert torch.isclose(value, value2, atol=1e-5)
        for k in grads:
            assert torch.allclose(grads[k], grads2[k], rtol=1e-4, atol=1e-5), k
        for k in buffers:
            assert torch.allclose(buffers[k].float(), buffers2[k].float(), atol=1e-5), k
