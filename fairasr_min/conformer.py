"""The Conformer encoder (Gulati et al., Interspeech 2020), with the numerics of NeMo >= 2.5.

Shapes: B batch, T feature frames (10 ms), F mel bins, T' encoder frames (40 ms), D model,
H heads. Padding is masked wherever it could leak (subsampling, attention, convolution,
BatchNorm), so that an utterance is encoded the same whatever it is batched with.

Parameter names are NeMo's: the encoder of one of its checkpoints loads with strict=True.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce


@dataclass(frozen=True)
class ConformerConfig:
    """Architecture, nothing else; stored in every model file. The defaults are size small."""

    n_mels: int = 80
    d_model: int = 176
    n_layers: int = 16
    n_heads: int = 4
    ff_expansion: int = 4
    conv_kernel: int = 31
    subsampling_channels: int = 176
    dropout: float = 0.1
    dropout_att: float = 0.1


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


def encoder_frames(n_frames):
    """Encoder frames (40 ms) of n feature frames (10 ms); ints or tensors."""
    return _halved(_halved(n_frames))


def _valid(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) -> (B, size) bool, false on padding. (audio.length_mask; this file imports nothing.)"""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


class Subsampling(nn.Module):
    """Two strided convolutions over time and frequency: 10 ms frames to 40 ms frames."""

    def __init__(self, n_mels: int, channels: int, d_model: int):
        super().__init__()
        self.conv = nn.Sequential(  # indices 0 and 2 name the parameters
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.out = nn.Linear(channels * encoder_frames(n_mels), d_model)

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T', D), (B,)."""
        x = x[:, None] * _valid(lengths, x.shape[1])[:, None, :, None]  # (B, 1, T, F)
        for conv, relu in (self.conv[:2], self.conv[2:]):
            x = relu(conv(x))
            lengths = _halved(lengths)
            # the bias has written into the padding; the next kernel would read it
            x = x * _valid(lengths, x.shape[2])[:, None, :, None]
        return self.out(x.transpose(1, 2).flatten(2)), lengths  # (B, T', C * F/4) -> (B, T', D)


def relative_positions(size: int, d_model: int, device) -> torch.Tensor:
    """Sinusoids (2 size - 1, D) of the relative positions size - 1, ..., 0, ..., -(size - 1)."""
    position = torch.arange(size - 1, -size, -1, device=device, dtype=torch.float32)
    rate = torch.arange(0, d_model, 2, device=device, dtype=torch.float32)
    angle = position[:, None] * torch.exp(rate * (-math.log(10_000.0) / d_model))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # sin, cos interleaved


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Dai et al., Transformer-XL, 2019).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_{i-j}) / sqrt(D / H)
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.linear_q = nn.Linear(d_model, d_model)
        self.linear_k = nn.Linear(d_model, d_model)
        self.linear_v = nn.Linear(d_model, d_model)
        self.linear_out = nn.Linear(d_model, d_model)
        self.linear_pos = nn.Linear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))

    def forward(self, x, valid, positions):
        """(B, T', D), (B, T') bool, (2T'-1, D) -> (B, T', D)."""

        def heads(y):  # (..., N, D) -> (..., H, N, D/H)
            return y.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)

        q, k, v = heads(self.linear_q(x)), heads(self.linear_k(x)), heads(self.linear_v(x))
        p = heads(self.linear_pos(positions))  # (H, 2T'-1, D/H)
        by_position = shift((q + self.pos_bias_v[:, None]) @ p.transpose(-2, -1))
        by_position = by_position / math.sqrt(q.shape[-1])  # (B, H, T', T')
        # finite, not -inf: a row of padding alone stays a number, and exp(-1e4) is 0 all the same
        by_position = by_position.masked_fill(~valid[:, None, None, :], -1e4)
        y = F.scaled_dot_product_attention(
            q + self.pos_bias_u[:, None],
            k,
            v,
            attn_mask=by_position,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_out(y.transpose(1, 2).flatten(2))


def shift(scores: torch.Tensor) -> torch.Tensor:
    """(..., N, 2N-1) by relative position -> (..., N, N) by key: out[i, j] = scores[i, N-1-i+j].

    With one column of padding, row i of (..., N, 2N) begins at 2Ni; the wanted element lies at
    2Ni + 1 + (N-1-i+j) = N + (2N-1)i + j, which is row i, column j of a reshape that begins at N.
    """
    n = scores.shape[-2]
    padded = F.pad(scores, (1, 0))  # (..., N, 2N)
    return padded.flatten(-2)[..., n:].unflatten(-1, (n, 2 * n - 1))[..., :n]


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics run over valid frames only, of all processes together.

    NeMo's run over padding too: there, a longer neighbour changes the statistics.
    """

    def forward(self, x, valid):
        """(B, D, T'), (B, 1, T') bool -> (B, D, T'). Evaluation uses the running statistics."""
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = _over_processes(valid.sum().float()).clamp(min=1)
            mean = _over_processes((wide * valid).sum((0, 2))) / count
            centred = wide - mean[:, None]
            variance = _over_processes((centred * valid).square().sum((0, 2))) / count
            with torch.no_grad():
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
                self.num_batches_tracked += 1
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


def _over_processes(x):
    return all_reduce(x) if dist.is_initialized() else x  # differentiable


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise over time, BatchNorm, Swish, pointwise."""

    def __init__(self, d_model: int, kernel: int):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(d_model, 2 * d_model, 1)
        self.depthwise_conv = nn.Conv1d(
            d_model, d_model, kernel, padding=(kernel - 1) // 2, groups=d_model
        )
        self.batch_norm = MaskedBatchNorm(d_model)
        self.pointwise_conv2 = nn.Conv1d(d_model, d_model, 1)

    def forward(self, x, valid):
        """(B, T', D), (B, T') bool -> (B, T', D)."""
        valid = valid[:, None, :]
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)  # (B, D, T')
        x = self.depthwise_conv(x * valid)  # the kernel must not reach into padding
        x = F.silu(self.batch_norm(x, valid))
        return self.pointwise_conv2(x).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_inner)
        self.linear2 = nn.Linear(d_inner, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T', D) -> (B, T', D)."""
        return self.linear2(self.dropout(F.silu(self.linear1(x))))


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each on LayerNorm(x)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        d, inner = config.d_model, config.d_model * config.ff_expansion
        self.norm_feed_forward1 = nn.LayerNorm(d)
        self.feed_forward1 = FeedForward(d, inner, config.dropout)
        self.norm_self_att = nn.LayerNorm(d)
        self.self_attn = RelativeAttention(d, config.n_heads, config.dropout_att)
        self.norm_conv = nn.LayerNorm(d)
        self.conv = Convolution(d, config.conv_kernel)
        self.norm_feed_forward2 = nn.LayerNorm(d)
        self.feed_forward2 = FeedForward(d, inner, config.dropout)
        self.norm_out = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, valid, positions):
        """(B, T', D), (B, T') bool, (2T'-1, D) -> (B, T', D)."""
        x = x + 0.5 * self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), valid, positions))
        x = x + self.dropout(self.conv(self.norm_conv(x), valid))
        x = x + 0.5 * self.dropout(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)


class Conformer(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.pre_encode = Subsampling(config.n_mels, config.subsampling_channels, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))

    def forward(self, features: torch.Tensor, n_frames: torch.Tensor):
        """(B, T, F), (B,) -> (B, T', D), lengths (B,). Frames beyond a length have no meaning."""
        x, lengths = self.pre_encode(features, n_frames)
        x = self.dropout(x * math.sqrt(self.config.d_model))
        positions = relative_positions(x.shape[1], x.shape[2], x.device)
        valid = _valid(lengths, x.shape[1])
        for layer in self.layers:
            x = layer(x, valid, positions)
        return x, lengths
