"""The Conformer encoder (Gulati et al., Interspeech 2020), with the numerics of NeMo >= 2.5.

Shapes: B batch, T feature frames (10 ms), F mel bins, T' encoder frames (40 ms, unless the config
says otherwise), D model, H heads; T/2 and the like are rounded up. Padding is masked wherever it
could leak (subsampling, attention, convolution, BatchNorm), so that an utterance is encoded the
same whatever it is batched with.

Parameter names are NeMo's: the encoder of one of its checkpoints loads with strict=True.
"""

import functools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairasr_min.layers import (
    Dropout,
    LayerNorm,
    Linear,
    dropout_mask,
    input_gradient,
    keep_,
    kept,
    kept_scale,
    length_mask,
    linear,
    once,
    product_type,
    transposed_product,
)


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
    # for the demo: what two CPU cores train in minutes; regularised by SpecAugment, without dropout
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


def recurring(features):
    """(B, T, F), T filled up with zeros to a multiple of 32 frames, 8 of the encoder, for rows of
    aligned numbers; from 512 frames on, to one that adds a sixteenth at most. So batches have few
    lengths: a GPU takes a second for the first batch of a shape (half of it in cuDNN's
    convolutions: RESULTS.md), and replays those that it knows (graphs.py)."""
    t = features.shape[1]
    return F.pad(features, (0, 0, 0, -t % (1 << max(5, t.bit_length() - 5))))


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
        seen = patches((x * length_mask(lengths, x.shape[1])[:, :, None]).to(product_type(x)))
        lengths = _halved(lengths)
        first, _, *others = self.conv  # _: its ReLU, which linear() takes along
        seen.mul_(length_mask(lengths, seen.shape[1])[:, :, None, None])  # so that padding stays 0
        # the first convolution as a product: a third of the time that one of one channel takes
        weight = once(_with_bias, first.weight, first.bias, seen.shape[-1])
        dense = len(others) > 0 and others[0].groups == 1
        if dense and x.device.type == "cpu" and not seen.requires_grad:
            second, *others = others
            lengths = _halved(lengths)
            x = _TwoConvs.apply(seen, weight, second.weight, second.bias)
        else:
            x = linear(seen, weight, then="relu").permute(0, 3, 1, 2)  # (B, C, T/2, F/2)
        for layer in others:
            if isinstance(layer, nn.ReLU):
                # The biases have written into the padding, and the next kernel would read it. Only
                # behind the shortest utterance, if to know it is not to wait for a GPU; without a
                # gradient: where the ReLU is given 0, it passes none on.
                shortest = int(lengths.min()) if x.device.type == "cpu" else 0
                mask = length_mask(lengths, x.shape[2])[:, None, shortest:, None].to(x.dtype)
                with torch.no_grad():
                    x[:, :, shortest:].mul_(mask)
                x = layer(x)
            else:
                x = layer(x)
                lengths = _halved(lengths) if layer.stride == (2, 2) else lengths
        # (B, C, T', F') lies in memory as (B, T', F', C): reorder the small weight, not x
        weight = once(_channels_last, self.out.weight, x.shape[1])
        return linear(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias), lengths


def _with_bias(weight, bias, width: int):
    """(C, ...), (C,) -> (C, width): the weight, the bias, zeros."""
    weight = torch.cat([weight.flatten(1), bias[:, None]], 1)
    return F.pad(weight, (0, width - weight.shape[1]))


def _channels_last(weight, channels: int):
    """(D, C F') -> (D, F' C)."""
    return weight.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


def patches(x) -> torch.Tensor:
    """(B, T, F) -> (B, T/2, F/2, 16): the nine numbers that a kernel of 3 sees with stride 2 and
    padding 1, a 1 for its bias, and zeros up to a width that products are fast with."""
    b, t, f = x.shape
    out, x = x.new_zeros(b, _halved(t), _halved(f), 16), F.pad(x, (1, 1, 1, 1))
    for i in range(9):
        row, column = divmod(i, 3)
        out[..., i] = x[:, row : row + t : 2, column : column + f : 2]
    out[..., 9] = 1
    return out


class _TwoConvs(torch.autograd.Function):
    """The first two convolutions and the ReLU between them, channels last, on a CPU. What lies
    between is by far the largest tensor of all; of its gradient there is never more than that of
    one utterance, which fits into a cache. No gradient of the features."""

    @staticmethod
    def forward(ctx, seen, w1, w2, b2):
        """(B, T/2, F/2, 16) of patches(), (C, 16), (C2, C, 3, 3), (C2,) -> (B, C2, T/4, F/4)."""
        x = linear(seen, w1, then="relu").permute(0, 3, 1, 2)
        w2 = w2.to(x.dtype)
        ctx.save_for_backward(seen, w1, x, w2)
        return F.conv2d(x, w2, b2.to(x.dtype), stride=2, padding=1)

    @staticmethod
    def backward(ctx, d_y):
        seen, w1, x, w2 = ctx.saved_tensors
        d_y = d_y.contiguous(memory_format=torch.channels_last)
        d_w1, d_w2 = torch.zeros_like(w1), torch.zeros_like(w2, dtype=w1.dtype)
        wanted = (True, x.dtype != torch.float32, False)  # gradients of input, weight, bias
        # stride, padding, dilation; transposed, output's padding, groups
        options = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1, wanted)

        def rows(x):
            return x.permute(0, 2, 3, 1).flatten(0, 2)  # (1, C, T, F) -> (T F, C)

        for d_one, one, seen_one in zip(d_y.split(1), x.split(1), seen):
            d_x, d_w, _ = torch.ops.aten.convolution_backward(d_one, one, w2, None, *options)
            torch.ops.aten.threshold_backward.grad_input(d_x, one, 0, grad_input=d_x)
            d_w1 += transposed_product(rows(d_x), seen_one.flatten(0, 1))
            if d_w is None:
                # a product with what each place saw: up to five times as fast as oneDNN's gradient
                # of the weight in float32
                near = F.pad(one[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1))  # (T/2 + 2, F/2 + 2, C)
                near = near.unfold(0, 3, 2).unfold(1, 3, 2).permute(0, 1, 3, 4, 2).flatten(2)
                d_w = transposed_product(near.flatten(0, 1), rows(d_one))  # (9 C, C2)
                d_w = d_w.unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1)
            d_w2 += d_w
        return None, d_w1, d_w2, d_y.sum((0, 2, 3))


ALIGNED = 16  # numbers in a row, or a multiple: on a CPU, products write those up to twice as fast


def relative_positions(size: int, d_model: int, device) -> torch.Tensor:
    """Sinusoids (2 size + ALIGNED, D) of the relative positions size, ..., 0, ..., -(size - 1), ...

    The first and the last ones no query needs; they make rows of scores as long as by_key() and
    products want them.
    """
    position = torch.arange(size, -size - ALIGNED, -1, device=device, dtype=torch.float32)
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
        """(B, N, D), (B, N) bool, None or (N, N) bool: the keys that a query may see, (P, D) of
        relative_positions() -> (B, N, D)."""
        attend = self.by_hand if x.device.type == "cpu" else self.fused
        return attend(x, valid, context, positions, self.dropout if self.training else 0.0)

    def fused(self, x, valid, context, positions, dropout):
        """forward() on a GPU: by PyTorch's fused attention. What a key scores for its position, and
        the masks, come as numbers to add to the scores; no other (N, N) matrices are kept."""
        n, (h, d) = x.shape[1], self.pos_bias_u.shape
        dtype, room = product_type(x), -d % 8  # heads of a multiple of 8 numbers: aligned rows

        def widened(of_heads):  # (..., H, d, D) -> (..., H, d + room, D)
            return F.pad(of_heads, (0, 0, 0, room))

        three = (self.linear_q, self.linear_k, self.linear_v)
        weight = widened(torch.stack([one.weight for one in three]).unflatten(1, (h, d)))
        weight_p = widened(self.linear_pos.weight.unflatten(0, (h, d)))
        bias = None
        if three[0].bias is not None:
            bias = torch.stack([one.bias for one in three]).view(3, h, d, 1)
            bias = widened(bias).flatten()
        qkv = linear(x, weight.flatten(0, 2), bias)  # (B, N, 3 H (d + room))
        q, k, v = qkv.unflatten(2, (3, h, -1)).unbind(2)  # (B, N, H, d + room)
        near = positions[: (2 * n + ALIGNED - 1) // ALIGNED * ALIGNED]
        p = linear(near, weight_p.flatten(0, 1)).unflatten(1, (h, -1))  # (P, H, d + room)
        of_u, of_v = (F.pad(b, (0, room)).to(dtype) for b in (self.pos_bias_u, self.pos_bias_v))
        # (H, B N, d) by (H, d, P)
        scores = torch.bmm(((q + of_v) * d**-0.5).flatten(0, 1).transpose(0, 1), p.permute(1, 2, 0))
        seen = valid[:, None, None] if context is None else valid[:, None, None] & context
        mask = (seen.to(dtype) - 1) * 1e4  # finite: a row without any key stays a number
        q, k, v = ((q + of_u).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = _fused_attention(q, k, v, scores.unflatten(1, (-1, n)), mask, dropout, d)
        return self.linear_out(y[..., :d].transpose(1, 2).flatten(2))

    def by_hand(self, x, valid, context, positions, dropout):
        """forward() on a CPU, where products for each part take less time than PyTorch's fused
        attention (RESULTS.md)."""
        h = self.n_heads
        weight, bias, weight_p = once(self.extended, dropout)
        qkv = linear(x, weight, bias).view(*x.shape[:2], 3, h, -1).permute(2, 3, 0, 1, 4)
        p = linear(positions, weight_p).view(len(positions), h, -1).transpose(0, 1)
        # Finite masks: a row without any key stays a number, and exp(-1e4) is 0 all the same.
        padding = (valid.to(qkv.dtype) - 1) * 1e4
        if context is not None:
            context = (context.to(qkv.dtype) - 1) * 1e4
        return self.linear_out(_Attention.apply(qkv, p, padding, context, dropout))

    def extended(self, dropout: float):
        """The weight (3 H (d + 4), D) and bias of one product for q, k and v, and the weight
        (H (d + 4), D) of p: every head has four dimensions more than its d = D / H.

        q is 1 in them. k has in the first what a key scores whatever the query, u . k, and p has
        v . p; _Attention writes the mask of padding into the second: none of these takes a pass
        over (N, N), nor u and v one over q. The last two are 0: rows stay aligned. q, u and v are
        scaled by d^-1/2 / ln 2, for attention_weights(), the values by what makes up for dropout.
        """
        h, d = self.pos_bias_u.shape
        scale = d**-0.5 / math.log(2)
        u, v_p = (bias[:, :, None] * scale for bias in (self.pos_bias_u, self.pos_bias_v))
        three = (self.linear_q, self.linear_k, self.linear_v)
        weight = torch.cat([one.weight for one in three])
        no_bias = three[0].bias is None
        bias = weight.new_zeros(len(weight)) if no_bias else torch.cat([one.bias for one in three])
        # the bias rides along as one more column: q, k, v (H, d, D + 1)
        q, k, v = torch.cat([weight, bias[:, None]], 1).view(3, h, d, -1)
        zeros = q.new_zeros(h, 4, q.shape[-1])
        ones = F.pad(zeros[..., 1:], (0, 1), value=1.0)  # as biases
        q = torch.cat([q * scale, ones], 1)
        k = torch.cat([k, (u * k).sum(1, keepdim=True), zeros[:, 1:]], 1)
        v = torch.cat([v * kept_scale(dropout), zeros], 1)
        both = torch.cat([q, k, v]).flatten(0, 1)
        p = self.linear_pos.weight.view(h, d, -1)
        p = torch.cat([p, (v_p * p).sum(1, keepdim=True), zeros[:, 1:, 1:]], 1)
        weight, bias = both.split(weight.shape[1], dim=1)
        return weight, bias.squeeze(1), p.flatten(0, 1)


# Compiled, the shift takes ten times as long as its reads and writes: each index is divided by
# lengths that are variables. (torch.compiler.disable is the same, but imports the compiler at once:
# a second and 100 MB, for whoever does not use it.)
@torch._disable_dynamo
def _fused_attention(q, k, v, scores, mask, dropout: float, d: int):
    """(B, H, N, d and more) three times, scores by position (H, B, N, W), mask (B, 1, 1 or N, N) to
    add -> as v."""
    scores = _MaskedByKey.apply(scores, mask, q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, scores, dropout, scale=d**-0.5)


class _MaskedByKey(torch.autograd.Function):
    """by_key() and a mask, (H, B, N, W), (B, 1, 1 or N, N) -> (B, H, N, N), with a gradient of one
    pass over zeros; PyTorch's takes one for each of the slices."""

    @staticmethod
    def forward(ctx, scores, mask, n):
        ctx.shape = scores.shape
        return by_key(scores, n).transpose(0, 1) + mask

    @staticmethod
    def backward(ctx, grad):
        d_scores = grad.new_zeros(ctx.shape)
        by_key(d_scores, grad.shape[-1]).copy_(grad.transpose(0, 1))
        return d_scores, None, None


class _Attention(torch.autograd.Function):
    """softmax(q k^T + shifted(q p^T)), dropout, times values. The gradient is by hand: of all the
    (N, N) matrices only the weights are kept.

    Some rows (queries) at a time: the positions that these need are about N + rows of the 2N, and
    what is not kept stays small, however long the audio.
    """

    BYTES = 512  # of a column of the scores taken at a time: 128 rows in float32, 256 in bfloat16

    @staticmethod
    def row_slices(x):
        """(..., N, d) -> slices of N, each of so many rows, and of the positions that they need."""
        n, size = x.shape[-2], _Attention.BYTES // x.element_size()
        for start in range(0, n, size):
            stop = min(start + size, n)
            width = -((n + stop - start) // -ALIGNED) * ALIGNED  # N + rows, rounded up
            yield slice(start, stop), slice(n - stop, n - stop + width)

    @staticmethod
    def forward(ctx, qkv, p, padding, context, dropout):
        """(3, H, B, N, d + 4), (H, P, d + 4), (B, N) and (N, N) to add or None -> (B, N, H d)."""
        _, h, b, n, wide = qkv.shape
        d, blocks = wide - 4, []
        qkv = qkv.clone(memory_format=torch.contiguous_format)  # ours to write into
        qkv[1, ..., d + 1] += padding
        q, keys, values = qkv.flatten(1, 2)  # (H B, N, d + 4)
        out = qkv.new_empty(b, n, h, d)
        for rows, near in _Attention.row_slices(qkv):
            scores = torch.bmm(qkv[0, :, :, rows].flatten(1, 2), p[:, near].transpose(1, 2))
            scores = by_key(scores.unflatten(1, (b, -1)), n).flatten(0, 1)
            scores = torch.baddbmm(scores, q[:, rows], keys.transpose(1, 2))  # (H B, R, N)
            if context is not None:
                scores += context[rows]
            weights = attention_weights(scores)
            mask = dropout_mask(weights.shape, dropout, weights) if dropout else None
            dropped = kept(weights, mask) if dropout else weights
            y = torch.bmm(dropped, values).view(h, b, -1, wide)[..., :d]
            out[:, rows] = y.permute(1, 2, 0, 3)
            if ctx.needs_input_grad[0]:
                blocks += [weights, mask]
        ctx.save_for_backward(qkv, p, *blocks)
        return out.flatten(2)

    @staticmethod
    def backward(ctx, d_out):
        qkv, p, *blocks = ctx.saved_tensors
        _, h, b, n, wide = qkv.shape
        q, keys, values = qkv.flatten(1, 2)
        values_ln2 = values * math.log(2)  # by which the scores were too large for a softmax
        d_y = d_out.view(b, n, h, wide - 4).permute(2, 0, 1, 3)
        d_y = F.pad(d_y, (0, 4)).flatten(0, 1)  # (H B, N, d + 4)
        d_qkv, d_p = torch.empty_like(qkv), torch.zeros_like(p)
        d_q, d_k, d_v = d_qkv.flatten(1, 2)
        slices = _Attention.row_slices(qkv)
        for (rows, near), weights, mask in zip(slices, blocks[::2], blocks[1::2]):
            d_scores, dropped = torch.bmm(d_y[:, rows], values_ln2.transpose(1, 2)), weights
            if mask is not None:
                d_scores, dropped = keep_(d_scores, mask), kept(weights, mask)
            d_scores = torch._softmax_backward_data(d_scores, weights, -1, weights.dtype)
            shifted = d_scores.new_zeros(h, b, d_scores.shape[1], near.stop - near.start)
            by_key(shifted, n).copy_(d_scores.view(h, b, -1, n))
            shifted = shifted.flatten(1, 2)  # (H, B R, W)
            d_rows = torch.bmm(d_scores, keys).view(h, -1, wide)
            d_q[:, rows] = torch.baddbmm(d_rows, shifted, p[:, near]).view(h * b, -1, wide)
            d_p[:, near] += torch.bmm(shifted.transpose(1, 2), qkv[0, :, :, rows].flatten(1, 2))
            again = int(rows.start > 0)  # the first block overwrites what was not initialised
            torch.baddbmm(d_v, dropped.transpose(1, 2), d_y[:, rows], beta=again, out=d_v)
            torch.baddbmm(d_k, d_scores.transpose(1, 2), q[:, rows], beta=again, out=d_k)
        return d_qkv, d_p, None, None, None


def attention_weights(scores: torch.Tensor) -> torch.Tensor:
    """softmax(scores ln 2) over the last dimension, computed in float32 at least.

    On a CPU as powers of two, of which PyTorch computes in a second four times as many as powers of
    e, and without taking their maximum from the scores first, which only numbers far out need, or
    rows that may see no key: a sum out of range says so. Half to two thirds of softmax's time.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = torch.exp2(wide, out=None if wide is scores else wide)  # scores stay
    total = weights.sum(-1, keepdim=True)
    if total.min() > 2.0**-100 and total.max() < 2.0**100:
        return weights.mul_(1 / total).to(scores.dtype)
    return torch.softmax(scores.to(weights.dtype) * math.log(2), -1).to(scores.dtype)


def by_key(scores: torch.Tensor, n: int) -> torch.Tensor:
    """(..., R, W) by relative position, W >= N + R -> a view (..., R, N) by key: out[i, j] =
    scores[i, R - i + j].

    Row i begins at i W; the wanted element lies at R + i (W - 1) + j, which is row i, column j of a
    reshape that begins at R.
    """
    rows, width = scores.shape[-2:]
    flat = scores.flatten(-2)[..., rows:]
    return flat.unflatten(-1, (rows, width - 1))[..., :n]


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics run over valid frames only, of all processes together.

    NeMo's run over padding too: there, a longer neighbour changes the statistics.
    """

    def forward(self, x, valid):
        """(B, T', D), (B, T', 1) of 0 and 1 -> (B, T', D), float32. Evaluation uses the running
        statistics."""
        if not self.training:
            scale, shift = once(self.scale_and_shift)
            return torch.addcmul(shift, x, scale)
        y, mean, variance, count = _BatchNorm.apply(x, valid, self.weight, self.bias, self.eps)
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        return y

    def scale_and_shift(self):
        """What evaluation multiplies by and adds, (D,) each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class _BatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of valid frames, with its gradient by hand: of the dozen
    tensors on the way only the input is kept. Always in float32."""

    @staticmethod
    def forward(ctx, x, valid, weight, bias, eps):
        """(B, T', D), (B, T', 1), (D,), (D,) -> y, mean (D,), variance (D,), count."""
        wide, valid = x.float(), valid.float()
        count = valid.sum()  # here: of this process
        own_mean = (wide * valid).sum((0, 1)) / count.clamp(min=1)
        centred = wide - own_mean
        squares = (centred * valid).square_().sum((0, 1))
        # In one message: the moments of the parts give those of the whole (Chan et al., 1983)
        moments = _of_each_process(torch.cat([own_mean, squares, count[None]]))
        means, squares, counts = moments.split([len(own_mean), len(own_mean), 1], dim=1)
        count = counts.sum().clamp(min=1)
        mean = (means * counts).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        rate = (variance + eps).rsqrt()
        ctx.save_for_backward(x, valid, weight, mean, rate, count)
        ctx.mark_non_differentiable(mean, variance, count)
        scale = weight * rate
        y = torch.addcmul(bias + (own_mean - mean) * scale, centred, scale)
        # no y.to(x.dtype): one that changes nothing loses the gradient, compiled (PyTorch 2.11)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx, d_y, *_):
        x, valid, weight, mean, rate, count = ctx.saved_tensors
        d_y, normal = d_y.float(), (x.float() - mean).mul_(rate)
        d_weight, d_bias = (d_y * normal).sum((0, 1)), d_y.sum((0, 1))
        # both through the statistics, to which every process contributed
        through = _of_each_process(torch.stack([d_weight, d_bias])).sum(0)
        through = through * (-weight * rate / count)
        d_x = normal.mul_(through[0]).add_(through[1]).mul_(valid)
        d_x.addcmul_(d_y, weight * rate)
        return d_x.to(x.dtype), None, d_weight, d_bias, None


def _of_each_process(x):
    """x of each process, in a new first dimension."""
    x = x[None]
    if not dist.is_initialized():
        return x
    parts = x.new_empty(dist.get_world_size(), *x.shape[1:])
    dist.all_gather_into_tensor(parts, x)
    return parts


class FrameLayerNorm(LayerNorm):
    """LayerNorm of each frame, in the place of MaskedBatchNorm."""

    def forward(self, x, valid):
        """(B, T', D), (B, T', 1) of 0 and 1 -> (B, T', D)."""
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
        valid = valid[:, :, None].float()
        x = linear(x, once(torch.squeeze, first.weight, 2), first.bias)
        y = _GatedConvolution.apply(x, valid, depthwise.weight, depthwise.bias)
        y = F.silu(self.batch_norm(y, valid).to(x.dtype))
        return linear(y, once(torch.squeeze, last.weight, 2), last.bias)


class _GatedConvolution(torch.autograd.Function):
    """GLU, padding to 0, depthwise convolution over time; keeps what goes into the GLU.

    In float32, which the BatchNorm wants anyhow: with bfloat16 and 16 channels, oneDNN would build
    its kernel for ever. As images of height 1, for which it has the fastest kernel; but of width 1
    for the gradient of the weight, which takes a quarter of the time that way. (On a GPU that takes
    0.35 ms for 32 x 251 x 512 frames; of height 1 in float32 1.0, in bfloat16 0.15.)
    """

    @staticmethod
    def gated(x):
        a, b = x.chunk(2, dim=-1)
        gate = b.contiguous().sigmoid_()  # which is slow on rows with a gap between them
        return gate, gate * a

    @staticmethod
    def over_time(x, weight, bias=None):
        with torch.autocast(x.device.type, enabled=False):
            x, pad = x.transpose(1, 2)[:, :, None], (0, weight.shape[-1] // 2)
            y = F.conv2d(x, weight[:, :, None], bias, padding=pad, groups=len(weight))
        return y[:, :, 0].transpose(1, 2)

    @staticmethod
    def weight_gradient(x, d_y, weight, axis):
        """Of over_time(): x and the gradient of its result, (B, T', D) each -> (D, 1, K), float32.
        axis: 2 or 3, that of size 1 of the images (B, D, height, width)."""
        x, d_y = (t.transpose(1, 2).unsqueeze(axis) for t in (x, d_y))
        pad = [weight.shape[-1] // 2] * 2
        pad[axis - 2] = 0
        with torch.autocast(x.device.type, enabled=False):
            shape = weight.unsqueeze(axis).shape
            found = nn.grad.conv2d_weight(x, shape, d_y, 1, pad, groups=len(weight))
        return found.float().view(weight.shape)

    @staticmethod
    def forward(ctx, x, valid, weight, bias):
        """(B, T', 2D), (B, T', 1) of 0 and 1, (D, 1, K), (D,) or None -> (B, T', D)."""
        ctx.save_for_backward(x, valid, weight)
        ctx.bias = bias is not None
        y = _GatedConvolution.gated(x)[1].float().mul_(valid)
        return _GatedConvolution.over_time(y, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, valid, weight = ctx.saved_tensors
        gate, y = _GatedConvolution.gated(x)
        image, d_image, axis = y.float().mul_(valid), d_y, 3
        if x.device.type != "cpu" and x.dtype != torch.float32:
            image, d_image, axis = image.to(x.dtype), d_y.to(x.dtype), 2
        d_weight = _GatedConvolution.weight_gradient(image, d_image, weight, axis)
        d = _GatedConvolution.over_time(d_y, weight.flip(-1)).mul_(valid).to(x.dtype)
        d_a = d * gate
        d_b = d.sub_(d_a).mul_(y)  # gate' = gate (1 - gate), and y = gate a
        d_x = torch.cat([d_a, d_b], dim=-1)
        return d_x, None, d_weight, d_y.sum((0, 1)) if ctx.bias else None


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dropout: float, bias: bool):
        super().__init__()
        self.linear1 = Linear(d_model, d_inner, bias)
        self.linear2 = Linear(d_inner, d_model, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        """(B, T', D) -> (B, T', D)."""
        p = self.dropout.p if self.training else 0.0
        if not p and not torch.is_grad_enabled():
            return self.linear2(linear(x, self.linear1.weight, self.linear1.bias, "swish"))
        tensors = x, self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias
        dtype = product_type(x)  # for both directions at once
        tensors = (None if t is None else t.to(dtype) for t in tensors)
        return _FeedForward.apply(*tensors, p)


class _FeedForward(torch.autograd.Function):
    """linear2(dropout(silu(linear1(x)))), which keeps of its three wide tensors one: the others are
    cheaper to compute again than to keep. Dropout's scale is in w2."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, p):
        ctx.bias, ctx.scale, h = b1 is not None, kept_scale(p), linear(x, w1, b1)
        mask = dropout_mask(h.shape, p, h) if p else None
        if p:
            h, w2 = keep_(h, mask), w2 * ctx.scale  # silu(0) is 0
        ctx.save_for_backward(x, w1, w2, h, mask)
        return linear(F.silu(h), w2, b2)

    @staticmethod
    def backward(ctx, d_out):
        x, w1, w2, h, mask = ctx.saved_tensors
        d_w2 = transposed_product(d_out, F.silu(h)).mul_(ctx.scale)
        d_h = input_gradient(d_out, w2)
        torch.ops.aten.silu_backward.grad_input(d_h, h, grad_input=d_h)
        d_h = d_h if mask is None else keep_(d_h, mask)
        d_b1, d_b2 = (d.sum((0, 1)) if ctx.bias else None for d in (d_h, d_out))
        return input_gradient(d_h, w1), transposed_product(d_h, x), d_b1, d_w2, d_b2, None


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each on LayerNorm(x)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        d, bias = config.d_model, config.use_bias
        inner = d * config.ff_expansion
        self.norm_feed_forward1 = LayerNorm(d)
        self.feed_forward1 = FeedForward(d, inner, config.dropout, bias)
        self.norm_self_att = LayerNorm(d)
        self.self_attn = RelativeAttention(d, config.n_heads, config.dropout_att, bias)
        self.norm_conv = LayerNorm(d)
        self.conv = Convolution(d, config.conv_kernel, config.conv_norm, bias)
        self.norm_feed_forward2 = LayerNorm(d)
        self.feed_forward2 = FeedForward(d, inner, config.dropout, bias)
        self.norm_out = LayerNorm(d)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, valid, context, positions):
        """(B, T', D), (B, T') bool, (T', T') bool or None, positions (P, D) -> (B, T', D)."""
        add = self.dropout  # add(y, x, share): x + share * dropout(y)
        x = add(self.feed_forward1(self.norm_feed_forward1(x)), x, 0.5)
        x = add(self.self_attn(self.norm_self_att(x), valid, context, positions), x)
        x = add(self.conv(self.norm_conv(x), valid), x)
        x = add(self.feed_forward2(self.norm_feed_forward2(x)), x, 0.5)
        return self.norm_out(x)


class Conformer(nn.Module):
    """Subsampling, then n_layers of ConformerLayer. Its parameters must be float32: the depthwise
    convolution and BatchNorm compute in nothing else."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # of activations: in training, keep each layer's input only
        self.compiled = False  # layers by torch.compile, where gradients are wanted
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
        """(B, T, F), (B,) -> (B, T', D), lengths (B,). Frames beyond a length have no meaning; on a
        GPU there are more of them (recurring())."""
        if features.device.type != "cpu":
            features = recurring(features)
        x, lengths = self.pre_encode(features, n_frames)
        x = self.dropout(x * math.sqrt(self.config.d_model) if self.config.xscaling else x)
        positions = self.dropout_emb(relative_positions(x.shape[1], x.shape[2], x.device))
        valid = length_mask(lengths, x.shape[1])
        context = None  # a query may see all keys but padding
        if self.config.att_context != (-1, -1):
            context = _within(self.config.att_context, x.shape[1], x.device)
        compiled = self.compiled and torch.is_grad_enabled()
        encode = _compiled_layer() if compiled else ConformerLayer.__call__
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                contexts = functools.partial(_once_and_again, layer)
                x = checkpoint(
                    encode, layer, x, valid, context, positions,
                    use_reentrant=False, context_fn=contexts,
                )  # fmt: skip
            else:
                x = encode(layer, x, valid, context, positions)
        return x, lengths


@functools.cache
def _compiled_layer():
    """ConformerLayer.forward by torch.compile: once for all layers and batches of any shape, with
    the random numbers of one that is not compiled."""
    return torch.compile(ConformerLayer.forward, dynamic=True, options={"fallback_random": True})


def _once_and_again(layer):
    """Contexts of a checkpointed layer: its computation, and the one repeated for the gradient,
    which must not count the batch in BatchNorm's statistics a second time."""

    @contextmanager
    def again():
        before = [buffer.clone() for buffer in layer.buffers()]
        try:
            yield
        finally:
            for buffer, value in zip(layer.buffers(), before):
                buffer.copy_(value)

    return nullcontext(), again()


def _within(context: tuple[int, int], size: int, device) -> torch.Tensor:
    """(size, size) bool: may query i (row) see key j (column)? i - left <= j <= i + right."""
    left, right = (size if side < 0 else side for side in context)
    offset = torch.arange(size, device=device)
    offset = offset[None, :] - offset[:, None]  # j - i
    return (-left <= offset) & (offset <= right)
