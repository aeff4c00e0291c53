"""The Conformer encoder (Gulati et al., Interspeech 2020), with the numerics of NeMo >= 2.5.

Shapes: B batch, T feature frames (10 ms), F mel bins, T' encoder frames (40 ms, unless the config
says otherwise), D model, H heads. Padding is masked wherever it could leak (subsampling, attention,
convolution, BatchNorm), so that an utterance is encoded the same whatever it is batched with.

Parameter names are NeMo's: the encoder of one of its checkpoints loads with strict=True.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce


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


class Subsampling(nn.Module):
    """Strided convolutions over time and frequency, each halving both: 10 ms frames to 40 ms."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        c = config.subsampling_channels
        layers = [nn.Conv2d(1, c, 3, stride=2, padding=1), nn.ReLU()]
        for _ in range(config.subsampling_factor.bit_length() - 2):
            if config.depthwise_subsampling:
                layers += [nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c), nn.Conv2d(c, c, 1)]
            else:
                layers += [nn.Conv2d(c, c, 3, stride=2, padding=1)]
            layers += [nn.ReLU()]
        self.conv = nn.Sequential(*layers)  # the indices name the parameters
        bins = encoder_frames(config.n_mels, config.subsampling_factor)
        self.out = nn.Linear(c * bins, config.d_model)

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T', D), (B,)."""
        x = x[:, None]  # (B, 1, T, F)
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                # the biases have written into the padding, and this kernel would read it
                x = x * _valid(lengths, x.shape[2])[:, None, :, None]
                lengths = _halved(lengths)
            x = layer(x)
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

    def __init__(self, d_model: int, n_heads: int, dropout: float, bias: bool = True):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.linear_q = nn.Linear(d_model, d_model, bias)
        self.linear_k = nn.Linear(d_model, d_model, bias)
        self.linear_v = nn.Linear(d_model, d_model, bias)
        self.linear_out = nn.Linear(d_model, d_model, bias)
        self.linear_pos = nn.Linear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))

    def forward(self, x, visible, positions):
        """(B, T', D), (B, 1 or T', T') bool: the keys of each query, (2T'-1, D) -> (B, T', D)."""

        def heads(y):  # (..., N, D) -> (..., H, N, D/H)
            return y.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)

        q, k, v = heads(self.linear_q(x)), heads(self.linear_k(x)), heads(self.linear_v(x))
        p = heads(self.linear_pos(positions))  # (H, 2T'-1, D/H)
        by_position = shift((q + self.pos_bias_v[:, None]) @ p.transpose(-2, -1))
        by_position = by_position / math.sqrt(q.shape[-1])  # (B, H, T', T')
        # finite, not -inf: a row of padding alone stays a number, and exp(-1e4) is 0 all the same
        by_position = by_position.masked_fill(~visible[:, None], -1e4)
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


class FrameLayerNorm(nn.LayerNorm):
    """LayerNorm of each frame, in the place of MaskedBatchNorm."""

    def forward(self, x, valid):
        """(B, D, T'), (B, 1, T') bool -> (B, D, T')."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Convolution(nn.Module):
    """Pointwise + GLU, depthwise over time, BatchNorm, Swish, pointwise."""

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
        valid = valid[:, None, :]
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)  # (B, D, T')
        x = self.depthwise_conv(x * valid)  # the kernel must not reach into padding
        x = F.silu(self.batch_norm(x, valid))
        return self.pointwise_conv2(x).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dropout: float, bias: bool):
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_inner, bias)
        self.linear2 = nn.Linear(d_inner, d_model, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T', D) -> (B, T', D)."""
        return self.linear2(self.dropout(F.silu(self.linear1(x))))


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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, valid, visible, positions):
        """(B, T', D), (B, T') bool, (B, 1 or T', T') bool, (2T'-1, D) -> (B, T', D)."""
        x = x + 0.5 * self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), visible, positions))
        x = x + self.dropout(self.conv(self.norm_conv(x), valid))
        x = x + 0.5 * self.dropout(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)


class Conformer(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.pre_encode = Subsampling(config)
        before = config.dropout_pre_encoder
        self.dropout = nn.Dropout(config.dropout if before is None else before)
        self.dropout_emb = nn.Dropout(config.dropout_emb)
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
        visible = valid[:, None]  # (B, 1, T'): every query may see all keys but padding
        if self.config.att_context != (-1, -1):
            visible = visible & _within(self.config.att_context, x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, valid, visible, positions)
        return x, lengths


def _within(context: tuple[int, int], size: int, device) -> torch.Tensor:
    """(size, size) bool: may query i (row) see key j (column)? i - left <= j <= i + right."""
    left, right = (size if side < 0 else side for side in context)
    offset = torch.arange(size, device=device)
    offset = offset[None, :] - offset[:, None]  # j - i
    return (-left <= offset) & (offset <= right)
