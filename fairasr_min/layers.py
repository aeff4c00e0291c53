"""What every part of the encoder is made of, as fast as PyTorch's own operators can do it on a CPU:
linear layers, LayerNorm, dropout. On a GPU it is nearly what nn.Linear, nn.LayerNorm and nn.Dropout
do.

Shapes: D numbers in, D2 numbers out, B batch; "..." any dimensions before.
"""

import functools
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) -> (B, size) bool, true where an utterance has content and false on its padding."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


_held = None  # what has been made of weights, inside of weights_held()


@contextmanager
def weights_held():
    """For the encoding of many batches: what a forward without gradient makes of weights alone
    (casts, arrangements) is made once, and takes as much memory as they. They must not change
    inside, where that would go unnoticed; so nothing can be trained there."""
    global _held
    before, _held = _held, {}
    try:
        yield
    finally:
        _held = before


def once(make, *of):
    """make(*of), a function of weights; while they are held, only the first time."""
    if _held is None or torch.is_grad_enabled():
        return make(*of)
    if (make, *of) not in _held:
        _held[make, *of] = make(*of)
    return _held[make, *of]


class Linear(nn.Linear):
    """nn.Linear by linear()."""

    def forward(self, x):
        """(..., D) -> (..., D2)."""
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None, then: str = "none"):
    """F.linear: (..., D), (D2, D), (D2,) -> (..., D2), then "swish" or "relu" of it.

    On a CPU by oneDNN's operator, as torch.compile would call it, which adds the bias on the way,
    and without a gradient also takes what follows. In float32 PyTorch itself would call MKL, which
    on CPUs that are not Intel's uses 256 of 512 vector bits, and takes twice as long."""
    dtype = product_type(x)
    onednn = x.device.type == "cpu" and _onednn_takes(dtype)
    if onednn and not torch.is_grad_enabled():
        weight, bias = once(_onednn_operands, weight, bias, dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, then, [], "")
    if onednn and dtype == torch.float32:
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    else:
        y = F.linear(x, weight, bias)
    if then == "swish":
        y = F.silu(y)
    elif then == "relu":
        y = F.relu_(y)  # no view yet: in place on one, autograd would copy the gradient
    return y.reshape(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """linear() in float32 on a CPU, with a gradient, for which oneDNN's operator has none."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """(N, D), (D2, D), (D2,) or None -> (N, D2)."""
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        """(N, D2) -> the gradients of all three."""
        x, weight = ctx.saved_tensors
        d_x = input_gradient(d_y, weight) if ctx.needs_input_grad[0] else None
        d_bias = d_y.sum(0) if ctx.bias else None
        return d_x, transposed_product(d_y, x), d_bias


def _onednn_operands(weight, bias, dtype):
    """A weight and bias (or None) for oneDNN, which takes numbers as they lie in memory."""
    weight, bias = (t if t is None else t.to(dtype).contiguous() for t in (weight, bias))
    if _held is not None:  # in blocks, as it would arrange them for each product
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return weight, bias


def product_type(x) -> torch.dtype:
    """What products of x are computed in, autocast or not."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@functools.cache
def _onednn_takes(dtype) -> bool:
    """Does oneDNN multiply in this type on this machine?"""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def input_gradient(d_y, weight):
    """The gradient of linear()'s x: (..., D2), (D2, D) -> d_y weight (..., D). Other products than
    MKL's want the weight transposed in memory, which costs a copy."""
    return linear(d_y, weight.t()) if _mkl_is_slow_with(d_y) else d_y @ weight


def transposed_product(y, x):
    """The weight gradient of linear(): (..., D2), (..., D) -> y^T x (D2, D)."""
    if _mkl_is_slow_with(x):
        # as the gradient of a convolution's weight, which oneDNN computes; a kernel of 1 has
        # nothing to dilate: it only keeps PyTorch from its own loops on one thread
        shape = (y.shape[-1], x.shape[-1], 1, 1)
        return nn.grad.conv2d_weight(_image(x), shape, _image(y), dilation=2)[:, :, 0, 0]
    y, x = y.flatten(0, -2), x.flatten(0, -2)
    if x.device.type == "cpu" and x.dtype == torch.float32 and y.shape[1] < x.shape[1]:
        return (x.t() @ y).t()  # of more rows than columns, MKL takes down to 0.8 of the time
    return y.t() @ x


def _mkl_is_slow_with(x) -> bool:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # oneDNN, in bfloat16
        return False
    return x.dtype == torch.float32 and _onednn_takes(x.dtype) and _mkl_takes_half()


CPU_INFO = Path("/proc/cpuinfo")  # Linux's


@functools.cache
def _mkl_takes_half() -> bool:
    """Has this CPU vectors of 512 bits, of which MKL uses half, since it is not Intel's? AMD's
    family 25 (Zen 4) takes them in two turns of 256: there, half is all. Where MKL uses all,
    oneDNN's gradient of a weight takes up to two (512 bits) or four times (256) as long."""
    cpu = torch.cpu.get_capabilities()
    if not cpu.get("avx512_f", False) or cpu.get("cpu_name", "").startswith("Intel"):
        return False
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    return not re.search(r"^cpu family\s*: 25$", text, re.MULTILINE)


def _image(x):
    """(..., D) -> (1, D, N, 1), channels last: what a convolution of kernel 1 takes for N rows."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, of bfloat16 in bfloat16 (autocast would have a GPU give float32, which every
    block would have to read, add to and cast); on a CPU with its gradient in float32: in bfloat16,
    PyTorch's takes twice as long."""

    def forward(self, x):
        """(..., D) -> (..., D)."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight, self.bias
            if x.device.type != "cpu":
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rate = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rate, weight, bias)
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, mean, rate, weight, bias = ctx.saved_tensors
        all_three = [True, True, True]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_y.float(), x.float(), weight.shape, mean, rate, weight, bias, all_three
        )
        return d_x.to(x.dtype), d_weight, d_bias, None


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU by dropout_mask()."""

    def forward(self, x, residual=None, share: float = 1.0):
        """residual (0 without one) + share * dropout(x)."""
        dropping = self.training and self.p
        if residual is None:
            if not dropping:
                return x
            residual = x.new_zeros(())
        if not dropping:
            return torch.add(residual, x, alpha=share)
        if x.device.type != "cpu":
            return torch.add(residual, F.dropout(x, self.p), alpha=share)
        return _AddDropped.apply(residual, x, self.p, share)


class _AddDropped(torch.autograd.Function):
    """residual + share * dropout(x), which remembers the mask alone."""

    @staticmethod
    def forward(ctx, residual, x, p, share):
        mask, ctx.scale, ctx.dtype = dropout_mask(x.shape, p, x), share * kept_scale(p), x.dtype
        ctx.save_for_backward(mask)
        return torch.add(residual, kept(x, mask), alpha=ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        d_x = kept(grad.to(ctx.dtype), *ctx.saved_tensors).mul_(ctx.scale)
        return grad, d_x, None, None


PLACES = 2**22  # where a mask may begin
_tables = {}  # of masks, by p, type and device


def dropout_mask(shape, p: float, like: torch.Tensor) -> torch.Tensor:
    """Integers as wide as the numbers of like: 0 with probability p, else all bits 1. On a GPU
    bools: it draws as fast as it reads.

    One number is drawn: where, in a long table of independent draws, the mask begins, as Salimans
    et al. do with noise (Evolution Strategies, 2017). So nothing has to be kept for the gradient,
    and a training step on a CPU takes 5 % less. Within a mask all is as if drawn for it; two masks
    share draws, at places that chance decides. The table is the same in every process and run; it
    grows with the largest mask, and what it holds never changes.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p)
    size, key = math.prod(shape), (p, like.dtype, like.device)
    if len(_tables.get(key, ())) < PLACES + size:
        with torch.inference_mode(False):  # or it could not be kept for a gradient
            draws = torch.Generator().manual_seed(0)
            draws = torch.rand(1 << (PLACES + size).bit_length(), generator=draws)
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.dtype.itemsize]
            _tables[key] = -draws.ge_(p).to(like.device, bits)
    start = int(torch.randint(PLACES, ()))
    return _tables[key][start : start + size].view(shape)


def kept(x, mask) -> torch.Tensor:
    """x where the mask has ones, else 0. By its bits: loops over integers are twice as fast as
    those over bfloat16, and over bools slower than either."""
    if mask.dtype == torch.bool:  # the fastest kernel of a GPU for that
        return torch.ops.aten.native_dropout_backward(x, mask, 1.0)
    return (x.view(mask.dtype) & mask).view(x.dtype)


def keep_(x, mask) -> torch.Tensor:
    """kept(), on a CPU written into x: memory that is in a cache already."""
    if mask.dtype == torch.bool:
        return kept(x, mask)
    x.view(mask.dtype).bitwise_and_(mask)
    return x


def kept_scale(p: float) -> float:
    """Makes up for what dropout takes away."""
    return 1 / (1 - p) if p < 1 else 0.0
