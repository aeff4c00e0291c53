"""NeMo's archives there and back: does NeMo compute what we compute?

    python benchmarks/nemo_round_trip.py

1. NeMo writes archives, one combination of options each, with random weights; we read them.
2. We write these and new models of ours (and trained ones, --models FILE); NeMo reads them.

Each time both sides get the same batch of three utterances. The Markdown table has the largest
absolute differences between what they compute, and how many texts are the same. An archive's own
numbers go to stderr. Ends with 1 if log-probabilities differ by more than 1e-4 on a valid frame, or
if the best unit of any differs.

Runs in an environment with nemo_toolkit[asr]==3.0.0 and our requirements.
"""

import argparse
import copy
import itertools
import random
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")  # NeMo's dependencies have many

import nemo  # noqa: E402
import sentencepiece  # noqa: E402
from nemo.collections.asr.models import EncDecCTCModelBPE  # noqa: E402
from nemo.utils import logging  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from fairasr_min import checkpoint  # noqa: E402
from fairasr_min.conformer import SIZES  # noqa: E402
from fairasr_min.model import ConformerCTC  # noqa: E402
from fairasr_min.nemo import export, load_nemo  # noqa: E402
from fairasr_min.runtime import commit  # noqa: E402
from fairasr_min.text import train_tokenizer  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures" / "nemo"
TOLERANCE = 1e-4  # of log-probabilities

# ---- what NeMo writes ----------------------------------------------------------------------------


def encoder(**options) -> dict:
    return {"encoder": options}


def front_end(**options) -> dict:
    return {"preprocessor": options}


UNCHANGED = "the fixture's options"
# Changes to the configuration of the fixture "tiny"; each makes an archive.
OPTIONS = {
    UNCHANGED: {},  # no archive: what the others are held against
    "x2": encoder(subsampling_factor=2),
    "x8": encoder(subsampling_factor=8),
    "x16": encoder(subsampling_factor=16),
    "dw x2, 24 channels": encoder(
        subsampling="dw_striding", subsampling_factor=2, subsampling_conv_channels=24
    ),
    "dw x4": encoder(subsampling="dw_striding", subsampling_factor=4),
    "dw x8, 8 channels": encoder(
        subsampling="dw_striding", subsampling_factor=8, subsampling_conv_channels=8
    ),
    "layer_norm": encoder(conv_norm_type="layer_norm"),
    "no biases": encoder(use_bias=False),
    "no xscaling": encoder(xscaling=False),
    "tied position biases": encoder(untie_biases=False),
    "context 5, 0": encoder(att_context_size=[5, 0]),
    "context all, 2": encoder(att_context_size=[-1, 2]),
    "context 4, all": encoder(att_context_size=[4, -1]),
    "two contexts": encoder(att_context_size=[[3, 7], [1, 1]]),
    "feed-forward x1": encoder(ff_expansion_factor=1),
    "kernel 1": encoder(conv_kernel_size=1),
    "kernel 5": encoder(conv_kernel_size=5),
    "1 head": encoder(n_heads=1),
    "16 heads": encoder(n_heads=16),
    "5 layers": encoder(n_layers=5),
    "conv_context_size 15, 15": encoder(conv_context_size=[15, 15]),
    "SDPA": encoder(use_pytorch_sdpa=True),
    "subsampling in chunks": encoder(subsampling_conv_chunking_factor=2),
    "dropout": encoder(dropout=0.2, dropout_pre_encoder=0.0, dropout_emb=0.3, dropout_att=0.0),
    "stochastic depth": encoder(stochastic_depth_drop_prob=0.3),
    "40 mel bins": {**front_end(features=40), **encoder(feat_in=40)},
    "128 mel bins": {**front_end(features=128), **encoder(feat_in=128)},
    "window 20 ms, its n_fft": front_end(window_size=0.02, n_fft=None),
    "window 32 ms, hop 16 ms": front_end(window_size=0.032, window_stride=0.016),
    "window 401, hop 200 samples": front_end(
        window_size=None, n_window_size=401, window_stride=None, n_window_stride=200
    ),
    "n_fft 1024": front_end(n_fft=1024),
    "hamming": front_end(window="hamming"),
    "blackman": front_end(window="blackman"),
    "bartlett": front_end(window="bartlett"),
    "normalize all_features": front_end(normalize="all_features"),
    "normalize NA": front_end(normalize="NA"),
    "normalize null": front_end(normalize=None),
    "no pre-emphasis": front_end(preemph=None),
    "pre-emphasis 0.5": front_end(preemph=0.5),
    "magnitudes": front_end(mag_power=1.0),
    "no logarithm": front_end(log=False),
    "clamp 1e-5": front_end(log_zero_guard_type="clamp", log_zero_guard_value=1e-5),
    "clamp tiny": front_end(log_zero_guard_type="clamp", log_zero_guard_value="tiny"),
    "add eps": front_end(log_zero_guard_value="eps"),
    "pad_to 16": front_end(pad_to=16),
    "pad_to 8 with -1.5": front_end(pad_to=8, pad_value=-1.5),
    "100 to 6000 Hz": front_end(lowfreq=100, highfreq=6000),
    "no mel_norm": front_end(mel_norm=None),
    "dither": front_end(dither=1e-5),
    "narrow-band augmentation": front_end(nb_augmentation_prob=0.1),
    "CTC sum": {"ctc_reduction": "sum"},
    "CTC mean": {"ctc_reduction": "mean"},
    "CTC mean_volume": {"ctc_reduction": "mean_volume"},
    "FastConformer": {
        **encoder(
            subsampling="dw_striding",
            subsampling_factor=8,
            subsampling_conv_channels=16,
            xscaling=False,
            conv_kernel_size=9,
            use_bias=False,
            att_context_size=[70, 13],
            n_layers=3,
        ),
        **front_end(dither=1e-5),
    },
}
# And NeMo's own defaults, which are not those of its configuration files.
DEFAULTS = {"encoder": {"feat_in": 64, "n_layers": 2, "d_model": 32}, "preprocessor": {}}


def configurations(tokenizer: Path) -> dict[str, dict]:
    """Name -> configuration of a model with the tokenizer in that folder."""
    tiny = restore(FIXTURES / "tiny_conformer_ctc.nemo")
    usual = OmegaConf.to_container(tiny.cfg)
    usual["tokenizer"] = {"dir": str(tokenizer), "type": "bpe"}
    for key in ("decoding", "nemo_version", "target"):  # NeMo fills them in
        del usual[key]
    configs = {}
    for name, options in OPTIONS.items():
        configs[name] = copy.deepcopy(usual)
        for key, value in options.items():
            if isinstance(value, dict):
                configs[name][key].update(value)
            else:
                configs[name][key] = value
    configs["NeMo's defaults"] = copy.deepcopy(usual)
    for key, value in DEFAULTS.items():
        configs["NeMo's defaults"][key] = {"_target_": usual[key]["_target_"], **value}
    return configs


def unpack_tokenizer(folder: Path) -> None:
    """The tokenizer of the fixture "tiny", as NeMo wants it: a folder with these three files."""
    with tarfile.open(FIXTURES / "tiny_conformer_ctc.nemo") as archive:
        for member in archive:
            for name in ("tokenizer.model", "tokenizer.vocab", "vocab.txt"):
                if member.name.endswith(f"_{name}"):
                    (folder / name).write_bytes(archive.extractfile(member).read())


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """What a new model has at 0 or 1, where a mistake would not show; names are the same on both
    sides."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "pos_bias" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=g))


def restore(path: Path) -> EncDecCTCModelBPE:
    return EncDecCTCModelBPE.restore_from(str(path), map_location="cpu").eval()


# ---- new models of ours --------------------------------------------------------------------------


def models_of_ours(seed: int):
    """Yield (name, model): both sizes that train here, with characters and with unigram units."""
    words = "call mom stop it turn the lights off what is it like don't play again ünïcode straße"
    draw = random.Random(seed)
    few = [" ".join(draw.choices(words.split(), k=4)) for _ in range(30)]
    letters = "abcdefghijklmnop'"
    many = [
        " ".join("".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(5))
        for _ in range(4000)
    ]
    for size in ("tiny", "small"):
        for units, texts, n_units in (("characters", few, 64), ("unigram", many, 128)):
            tokenizer, _ = train_tokenizer(texts, n_units)
            torch.manual_seed(seed)
            model = ConformerCTC(SIZES[size], tokenizer).eval()
            randomise(model, seed)
            yield f"ours: {size}, {units}", model


# ---- what the two sides compute ------------------------------------------------------------------


class Computed(NamedTuple):
    """B utterances in one batch."""

    features: torch.Tensor  # (B, T, F)
    n_frames: list[int]
    encoded: torch.Tensor  # (B, T', D)
    log_probs: torch.Tensor  # (B, T', V+1)
    lengths: list[int]
    texts: list[str]
    spm_texts: list[str] | None = None  # NeMo's units, decoded by sentencepiece itself


@torch.no_grad()
def nemo_computes(model: EncDecCTCModelBPE, waveforms, n_samples) -> Computed:
    # clone: pre-emphasis and masking may write into what they are given
    features, n_frames = model.preprocessor(input_signal=waveforms.clone(), length=n_samples)
    encoded, _ = model.encoder(audio_signal=features, length=n_frames)
    log_probs, lengths, best = model(input_signal=waveforms.clone(), input_signal_length=n_samples)
    hypotheses = model.decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=lengths)
    spm, blank = model.tokenizer.tokenizer, log_probs.shape[-1] - 1
    assert isinstance(spm, sentencepiece.SentencePieceProcessor)
    spm_texts = []
    for ids, n in zip(best.tolist(), lengths.tolist()):
        merged = [unit for unit, _ in itertools.groupby(ids[:n])]
        spm_texts.append(spm.decode([unit for unit in merged if unit != blank]))
    return Computed(
        features.transpose(1, 2),
        n_frames.tolist(),
        encoded.transpose(1, 2),
        log_probs,
        lengths.tolist(),
        [hypothesis.text for hypothesis in hypotheses],
        spm_texts,
    )


@torch.no_grad()
def we_compute(model: ConformerCTC, waveforms, n_samples) -> Computed:
    features, n_frames = model.log_mel(waveforms, n_samples)
    encoded, _ = model.encoder(features, n_frames)
    log_probs, lengths = model(waveforms, n_samples)
    texts = model.transcribe([w[:n] for w, n in zip(waveforms, n_samples)])
    return Computed(features, n_frames.tolist(), encoded, log_probs, lengths.tolist(), texts)


class Difference(NamedTuple):
    """Of one archive, or of many: largest differences, and counts."""

    features: float = 0.0  # padding included
    encoder: float = 0.0  # on valid frames, as the rest
    log_probs: float = 0.0
    frames: int = 0
    other_units: int = 0  # frames whose best unit differs
    texts: int = 0
    spm: int = 0  # texts equal to sentencepiece's of NeMo's units
    nemo: int = 0  # texts equal to NeMo's own
    more_than_spaces: int = 0  # texts that differ from NeMo's in more than spaces


def compare(name: str, ours: Computed, theirs: Computed) -> Difference:
    for key in ("n_frames", "lengths"):
        if getattr(ours, key) != getattr(theirs, key):
            sys.exit(f"{name}: {key} {getattr(ours, key)}, NeMo's {getattr(theirs, key)}")
    for key in ("features", "encoded", "log_probs"):
        if getattr(ours, key).shape != getattr(theirs, key).shape:
            sys.exit(f"{name}: the shape of {key} is not NeMo's")
    valid = torch.arange(ours.log_probs.shape[1]) < torch.tensor(ours.lengths)[:, None]

    def largest(a, b):
        return (a - b).abs().max().item()

    ours_lp, theirs_lp = ours.log_probs[valid], theirs.log_probs[valid]
    found = Difference(
        largest(ours.features, theirs.features),
        largest(ours.encoded[valid], theirs.encoded[valid]),
        largest(ours_lp, theirs_lp),
        len(ours_lp),
        int((ours_lp.argmax(-1) != theirs_lp.argmax(-1)).sum()),
        len(ours.texts),
        sum(a == b for a, b in zip(ours.texts, theirs.spm_texts, strict=True)),
        sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True)),
        sum(a.replace(" ", "") != b.replace(" ", "") for a, b in zip(ours.texts, theirs.texts)),
    )
    bad = found.log_probs > TOLERANCE or found.other_units
    shown = " ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in found._asdict().items())  # fmt: skip
    print(f"{name}: {shown}{'  <-- differs' if bad else ''}", file=sys.stderr, flush=True)
    return found


def alike(a: Computed, b: Computed) -> bool:
    """Whether an option changed nothing: had we ignored it, nobody could tell."""
    pairs = [(a.features, b.features), (a.log_probs, b.log_probs)]
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-3) for x, y in pairs)


def together(found: list[Difference]) -> Difference:
    columns = list(zip(*found))
    return Difference(*map(max, columns[:3]), *map(sum, columns[3:]))


# ---- the table -----------------------------------------------------------------------------------


def row(what: str, found: list[Difference]) -> str:
    d = together(found)
    cells = [what, f"{len(found)}", *(f"{x:.1e}" for x in (d.features, d.encoder, d.log_probs))]
    cells += [f"{d.other_units} of {d.frames:,}"]
    cells += [f"{d.spm} of {d.texts}", f"{d.nemo} of {d.texts}"]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="FILE", help="trained ones")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    logging.setLevel(logging.ERROR)
    recorded = np.load(FIXTURES / "waveforms.npz")
    audio = torch.from_numpy(recorded["waveforms"]), torch.from_numpy(recorded["lengths"])

    read, written, back, new, trained = [], [], [], [], []
    no_effect = []  # options of training or of speed
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        archive = folder / "archive.nemo"

        def there_and_back(name, path, theirs, found):
            """What NeMo computed, and its archive -> we read it, write it, and NeMo reads that."""
            mine = load_nemo(path)
            ours = we_compute(mine, *audio)
            found.append(compare(f"{name}, read", ours, theirs))
            back.append(nemo_reads(f"{name}, back", mine, ours))

        def nemo_reads(name, mine, ours):
            export(mine, archive)
            return compare(name, ours, nemo_computes(restore(archive), *audio))

        for path in sorted(FIXTURES.glob("*.nemo")):
            there_and_back(path.name, path, nemo_computes(restore(path), *audio), read)
        unpack_tokenizer(folder)
        for name, config in configurations(folder).items():
            torch.manual_seed(args.seed)
            model = EncDecCTCModelBPE(OmegaConf.create(config)).eval()
            randomise(model, args.seed)
            theirs = nemo_computes(model, *audio)
            if name == UNCHANGED:
                unchanged = theirs
                continue
            if alike(theirs, unchanged):
                no_effect.append(name)
            model.save_to(str(archive))
            there_and_back(name, archive, theirs, written)
        for name, mine in models_of_ours(args.seed):
            new.append(nemo_reads(name, mine, we_compute(mine, *audio)))
        for path in args.models:
            mine = checkpoint.load_model(path).eval()
            trained.append(nemo_reads(path, mine, we_compute(mine, *audio)))

    print(
        f"NeMo {nemo.__version__}, torch {torch.__version__}, sentencepiece "
        f"{sentencepiece.__version__}, {torch.get_num_threads()} thread(s), seed {args.seed}, "
        f"commit {commit()}\n\n"
        "| archives | number | features | encoder | log-probabilities | other best unit, frames "
        "| texts: sentencepiece's | texts: NeMo's |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    print(row("fixtures that NeMo wrote, read by `load_nemo`", read))
    print(row("one combination of options each, written by NeMo, read by `load_nemo`", written))
    print(row("all these, written by `export`, read by NeMo's `restore_from`", back))
    print(row("new models of ours, likewise", new))
    if trained:
        print(row("trained models of ours, likewise", trained))
    total = together(read + written + back + new + trained)
    print(
        f"\nOptions that change what NeMo computes: {len(written) - len(no_effect)} of "
        f"{len(written)}; not: {', '.join(no_effect)}."
    )
    print(f"Texts that differ from NeMo's in more than spaces: {total.more_than_spaces}.")
    return int(total.log_probs > TOLERANCE or total.other_units > 0)


if __name__ == "__main__":
    sys.exit(main())
