"""The two models: FairASR (stage 1) and ConformerCTC (stage 2), around one encoder.

Shapes: B batch, S samples, T feature frames, T' encoder frames, D model, P projection,
V vocabulary without the blank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fairasr_min.audio import HOP, SAMPLE_RATE, LogMel, pad_waveforms
from fairasr_min.conformer import SIZES, Conformer, ConformerConfig, encoder_frames
from fairasr_min.layers import Linear, length_mask
from fairasr_min.losses import grad_reverse
from fairasr_min.text import Tokenizer, ctc_collapse

LONGEST = 300.0  # seconds in one piece: attention's time grows with their square
CONTEXT = 20.0  # seconds heard on both sides of what is kept of a piece


def masked_mean(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, T', D), (B,) -> (B, D): the mean over valid frames only, in float32.

    The paper's code divides by the longest utterance of the batch, padding included.
    """
    mask = length_mask(lengths, x.shape[1])[:, :, None]
    return x.float().masked_fill(~mask, 0.0).sum(1) / lengths.clamp(min=1)[:, None]


class ProjectionHead(nn.Sequential):
    """g: (B, D) -> (B, 128), the space in which a contrastive loss compares utterances."""

    def __init__(self, d_model: int, hidden: int = 512, projection: int = 128):
        super().__init__(nn.Linear(d_model, hidden), nn.ReLU(), nn.Linear(hidden, projection))


class FairASR(nn.Module):
    """Stage 1: an encoder f that should forget who is speaking, and its projection heads.

    n_adversaries: reversed projections to return. 0 is plain SimCLR (no idle head is built).
    independent_space: each reversed projection has a head of its own ("diffspace" in the paper's
    code); otherwise all pass through g itself ("same space").
    """

    def __init__(self, config: ConformerConfig, n_adversaries: int, independent_space: bool):
        super().__init__()
        self.log_mel = LogMel(config.n_mels, **config.front_end)
        self.encoder = Conformer(config)
        self.head = ProjectionHead(config.d_model)
        self.n_adversaries = n_adversaries
        self.adversaries = nn.ModuleList(
            ProjectionHead(config.d_model) for _ in range(n_adversaries if independent_space else 0)
        )

    def forward(self, features: torch.Tensor, n_frames: torch.Tensor):
        """(B, T, F), (B,) -> z (B, P), and a list of n_adversaries reversed z (B, P)."""
        h, lengths = self.encoder(features, n_frames)
        h = masked_mean(h, lengths)  # the utterance embedding, (B, D)
        z = self.head(h)
        # The head learns to find the groups; through the reversal the encoder learns to hide them.
        reverse = grad_reverse(h)
        if self.adversaries:
            return z, [head(reverse) for head in self.adversaries]
        # same space: equal to z in value, only the gradient to h differs; one serves all labels
        return z, [self.head(reverse)] * self.n_adversaries


class ConformerCTC(nn.Module):
    """Stage 2: encoder, and one linear layer over V units and the blank (the last class)."""

    def __init__(
        self,
        config: ConformerConfig = SIZES["small"],
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 1024,
    ):
        """vocab_size: used only without a tokenizer."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.blank = len(tokenizer) if tokenizer else vocab_size
        self.log_mel = LogMel(config.n_mels, **config.front_end)
        self.encoder = Conformer(config)
        self.decoder = Linear(config.d_model, self.blank + 1)

    def forward(self, waveforms: torch.Tensor, n_samples: torch.Tensor):
        """(B, S), (B,) -> log_probs (B, T', V+1) float32, lengths (B,)."""
        return self.log_probs(*self.log_mel(waveforms, n_samples))

    def log_probs(self, features: torch.Tensor, n_frames: torch.Tensor):
        """(B, T, F), (B,) -> log_probs (B, T', V+1) float32, lengths (B,)."""
        h, lengths = self.encoder(features, n_frames)
        return F.log_softmax(self.decoder(h).float(), dim=-1), lengths

    @torch.no_grad()
    def transcribe(self, waveforms: list) -> list[str]:
        """1-D float arrays at 16 kHz, of any lengths, in one batch -> their texts (greedy).

        Needs eval mode, or the texts depend on dropout and on batch mates: ValueError otherwise.
        """
        if self.training:
            raise ValueError("transcribe() needs eval mode: call model.eval() first")
        if not waveforms:
            return []
        if len(waveforms) > 1 and max(map(len, waveforms)) > LONGEST * SAMPLE_RATE:
            return [self.transcribe([w])[0] for w in waveforms]  # none is padded to an hour
        device = self.decoder.weight.device
        waveforms = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
        n_samples = torch.tensor([len(w) for w in waveforms], device=device)
        padded = pad_waveforms(waveforms).to(device)
        best, lengths = in_windows(self.best_classes, *self.log_mel(padded, n_samples), self.config)
        return [
            self.tokenizer.decode(ctc_collapse(ids[:n], self.blank))
            for ids, n in zip(best.tolist(), lengths.tolist())
        ]

    def best_classes(self, features: torch.Tensor, n_frames: torch.Tensor):
        """(B, T, F), (B,) -> the best class of each frame (B, T'), lengths (B,)."""
        log_probs, lengths = self.log_probs(features, n_frames)
        return log_probs.argmax(-1), lengths


def in_windows(encode, features: torch.Tensor, n_frames: torch.Tensor, config: ConformerConfig):
    """encode((B, T, F), (B,)) -> (B, T', ...), lengths (B,), for clips of any length.

    Up to LONGEST seconds: encode's own answer. A longer clip, which must be alone (B = 1), goes
    through in overlapping windows of LONGEST; each encoder frame is taken from one window only,
    in which it has CONTEXT seconds, or the clip's end, on either side.
    """
    factor = config.subsampling_factor  # windows start on multiples, where encoder frames coincide
    rate = SAMPLE_RATE / config.front_end.get("hop", HOP) / factor  # encoder frames a second
    size, context = math.ceil(LONGEST * rate), math.floor(CONTEXT * rate)
    if n_frames.max() <= size * factor:
        return encode(features, n_frames)
    total = encoder_frames(n_frames.item(), factor)
    # all windows are full: the last one reaches back further, instead of seeing little
    starts = [*range(0, total - size, size - 2 * context), total - size]
    seams = [0, *(start + context for start in starts[1:]), total]
    cores = []
    for start, first, end in zip(starts, seams, seams[1:]):
        window = features[:, start * factor : (start + size) * factor]
        x, _ = encode(window, (n_frames - start * factor).clamp(max=window.shape[1]))
        cores.append(x[:, first - start : end - start])
    return torch.cat(cores, dim=1), encoder_frames(n_frames, factor)


def samples_to_frames(n_samples: int, config: ConformerConfig = SIZES["small"]) -> int:
    """Encoder frames (40 ms) of so many samples: what CTC has to fit a target into."""
    n_frames = n_samples // config.front_end.get("hop", HOP)
    return encoder_frames(n_frames, config.subsampling_factor)
