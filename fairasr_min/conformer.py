"""The Conformer encoder (Gulati et al., Interspeech 2020), with the numerics of NeMo >= 2.5.

Shapes: B batch, T feature frames (10 ms), F mel bins, T' encoder frames (40 ms, unless the config
says otherwise), D model, H heads. Padding is masked wherever it could leak (subsampling, attention,
convolution, BatchNorm), so that an utterance is encoded the same whatever it is batched with.

Parameter names are NeMo's: the encoder of one of its checkpoints loads with strict=True.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ConformerConfig:
    """Architecture, nothing else; stored in every model file. The defaults are size small.

    The second half are options that other models of NeMo's use, FastConformer above all.
    """

    n_mels: int = 80
    d_model: int = 176
    n_layers: int = 16
    n_heads: int = 4
    ff_expansion: int = 4
    conv_kernel: int = 31
    subsampling_channels: int = 176
    dropout: float = 0.1
    dropout_att: float = 0.1

    subsampling_factor: int = 4  # a power of two: encoder frames of 40 ms
    depthwise_subsampling: bool = False  # all its convolutions but the first split in two
    xscaling: bool = True  # times sqrt(d_model) before the first layer
    use_bias: bool = True  # in the linear and convolution layers
    tied_position_biases: bool = False  # one u and v for all layers
    conv_norm: str = "batch_norm"  # or "layer_norm"
    att_context: tuple[int, int] = (-1, -1)  # frames seen to the left and right; -1: all
    dropout_pre_encoder: float | None = None  # None: as dropout
    dropout_emb: float = 0.0  # of the relative positions
    front_end: dict = field(default_factory=dict)  # arguments of audio.LogMel besides n_mels


SIZES = {
    # for the demo: what two CPU cores train in minutes; SpecAugment is its only regulariser
    "tiny": ConformerConfig(
        d_model=96, n_layers=4, conv_kernel=15, subsampling_channels=32, dropout=0, dropout_att=0
    ),
    # NeMo's conformer_ctc small, medium and large
    "small": ConformerConfig(),
    "medium": ConformerConfig(d_model=256, n_layers=18, subsampling_channels=256),
    "large": ConformerConfig(d_model=512, n_layers=18, n_heads=8, subsampling_channels=512),
}


def _halved(n):
    """Frames left by a convolution of kernel 3, stride 2, padding 1 (ints or tensors)."""
    return (n - 1) // 2 + 1


def encoder_frames(n_frames, factor: int = 4):
    """Encoder frames (40 ms) of n feature frames (10 ms); ints or tensors."""
    while factor > 1:
        n_frames, factor = _halved(n_frames), factor // 2
    return n_frames


def _valid(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) -> (B, size) bool, false on padding. (audio.length_mask; this file imports nothing.)"""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


class Linear(nn.Linear):
    """nn.Linear by linear()."""

    def forward(self, x):
        """(..., D) -> (..., D2)."""
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear: (..., D), (D2, D), (D2,) -> (..., D2); in float32 on a CPU as a convolution of
    kernel 1. That is computed by oneDNN, with the whole vector width of the machine; PyTorch's own
    way is MKL, which takes half of it where Intel did not build the CPU, and twice the time."""
    if not _by_convolution(x):
        return F.linear(x, weight, bias)
    # a kernel of 1 has nothing to dilate: it only keeps PyTorch from its own loops on one thread
    y = F.conv2d(_image(x), weight[:, :, None, None], bias, dilation=2)
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], len(weight))


def transposed_product(y, x):
    """The weight gradient of linear(): (..., D2), (..., D) -> y^T x (D2, D)."""
    if not _by_convolution(x):
        return y.flatten(0, -2).t() @ x.flatten(0, -2)
    shape = (y.shape[-1], x.shape[-1], 1, 1)
    return nn.grad.conv2d_weight(_image(x), shape, _image(y), dilation=2)[:, :, 0, 0]


def _by_convolution(x) -> bool:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # oneDNN, in bfloat16
        return False
    return x.dtype == torch.float32


def _image(x):
    """(..., D) -> (1, D, N, 1), channels last: what a convolution of kernel 1 takes for N rows."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU from one random byte an element: drawn eight at a time, a tenth of the
    cost of PyTorch's. p is rounded to 1/256, and the scale follows."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return _Drop.apply(x, self.p) if x.device.type == "cpu" else super().forward(x)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        draws, ctx.p = random_bytes(x.shape, x.device), p
        ctx.save_for_backward(draws)
        return keep(draws, p, x.dtype).mul_(x).mul_(kept_scale(p))

    @staticmethod
    def backward(ctx, grad):
        (draws,) = ctx.saved_tensors
        return keep(draws, ctx.p, grad.dtype).mul_(grad).mul_(kept_scale(ctx.p)), None


def random_bytes(shape, device) -> torch.Tensor:
    """Uniform uint8, from torch's generator, or on a CPU from one that it seeds: a third faster."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.uint8, device=device).random_()
    size, seed = math.prod(shape), int(torch.randint(2**62, ()))
    words = torch.from_numpy(np.random.SFC64(seed).random_raw(size // 8 + 1))
    return words.view(torch.uint8)[:size].view(shape)


def keep(draws, p: float, dtype) -> torch.Tensor:
    """0 for the fraction p of the lowest draws, else 1. No bools: loops over them are slow."""
    return draws.to(dtype).ge_(round(256 * p))


def kept_scale(p: float) -> float:
    """Makes up for what dropout takes away."""
    return 256 / max(1, 256 - round(256 * p))


class Subsampling(nn.Module):
    """Strided convolutions over time and frequency, each halving both: 10 ms frames to 40 ms."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        c = config.subsampling_channels
        layers = [nn.Conv2d(1, c, 3, stride=2, padding=1), nn.ReLU(inplace=True)]
        for _ in range(config.subsampling_factor.bit_length() - 2):
            if config.depthwise_subsampling:
                layers += [nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c), nn.Conv2d(c, c, 1)]
            else:
                layers += [nn.Conv2d(c, c, 3, stride=2, padding=1)]
            layers += [nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)  # the indices name the parameters
        bins = encoder_frames(config.n_mels, config.subsampling_factor)
        self.out = Linear(c * bins, config.d_model)
        self.to(memory_format=torch.channels_last)  # convolutions of twice the speed

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T', D), (B,)."""
        x = (x * _valid(lengths, x.shape[1])[:, :, None])[:, None]  # (B, 1, T, F)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d):
                dense = layer.in_channels > 1 and layer.groups == 1 and layer.stride == (2, 2)
                if dense and _by_convolution(x):
                    x = _DenseConv.apply(x, layer.weight, layer.bias)
                else:
                    x = layer(x)
                lengths = _halved(lengths) if layer.stride == (2, 2) else lengths
            else:
                # The biases have written into the padding, and the next kernel would read it. In
                # place, like the ReLU: these are by far the largest tensors of all. And without a
                # gradient: where the ReLU is given 0, it passes none on.
                with torch.no_grad():
                    x.mul_(_valid(lengths, x.shape[2])[:, None, :, None].to(x.dtype))
                x = layer(x)
        # (B, C, T', F') lies in memory as (B, T', F', C): reorder the small weight, not x
        weight = self.out.weight.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1)
        return linear(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias), lengths


class _DenseConv(torch.autograd.Function):
    """Convolution of kernel 3, stride 2 and padding 1, channels last, float32, CPU. Its weight
    gradient is the product of the output's with the patches of the input, one utterance at a time:
    oneDNN's own takes up to five times as long."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """(B, C, T, F), (C2, C, 3, 3), (C2,) -> (B, C2, T/2, F/2)."""
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        d_y = d_y.contiguous(memory_format=torch.channels_last)
        options = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, ...
        only_x = [True, False, False]
        d_x = torch.ops.aten.convolution_backward(d_y, x, weight, None, *options, only_x)[0]
        d_weight = 0
        for one, d_one in zip(x, d_y):
            patches = F.pad(one.permute(1, 2, 0), (0, 0, 1, 1, 1, 1))  # (T + 2, F + 2, C)
            patches = patches.unfold(0, 3, 2).unfold(1, 3, 2)  # (T', F', C, 3, 3)
            patches = patches.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)  # (T' F', 9 C)
            d_weight += transposed_product(d_one.permute(1, 2, 0).flatten(0, 1), patches)
        d_weight = d_weight.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return d_x, d_weight, d_y.sum((0, 2, 3))


def relative_positions(size: int, d_model: int, device) -> torch.Tensor:
    """Sinusoids (2 size, D) of the relative positions size, ..., 0, ..., -(size - 1).

    The first, which no query needs, makes a row of scores as long as by_key() wants it.
    """
    position = torch.arange(size, -size, -1, device=device, dtype=torch.float32)
    rate = torch.arange(0, d_model, 2, device=device, dtype=torch.float32)
    angle = position[:, None] * torch.exp(rate * (-math.log(10_000.0) / d_model))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # sin, cos interleaved


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Dai et al., Transformer-XL, 2019).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_{i-j}) / sqrt(D / H)
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float, bias: bool = True):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.linear_q = Linear(d_model, d_model, bias)
        self.linear_k = Linear(d_model, d_model, bias)
        self.linear_v = Linear(d_model, d_model, bias)
        self.linear_out = Linear(d_model, d_model, bias)
        self.linear_pos = Linear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))

    def forward(self, x, valid, context, positions):
        """(B, N, D), (B, N) bool, None or (N, N) bool: the keys that a query may see, (2N, D)
        -> (B, N, D)."""
        three = (self.linear_q, self.linear_k, self.linear_v)  # in one product
        bias = None if three[0].bias is None else torch.cat([one.bias for one in three])
        qkv = linear(x, torch.cat([one.weight for one in three]), bias)
        qkv = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 3, 0, 1, 4)
        q, k, v = qkv.contiguous().unbind()  # (H, B, N, D/H)
        p = self.linear_pos(positions).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
        # Finite masks: a row without any key stays a number, and exp(-1e4) is 0 all the same.
        padding = ((valid.to(q.dtype) - 1) * 1e4)[None, :, :, None]  # (1, B, N, 1)
        if context is not None:
            context = (context.to(q.dtype) - 1) * 1e4
        u, v_bias = self.pos_bias_u.to(q.dtype), self.pos_bias_v.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        y = _Attention.apply(q, k, v, p, u, v_bias, padding, context, dropout)
        return self.linear_out(y.permute(1, 2, 0, 3).flatten(2))


class _Attention(torch.autograd.Function):
    """softmax((q + u) k^T + shifted((q + v) p^T)), dropout, times values. The gradient is by hand:
    of all the (N, N) matrices only the weights are kept, and a byte each for dropout.

    ROWS queries at a time: the positions that these need are N + ROWS of the 2N, and what is
    not kept stays small, however long the audio.
    """

    ROWS = 128

    @staticmethod
    def operands(q, k, bias_u, bias_v, padding):
        """(H, B, N, d + 4) of q and k, (H, B, N, d) of q: with biases, scale and mask. Padding is
        masked by more dimensions of the product (four: rows stay aligned), not by a pass over
        (N, N)."""
        scale = q.shape[-1] ** -0.5
        q_u, q_v = ((q + bias[:, None, None]) * scale for bias in (bias_u, bias_v))
        ones = q.new_ones(1).expand(*q.shape[:3], 4)
        mask = (padding / 4).expand_as(ones)
        return torch.cat([q_u, ones], -1), q_v, torch.cat([k, mask], -1)

    @staticmethod
    def forward(ctx, q, k, v, p, bias_u, bias_v, padding, context, dropout):
        """(H, B, N, d) three times, (H, 2N, d), (H, d) twice, (1, B, N, 1) and (N, N) to add or
        None -> (H, B, N, d)."""
        (h, b, n, d), blocks, out = v.shape, [], torch.empty_like(v)
        q_u, q_v, k_masked = _Attention.operands(q, k, bias_u, bias_v, padding)
        keys, values = k_masked.flatten(0, 1).transpose(-2, -1), v.flatten(0, 1)
        for start in range(0, n, _Attention.ROWS):
            rows = slice(start, min(start + _Attention.ROWS, n))
            near = slice(n - rows.stop, 2 * n - start)  # the positions of these rows, and one
            scores = q_v[:, :, rows].flatten(1, 2) @ p[:, near].transpose(-2, -1)
            scores = by_key(scores.unflatten(1, (b, -1))).flatten(0, 1)
            scores = torch.baddbmm(scores, q_u[:, :, rows].flatten(0, 1), keys)  # (H B, R, N)
            if context is not None:
                scores += context[rows]
            wide = torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores, -1, dtype=wide).to(v.dtype)
            draws = random_bytes(weights.shape, v.device) if dropout else None
            kept = keep(draws, dropout, v.dtype).mul_(weights) if dropout else weights
            out[:, :, rows] = (kept @ values).view(h, b, -1, d)
            if ctx.needs_input_grad[0]:
                blocks += [weights, draws]
        out *= kept_scale(dropout)
        ctx.save_for_backward(q, k, v, p, bias_u, bias_v, padding, out, *blocks)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, p, bias_u, bias_v, padding, out, *blocks = ctx.saved_tensors
        h, b, n, d = v.shape
        q_u, q_v, k_masked = _Attention.operands(q, k, bias_u, bias_v, padding)
        keys, values = k_masked.flatten(0, 1), v.flatten(0, 1).transpose(-2, -1)
        inner = (d_out * out).sum(-1, keepdim=True)  # what softmax's gradient subtracts
        d_out = d_out.contiguous() * kept_scale(ctx.dropout)
        d_qu, d_qv, d_k = torch.empty_like(q_u), torch.empty_like(q_v), torch.zeros_like(keys)
        d_v, d_p = torch.zeros(h * b, n, d, dtype=v.dtype, device=v.device), torch.zeros_like(p)
        for start, weights, draws in zip(range(0, n, _Attention.ROWS), blocks[::2], blocks[1::2]):
            rows = slice(start, min(start + _Attention.ROWS, n))
            near = slice(n - rows.stop, 2 * n - start)
            d_rows = d_out[:, :, rows].flatten(0, 1)
            d_scores, kept = d_rows @ values, weights
            if draws is not None:
                kept = keep(draws, ctx.dropout, v.dtype)
                d_scores *= kept
                kept *= weights
            d_v += kept.transpose(-2, -1) @ d_rows
            d_scores = d_scores.sub_(inner[:, :, rows].flatten(0, 1)).mul_(weights)
            d_qu[:, :, rows] = (d_scores @ keys).view(h, b, -1, d + 4)
            d_k += d_scores.transpose(-2, -1) @ q_u[:, :, rows].flatten(0, 1)
            shifted = d_scores.new_zeros(h, b, d_scores.shape[1], near.stop - near.start)
            by_key(shifted).copy_(d_scores.view(h, b, -1, n))
            shifted = shifted.flatten(1, 2)
            d_qv[:, :, rows] = (shifted @ p[:, near]).view(h, b, -1, d)
            d_p[:, near] += shifted.transpose(-2, -1) @ q_v[:, :, rows].flatten(1, 2)
        d_qu, d_qv = d_qu[..., :d] * d**-0.5, d_qv * d**-0.5
        d_k, d_v = d_k[..., :d].view_as(k), d_v.view_as(v)
        return d_qu + d_qv, d_k, d_v, d_p, d_qu.sum((1, 2)), d_qv.sum((1, 2)), None, None, None


def by_key(scores: torch.Tensor) -> torch.Tensor:
    """(..., R, N + R) by relative position -> a view (..., R, N) by key: out[i, j] = scores[i, R -
    i + j].

    Row i begins at i (N + R); the wanted element lies at R + i (N + R - 1) + j, which is row i,
    column j of a reshape that begins at R.
    """
    rows, width = scores.shape[-2:]
    flat = scores.flatten(-2)[..., rows:]
    return flat.unflatten(-1, (rows, width - 1))[..., : width - rows]


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics run over valid frames only, of all processes together.

    NeMo's run over padding too: there, a longer neighbour changes the statistics.
    """

    def forward(self, x, valid):
        """(B, T', D), (B, T', 1) bool -> (B, T', D). Evaluation uses the running statistics."""
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return (x * scale + (self.bias - self.running_mean * scale)).to(x.dtype)
        y, mean, variance, count = _BatchNorm.apply(x, valid, self.weight, self.bias, self.eps)
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        return y


class _BatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of valid frames, with its gradient by hand: of the dozen
    tensors on the way only the input is kept. Always in float32."""

    @staticmethod
    def forward(ctx, x, valid, weight, bias, eps):
        """(B, T', D), (B, T', 1) bool, (D,), (D,) -> y, mean (D,), variance (D,), count."""
        wide, valid = x.float(), valid.float()
        count = _over_processes(valid.sum()).clamp(min=1)
        mean = _over_processes((wide * valid).sum((0, 1))) / count
        centred = wide - mean
        variance = _over_processes((centred * valid).square_().sum((0, 1))) / count
        ctx.save_for_backward(x, valid, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        y = centred.mul_(weight * (variance + eps).rsqrt()).add_(bias)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, d_y, *_):
        x, valid, weight, mean, rate, count = ctx.saved_tensors
        d_y, normal = d_y.float(), (x.float() - mean).mul_(rate)
        d_weight, d_bias = (d_y * normal).sum((0, 1)), d_y.sum((0, 1))
        # both through the statistics, to which every process contributed
        through = _over_processes(torch.stack([d_weight, d_bias])) * (-weight * rate / count)
        d_x = normal.mul_(through[0]).add_(through[1]).mul_(valid)
        d_x.addcmul_(d_y, weight * rate)
        return d_x.to(x.dtype), None, d_weight, d_bias, None


def _over_processes(x):
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


class FrameLayerNorm(nn.LayerNorm):
    """LayerNorm of each frame, in the place of MaskedBatchNorm."""

    def forward(self, x, valid):
        """(B, T', D), (B, T', 1) bool -> (B, T', D)."""
        return super().forward(x)


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise over time, BatchNorm, Swish, pointwise.

    The channels stay last throughout: no transposed copies, and a depthwise convolution (in two
    dimensions, one of size 1, for which there is such a kernel) many times faster.
    """

    def __init__(self, d_model: int, kernel: int, norm: str, bias: bool):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(d_model, 2 * d_model, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(
            d_model, d_model, kernel, padding=(kernel - 1) // 2, groups=d_model, bias=bias
        )
        norms = {"batch_norm": MaskedBatchNorm, "layer_norm": FrameLayerNorm}
        self.batch_norm = norms[norm](d_model)  # NeMo's name, whichever it is
        self.pointwise_conv2 = nn.Conv1d(d_model, d_model, 1, bias=bias)

    def forward(self, x, valid):
        """(B, T', D), (B, T') bool -> (B, T', D)."""
        first, depthwise, last = self.pointwise_conv1, self.depthwise_conv, self.pointwise_conv2
        valid = valid[:, :, None]
        x = F.glu(linear(x, first.weight[:, :, 0], first.bias), dim=-1)
        # In float32, which the BatchNorm wants anyhow: with bfloat16 and 16 channels, oneDNN would
        # build its kernel for ever.
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() * valid).transpose(1, 2)[:, :, None]  # (B, D, 1, T'), padding 0
            pad = (0, depthwise.padding[0])
            x = F.conv2d(x, depthwise.weight[:, :, None], padding=pad, groups=x.shape[1])
            x = x[:, :, 0].transpose(1, 2)
            if depthwise.bias is not None:
                x = x + depthwise.bias  # apart: the convolution takes long over its gradient
        x = F.silu(self.batch_norm(x, valid))
        return linear(x, last.weight[:, :, 0], last.bias)


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dropout: float, bias: bool):
        super().__init__()
        self.linear1 = Linear(d_model, d_inner, bias)
        self.linear2 = Linear(d_inner, d_model, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        """(B, T', D) -> (B, T', D), halved: as a layer adds it, and cheapest on the weights."""
        p = self.dropout.p if self.training else 0.0
        w1, b1, w2, b2 = (
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
        )
        w2, b2 = (0.5 * kept_scale(p)) * w2, None if b2 is None else 0.5 * b2
        if torch.is_autocast_enabled(x.device.type):  # for both directions at once
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in (x, w1, b1, w2, b2))
        return _FeedForward.apply(x, w1, b1, w2, b2, p)


class _FeedForward(torch.autograd.Function):
    """linear2(dropout(silu(linear1(x)))), which keeps of its three wide tensors one: the others are
    cheaper to compute again than to keep. The scale of dropout is in w2."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, p):
        h = linear(x, w1, b1)
        draws = random_bytes(h.shape, h.device) if p else None
        y = F.silu(h)
        if p:
            y *= keep(draws, p, h.dtype)
        ctx.save_for_backward(x, w1, w2, h, draws)
        ctx.p, ctx.bias = p, b1 is not None
        return linear(y, w2, b2)

    @staticmethod
    def backward(ctx, d_out):
        x, w1, w2, h, draws = ctx.saved_tensors
        y, d_h = F.silu(h), linear(d_out, w2.t())
        if ctx.p:
            kept = keep(draws, ctx.p, h.dtype)
            y *= kept
            d_h *= kept
        d_w2 = transposed_product(d_out, y)
        d_h = torch.ops.aten.silu_backward(d_h, h)
        d_b1, d_b2 = (d.sum((0, 1)) if ctx.bias else None for d in (d_h, d_out))
        return linear(d_h, w1.t()), transposed_product(d_h, x), d_b1, d_w2, d_b2, None


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each on LayerNorm(x)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        d, bias = config.d_model, config.use_bias
        inner = d * config.ff_expansion
        self.norm_feed_forward1 = nn.LayerNorm(d)
        self.feed_forward1 = FeedForward(d, inner, config.dropout, bias)
        self.norm_self_att = nn.LayerNorm(d)
        self.self_attn = RelativeAttention(d, config.n_heads, config.dropout_att, bias)
        self.norm_conv = nn.LayerNorm(d)
        self.conv = Convolution(d, config.conv_kernel, config.conv_norm, bias)
        self.norm_feed_forward2 = nn.LayerNorm(d)
        self.feed_forward2 = FeedForward(d, inner, config.dropout, bias)
        self.norm_out = nn.LayerNorm(d)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, valid, context, positions):
        """(B, T', D), (B, T') bool, (T', T') bool or None, (2T', D) -> (B, T', D)."""
        x = x + self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), valid, context, positions))
        x = x + self.dropout(self.conv(self.norm_conv(x), valid))
        x = x + self.dropout(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)


class Conformer(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.pre_encode = Subsampling(config)
        before = config.dropout_pre_encoder
        self.dropout = Dropout(config.dropout if before is None else before)
        self.dropout_emb = Dropout(config.dropout_emb)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))
        if config.tied_position_biases:
            for layer in self.layers:
                layer.self_attn.pos_bias_u = self.layers[0].self_attn.pos_bias_u
                layer.self_attn.pos_bias_v = self.layers[0].self_attn.pos_bias_v

    def forward(self, features: torch.Tensor, n_frames: torch.Tensor):
        """(B, T, F), (B,) -> (B, T', D), lengths (B,). Frames beyond a length have no meaning."""
        x, lengths = self.pre_encode(features, n_frames)
        x = self.dropout(x * math.sqrt(self.config.d_model) if self.config.xscaling else x)
        positions = self.dropout_emb(relative_positions(x.shape[1], x.shape[2], x.device))
        valid = _valid(lengths, x.shape[1])
        context = None  # a query may see all keys but padding
        if self.config.att_context != (-1, -1):
            context = _within(self.config.att_context, x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, valid, context, positions)
        return x, lengths


def _within(context: tuple[int, int], size: int, device) -> torch.Tensor:
    """(size, size) bool: may query i (row) see key j (column)? i - left <= j <= i + right."""
    left, right = (size if side < 0 else side for side in context)
    offset = torch.arange(size, device=device)
    offset = offset[None, :] - offset[:, None]  # j - i
    return (-left <= offset) & (offset <= right)
