"""CUDA graphs of an encoder's training step.

A Conformer is thousands of small kernels, and Python takes longer to start them than a GPU to run
them. So the kernels of a batch are recorded, and later started by one call for the forward and one
for the backward pass. A record holds for batches of one shape, and for tensors that stay where they
were in memory; dropout's random numbers are new each time, the same as without a record.
"""

import functools
import gc
from contextlib import contextmanager

import torch
from torch import nn

from fairasr_min.conformer import recurring

MOST = 64  # shapes recorded


def record_steps(encoder: nn.Module) -> None:
    """From now on encoder(features, n_frames), a Conformer on a GPU, is recorded and replayed in
    training.

    Comes after runtime.joined(): each backward pass adds to the gradients that the parameters have
    now (else to zeros made here), and these must stay (zero_grad(set_to_none=False)). All records
    share memory: a batch's backward pass comes before the next batch. RuntimeError otherwise.
    """
    _stream().wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(_stream())
    encoder.forward = _Graphs(encoder)


@functools.cache
def _stream():
    """Where all work goes from then on: what was begun on CUDA's default stream cannot be recorded,
    and a parameter's gradient counts as begun where it was first computed."""
    return torch.cuda.Stream()


class _Graphs:
    def __init__(self, encoder):
        self.encoder, self.eager = encoder, encoder.forward
        self.parameters = list(encoder.parameters())
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.grads = [p.grad for p in self.parameters]
        self.pool = torch.cuda.graph_pool_handle()  # of memory, one for all: one is in use at once
        self.records = {}  # by shape; None after it was seen once
        self.turn = 0  # batches replayed

    def __call__(self, features, n_frames):
        """(B, T, F), (B,) -> (B, T', D), (B,)."""
        if not (self.encoder.training and torch.is_grad_enabled()) or self.encoder.checkpointing:
            return self.eager(features, n_frames)
        features = recurring(features)
        shape = features.shape, torch.is_autocast_enabled("cuda")
        if shape not in self.records:  # what happens but once is not worth a record
            if len(self.records) < MOST:
                self.records[shape] = None
            return self.eager(features, n_frames)
        if self.records[shape] is None:
            self.records[shape] = _Record(self, features, n_frames)
        self.turn += 1
        return _Replay.apply(self, self.records[shape], features, n_frames, self.parameters[0])


class _Record:
    """Both graphs of one shape. To record computes nothing."""

    def __init__(self, graphs, features, n_frames):
        self.features, self.n_frames = features.clone(), n_frames.clone()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recording(self.forward, graphs.pool):
            out, self.lengths = graphs.eager(self.features, self.n_frames)
        self.d_out = torch.empty_like(out)
        with torch.autocast("cuda", enabled=False), _recording(self.backward, graphs.pool):
            grads = torch.autograd.grad(out, graphs.parameters, self.d_out)
            # laid out alike, or each would be added by a kernel of its own
            grads = [
                g if g.stride() == sum_.stride() else torch.empty_like(sum_).copy_(g)
                for g, sum_ in zip(grads, graphs.grads)
            ]
            torch._foreach_add_(graphs.grads, grads)
        self.out = out.detach()


@contextmanager
def _recording(graph, pool):
    """What is inside goes into the graph. No garbage is collected meanwhile: among it may be the
    graph of a model that is gone, and to free that breaks the recording (pytorch/pytorch#161037).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        # thread_local: the thread that pins memory may go on
        with torch.cuda.graph(
            graph, pool=pool, stream=_stream(), capture_error_mode="thread_local"
        ):
            yield
    finally:
        if collecting:
            gc.enable()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, record, features, n_frames, parameter):
        """parameter: any of them, so that the backward pass comes here."""
        ctx.graphs, ctx.record, ctx.turn = graphs, record, graphs.turn
        record.features.copy_(features)
        record.n_frames.copy_(n_frames)
        record.forward.replay()
        lengths = record.lengths.detach()
        ctx.mark_non_differentiable(lengths)
        return record.out.detach(), lengths

    @staticmethod
    def backward(ctx, d_out, _):
        graphs, record = ctx.graphs, ctx.record
        if ctx.turn != graphs.turn:
            raise RuntimeError("another batch has been encoded since, in the same memory")
        if any(p.grad is not sum_ for p, sum_ in zip(graphs.parameters, graphs.grads)):
            raise RuntimeError("a gradient is another tensor now: zero_grad(set_to_none=False)")
        record.d_out.copy_(d_out)
        record.backward.replay()
        return None, None, None, None, None
