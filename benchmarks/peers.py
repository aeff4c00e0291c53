"""The steps of speed.py with our encoder, and the same steps with the encoder of other libraries.

    python benchmarks/peers.py --json peers.json
    python benchmarks/peers.py --tasks ctc --precision bf16 --peers nemo

Front end, heads, losses, waveforms (synthetic: noise) and the memory allocator's settings are the
same; only the encoder changes, to one of the same size and the same subsampling (two convolutions
of stride 2), where the library is installed in the Python that runs this:

    torchaudio      torchaudio.models.Conformer: no relative positions, convolutions over padding
    transformers    ParakeetEncoder, its subsampling (another one) replaced
    nemo            ConformerEncoder of nemo_toolkit[asr]
    ours            our own again: how far two equals lie apart

The two encoders take turns in one process, A B, B A, ..., so that neither has the quieter minutes.
The ratio is that of each turn, theirs over ours: above 1, ours is faster. For its peak of memory
each has a process of its own. All get both views of stage 1 in one batch, as ours does.
"""

import importlib.util
import json
import statistics
from itertools import product

from speed import arguments, launch, prepare, worker, write_json
from torch import nn

from fairasr_min import runtime
from fairasr_min.conformer import encoder_frames
from fairasr_min.layers import length_mask


class Subsampling(nn.Module):
    """(B, T, F), (B,) -> (B, T', D), (B,), as plain as it can be written: padding is not masked."""

    def __init__(self, config):
        super().__init__()
        c = config.subsampling_channels
        self.conv = nn.Sequential(
            nn.Conv2d(1, c, 3, 2, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 2, 1), nn.ReLU()
        )
        self.out = nn.Linear(c * encoder_frames(config.n_mels), config.d_model)

    def forward(self, features, n_frames):
        x = self.conv(features[:, None])  # (B, C, T', F')
        lengths = encoder_frames(n_frames)
        return self.out(x.transpose(1, 2).flatten(2))[:, : int(lengths.max())], lengths


class Torchaudio(nn.Module):
    def __init__(self, config):
        from torchaudio.models import Conformer

        super().__init__()
        self.subsampling, self.dropout = Subsampling(config), nn.Dropout(config.dropout)
        self.layers = Conformer(
            config.d_model, config.n_heads, config.ff_expansion * config.d_model, config.n_layers,
            config.conv_kernel, config.dropout,
        )  # fmt: skip

    def forward(self, features, n_frames):
        x, lengths = self.subsampling(features, n_frames)
        return self.layers(self.dropout(x), lengths)


class Transformers(nn.Module):
    def __init__(self, config):
        from transformers import ParakeetEncoder, ParakeetEncoderConfig

        super().__init__()
        self.subsampling = Subsampling(config)
        self.encoder = ParakeetEncoder(ParakeetEncoderConfig(
            hidden_size=config.d_model, num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads, conv_kernel_size=config.conv_kernel,
            intermediate_size=config.ff_expansion * config.d_model, subsampling_factor=4,
            num_mel_bins=config.n_mels, dropout=config.dropout, activation_dropout=config.dropout,
            attention_dropout=config.dropout_att, layerdrop=0.0,
        ))  # fmt: skip
        self.encoder.subsampling = nn.Identity()  # ours above, which needs lengths
        self.encoder.subsampling.forward = lambda x, mask: x

    def forward(self, features, n_frames):
        x, lengths = self.subsampling(features, n_frames)
        # it subsamples the mask itself: any number of frames that gives `lengths` will do
        mask = length_mask(4 * lengths, 4 * x.shape[1])
        return self.encoder(x, attention_mask=mask).last_hidden_state, lengths


class NeMo(nn.Module):
    def __init__(self, config):
        from nemo.collections.asr.modules import ConformerEncoder

        super().__init__()
        self.encoder = ConformerEncoder(
            feat_in=config.n_mels, n_layers=config.n_layers, d_model=config.d_model,
            subsampling="striding", subsampling_factor=4,
            subsampling_conv_channels=config.subsampling_channels,
            ff_expansion_factor=config.ff_expansion, n_heads=config.n_heads,
            conv_kernel_size=config.conv_kernel, dropout=config.dropout,
            dropout_pre_encoder=config.dropout, dropout_emb=0.0, dropout_att=config.dropout_att,
        )  # fmt: skip

    def forward(self, features, n_frames):
        x, lengths = self.encoder(audio_signal=features.transpose(1, 2), length=n_frames)
        return x.transpose(1, 2), lengths


PEERS = {"torchaudio": Torchaudio, "transformers": Transformers, "nemo": NeMo, "ours": None}


def main() -> int:
    parser = arguments(__doc__, ["forward", "ctc", "stage1"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="(all installed, and ours)")
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker)
        makers = {"ours": None, "theirs": PEERS[spec["peer"]]}
        return worker(spec, {name: makers[name] for name in spec["encoders"]})
    there = [name for name in PEERS if name == "ours" or importlib.util.find_spec(name)]
    if missing := set(args.peers or []) - set(there):
        raise runtime.UserError(f"not installed in this Python: {', '.join(sorted(missing))}")
    common, content = prepare(args)
    print("| peer | task | precision | ours ms | theirs | theirs / ours | ours peak MB | theirs |")
    print("|---|---|---|---:|---:|---:|---:|---:|", flush=True)
    for peer, task, precision in product(args.peers or there, args.tasks, args.precision):
        one = {**common, "task": task, "precision": precision, "peer": peer}
        one |= launch({**one, "encoders": ["ours", "theirs"]}, __file__)
        content["results"].append(one)
        if "error" in one:
            numbers = one["error"]
        else:
            ours, theirs = one["encoders"].values()
            ratios = one["ratios"] = [b / a for a, b in zip(ours["ms"], theirs["ms"])]
            one["ratio"] = statistics.median(ratios)
            del one["peak_mb"]  # of both together
            for name, found in one["encoders"].items():
                alone = launch({**one, "encoders": [name], "repeats": 1}, __file__)
                found["peak_mb"] = alone.get("peak_mb")
            numbers = (
                f"{ours['median_ms']:.1f} | {theirs['median_ms']:.1f} | {one['ratio']:.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | "
                f"{ours['peak_mb'] or 0:.0f} | {theirs['peak_mb'] or 0:.0f}"
            )
        write_json(args.json, content)
        print(f"| {peer} | {task} | {precision} | {numbers} |", flush=True)
    return 1 if any("error" in one for one in content["results"]) else 0


if __name__ == "__main__":
    runtime.run(main)
