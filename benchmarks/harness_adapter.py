"""FairASR for a comparison of Conformers side by side: make() gives an object with the methods fwd,
train, simclr and frontend, each on the same arrays as the peers get.

Sizes are those of stt_en_conformer_ctc_small: 13.15 million parameters with 1,024 units.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairasr_min import losses, runtime  # noqa: E402
from fairasr_min.conformer import SIZES  # noqa: E402
from fairasr_min.layers import weights_held  # noqa: E402
from fairasr_min.model import ConformerCTC, FairASR  # noqa: E402


class FairASRPeer:
    def __init__(self, config=SIZES["small"]):
        self.ctc = ConformerCTC(config, vocab_size=1024)
        self.stage1 = FairASR(config, n_adversaries=1, independent_space=False)
        self.stage1.encoder = self.ctc.encoder  # one encoder, as the peers have one
        self.holding = ExitStack()  # the weights, from batch to batch of an evaluation

    def params(self):
        return sum(p.numel() for p in self.ctc.parameters())

    def fwd(self, waveforms, n_samples):
        """(B, S), (B,) -> log_probs (B, T', V+1), lengths; eval mode, as decode.py does it."""
        if self.ctc.encoder.training:
            self.ctc.eval()
            self.holding.enter_context(weights_held())
        with torch.inference_mode():
            return self.ctc(waveforms, n_samples)

    def begin_step(self, model):
        self.holding.close()  # the weights may change
        model.train().zero_grad(set_to_none=True)

    def train(self, waveforms, n_samples, targets, target_lengths):
        """-> CTC loss, a mean over the batch, in train mode with dropout and without masks."""
        self.begin_step(self.ctc)
        log_probs, lengths = self.ctc(waveforms, n_samples)
        return losses.ctc_loss(log_probs, lengths, targets, target_lengths).mean()

    def frontend(self, waveforms, n_samples):
        return self.ctc.log_mel(waveforms, n_samples)

    def simclr(self, mel, masked, n_frames, labels):
        """mel, masked (B, F, T) -> loss of stage 1 with the original's choices: one head for both
        losses, projections of FSC not normalised, weight 0.1."""
        self.begin_step(self.stage1)
        views = torch.cat([mel, masked]).transpose(1, 2)
        z, (reversed_z,) = self.stage1(views, n_frames.repeat(2))
        z, reversed_z = z.float(), reversed_z.float()
        fsc = losses.sup_con(*reversed_z.chunk(2), labels, normalize=False)
        return losses.info_nce(*z.chunk(2)) + 0.1 * fsc


def make():
    runtime.keep_memory()
    return FairASRPeer()
