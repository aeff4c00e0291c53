"""Clips beyond LONGEST: features in blocks, the encoder in windows, one text."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

import evaluate
from fairasr_min import audio, checkpoint, data, embed, layers, model
from fairasr_min.audio import LogMel
from fairasr_min.conformer import ConformerConfig
from fairasr_min.decode import decode
from fairasr_min.model import ConformerCTC, FairASR, in_windows, masked_mean
from fairasr_min.runtime import World
from fairasr_min.text import train_tokenizer

FULL = ConformerConfig(
    d_model=24, n_layers=2, n_heads=3, conv_kernel=7, subsampling_channels=8, dropout=0
)
LIMITED = replace(FULL, att_context=(5, 3))


@pytest.fixture
def two_seconds(monkeypatch):
    """Windows of 2 s, 0.8 s of them context on either side: 200 and 80 feature frames."""
    monkeypatch.setattr(model, "LONGEST", 2.0)
    monkeypatch.setattr(model, "CONTEXT", 0.8)


def recogniser(config, seed=0):
    """Random, its biases such that every class is the best one of some frames."""
    torch.manual_seed(seed)
    tokenizer, _ = train_tokenizer(["the quick brown fox jumps over the lazy dog"], 50)
    made = ConformerCTC(config, tokenizer).eval()
    for parameter in made.parameters():
        parameter.data *= 1.5
    with torch.no_grad():
        h, _ = made.encoder(*made.log_mel(noise(32_000)[None], torch.tensor([32_000])))
        made.decoder.bias.copy_(-made.decoder.weight @ h[0, :-1].mean(0))
    return made


def noise(n_samples, seed=0):
    """Whose loudness and colour change, as in speech."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, generator=draw)
    x = x + 0.9 * torch.roll(x, 1) * torch.sin(torch.arange(n_samples) / 700)
    return 0.1 * x * torch.sin(torch.arange(n_samples) / 3000) ** 2


# ---- features in blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize": "all_features", "pad_to": 16}, {"hop": 130}])
@pytest.mark.parametrize("n", [1, 159, 160, 1599, 1600, 1601, 1760, 16000, 17777])
def test_features_in_blocks_are_those_in_one_piece(monkeypatch, n, options):
    log_mel, n_samples = LogMel(**options), torch.tensor([n, n - n // 3])
    waveforms = noise(2 * n).view(2, n)
    whole, n_frames = log_mel(waveforms, n_samples)
    for frames in (1, 7, 10, 11):
        monkeypatch.setattr(audio, "FRAMES", frames)
        blocked, same = log_mel(waveforms, n_samples)
        assert torch.equal(same, n_frames) and blocked.shape == whole.shape
        assert torch.allclose(blocked, whole, atol=1e-5)


def test_features_are_those_of_a_loop_over_frames(monkeypatch):
    monkeypatch.setattr(audio, "FRAMES", 4)
    x, log_mel = noise(4000), LogMel()
    features, _ = log_mel(x[None], torch.tensor([4000]))
    y = x.double().numpy()
    y = np.concatenate([np.zeros(256), y[:1], y[1:] - 0.97 * y[:-1], np.zeros(256)])
    window = np.pad(np.hanning(400), 56)
    power = [abs(np.fft.rfft(y[i : i + 512] * window)) ** 2 for i in range(0, 4001, 160)][:25]
    expected = np.log(np.array(power) @ log_mel.mel.T.double().numpy() + 2.0**-24)
    expected = (expected - expected.mean(0)) / (expected.std(0, ddof=1) + 1e-5)
    assert np.abs(features[0, :25].numpy() - expected).max() < 1e-3


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "hop"), [(2, 160), (4, 160), (8, 160), (4, 200)])
def test_every_frame_comes_once_and_with_its_context(two_seconds, factor, hop):
    """An encoder that answers with the place of each frame, and how much it saw around it."""
    config = replace(FULL, subsampling_factor=factor, front_end={"hop": hop})
    longest, context = 32_000 // hop, 12_800 // hop
    context -= context % factor

    def encode(features, n_frames):
        n, places = int(n_frames), features[0, ::factor, 0]
        assert 0 < n <= longest and n <= features.shape[1]
        around = [places, features[0, 0, 0].expand_as(places), features[0, n - 1, 0] + 0 * places]
        return torch.stack(around, dim=1)[None], -(-n_frames // factor)

    for n in range(1, 900):
        features = torch.arange(n + 1.0).view(1, -1, 1)  # as of LogMel: the last is padding
        out, lengths = in_windows(encode, features, torch.tensor([n]), config)
        place, first, last = out[0, : lengths[0]].T
        assert torch.equal(place, torch.arange(0.0, n, factor))
        assert ((place - first >= context) | (first == 0)).all()
        assert ((last - place >= context - 1) | (last == n - 1)).all()
        assert n > longest or ((first == 0) & (last == n - 1)).all()  # in one piece
        assert (last - first >= min(n, longest) - factor).all()  # no window sees little


@pytest.mark.parametrize("options", [{}, {"subsampling_factor": 8}, {"front_end": {"hop": 200}}])
@pytest.mark.parametrize("seconds", [2.0, 2.02, 2.5, 3.03, 9.99])
def test_limited_context_inside_windows_is_exact(two_seconds, options, seconds):
    """Receptive field: 2 layers x (5 + 3) encoder frames to the left, 2 x (3 + 3) to the right."""
    config = replace(LIMITED, **options)
    if options:  # of 80 and 50 ms
        config = replace(config, att_context=(1, 1), conv_kernel=5)
    made, waveform = recogniser(config), noise(round(16000 * seconds))
    with torch.no_grad():
        features = made.log_mel(waveform[None], torch.tensor([len(waveform)]))
        whole, lengths = made.log_probs(*features)
        parts, same = in_windows(made.log_probs, *features, config)
    assert torch.equal(lengths, same)
    n = int(lengths)
    assert torch.allclose(parts[:, :n], whole[:, :n], atol=1e-4)
    ids = parts.argmax(-1)[0, :n]
    assert torch.equal(ids, whole.argmax(-1)[0, :n]) and len(ids.unique()) > 5


def test_too_little_context_would_show(two_seconds, monkeypatch):
    made, waveform = recogniser(LIMITED), noise(160_000)
    features = made.log_mel(waveform[None], torch.tensor([160_000]))
    with torch.no_grad():
        whole, _ = made.log_probs(*features)
        for context, near in ((0.8, True), (0.0, False)):
            monkeypatch.setattr(model, "CONTEXT", context)
            parts, lengths = in_windows(made.log_probs, *features, LIMITED)
            assert torch.allclose(parts, whole[:, : int(lengths)], atol=1e-4) == near


def test_full_context_is_the_answer_of_a_window(two_seconds):
    """No window hears the whole clip; each frame's answer is its window's, cut out by hand."""
    made, waveform = recogniser(FULL), noise(64_000)  # 400 frames
    features, n_frames = made.log_mel(waveform[None], torch.tensor([64_000]))
    with torch.no_grad():
        parts, lengths = in_windows(made.log_probs, features, n_frames, FULL)
        assert parts.shape[1] == lengths.item() == 100

        def alone(first, last):
            part = features[:, 4 * first : 4 * last]
            return made.log_probs(part, torch.tensor([part.shape[1]]))[0][0]

        # 50 encoder frames a window, 20 of context: starts at 0, 10, ..., 50
        assert torch.allclose(parts[0, :30], alone(0, 50)[:30], atol=1e-5)
        assert torch.allclose(parts[0, 30:40], alone(10, 60)[20:30], atol=1e-5)
        assert torch.allclose(parts[0, 60:70], alone(40, 90)[20:30], atol=1e-5)
        assert torch.allclose(parts[0, 70:], alone(50, 100)[20:], atol=1e-5)


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", range(-3, 4))
@pytest.mark.parametrize(("said", "heard"), [("aaaa", "a"), ("a_a", "aa"), ("ab", "ab")])
def test_units_across_a_seam_are_neither_doubled_nor_lost(two_seconds, shift, said, heard):
    made = recogniser(FULL)
    unit = {"a": 3, "b": 4, "_": made.blank}
    frames = torch.full((100,), made.blank)
    for seam in (30, 40, 50, 60, 70):  # of 50-frame windows over 100
        for i, letter in enumerate(said):
            frames[seam - len(said) // 2 + shift + i] = unit[letter]
    features = frames.repeat_interleave(4)[None, :, None].float()
    made.log_mel.forward = lambda waveforms, n_samples: (features, torch.tensor([400]))
    made.log_probs = lambda x, n: (
        torch.nn.functional.one_hot(x[:, ::4, 0].long(), made.blank + 1).float().log(), -(-n // 4)
    )  # fmt: skip
    expected = made.tokenizer.decode([unit[letter] for letter in heard] * 5)
    assert made.transcribe([torch.zeros(64_000)]) == [expected]


def test_long_and_short_clips_together(two_seconds):
    made = recogniser(FULL)
    clips = [noise(n, seed) for seed, n in enumerate((5000, 90_000, 32_000, 32_159, 32_160, 300))]
    texts = made.transcribe(clips)
    assert len(set(texts)) == 6 and texts == [made.transcribe([clip])[0] for clip in clips]
    encoded, seen = made.encoder.forward, []
    made.encoder.forward = lambda *clip: seen.append(clip[1].tolist()) or encoded(*clip)
    made.transcribe([clips[0], clips[2]])
    assert seen == [[31, 200]]  # up to LONGEST as ever
    seen.clear()
    made.transcribe(clips[:1] + clips[4:])
    assert seen == [[31], [200], [197], [1]]  # 201 frames: the second window starts at the fifth


@pytest.fixture
def folder(tmp_path):
    """Ten seconds between short clips, their manifest, and a model file."""
    rows = []
    for name, seconds in (("a", 0.5), ("long", 10.0), ("b", 1.0), ("edge", 2.0), ("over", 2.01)):
        soundfile.write(tmp_path / f"{name}.wav", noise(round(16000 * seconds)).numpy(), 16000)
        rows.append({"audio_filepath": f"{name}.wav", "text": "fox", "duration": seconds})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recogniser(LIMITED)
    checkpoint.save_model(
        tmp_path / "model.pt", "ctc", LIMITED, made.state_dict(), made.tokenizer.model,
        {"train_manifest": "t.jsonl", "audio_root": None}, commit="",
    )  # fmt: skip
    return tmp_path


def test_evaluate_takes_long_clips(folder, two_seconds, monkeypatch, capsys):
    made = recogniser(LIMITED)
    rows = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    waveforms = [audio.read_audio(folder / row["audio_filepath"]) for row in rows]
    monkeypatch.setattr(model, "LONGEST", 100.0)
    expected = [made.transcribe([waveform])[0] for waveform in waveforms]  # in one piece
    monkeypatch.setattr(model, "LONGEST", 2.0)
    assert len(expected[1]) > 20

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", f"{folder}/model.pt",
                                          "--out", f"{folder}/out", *arguments])  # fmt: skip
        assert evaluate.main() == 0
        return capsys.readouterr().out

    assert call("--audio", f"{folder}/long.wav") == expected[1] + "\n"
    with monkeypatch.context() as patch:
        types, transcribe = [], ConformerCTC.transcribe

        def watched(self, waveforms):
            types.append(layers.product_type(waveforms[0]))
            return transcribe(self, waveforms)

        patch.setattr(ConformerCTC, "transcribe", watched)
        for precision in ("fp32", "bf16"):
            call("--audio", f"{folder}/long.wav", "--precision", precision)
        assert types == [torch.float32, torch.bfloat16]
    for size in ("1", "8"):
        call("--manifest", f"{folder}/m.jsonl", "--batch_size", size)
        hyps = (folder / "out" / "hyps.jsonl").read_text().splitlines()
        assert [json.loads(line)["pred_text"] for line in hyps] == expected


def test_the_corpus_loop_keeps_long_clips_alone(folder, two_seconds, monkeypatch):
    monkeypatch.setattr("fairasr_min.decode.LONGEST", 2.0)
    utterances, _ = data.read_manifest(folder / "m.jsonl")
    batches, held, made = [], [], recogniser(LIMITED)
    whole = made.transcribe

    def transcribe(waveforms):
        batches.append(len(waveforms))
        held.append(layers._held is not None)
        return whole(waveforms)

    made.transcribe = transcribe
    decode(made, utterances, World(0, 1, torch.device("cpu")), batch_size=8)
    assert batches == [1, 1, 1, 2]  # 10, 2.01, 2; 1 and 0.5 s
    assert all(held) and layers._held is None  # the weights, for the corpus and no longer


def test_embeddings_of_long_clips_are_the_mean_over_all_frames(folder, two_seconds, monkeypatch):
    monkeypatch.setattr("fairasr_min.decode.LONGEST", 2.0)
    torch.manual_seed(0)
    encoder = FairASR(LIMITED, 0, False).eval()
    utterances, _ = data.read_manifest(folder / "m.jsonl")
    seen = []
    hook = encoder.encoder.register_forward_hook(
        lambda _, given, out: seen.append(int(given[1][0]))
    )
    x = embed.embed(encoder, utterances, World(0, 1, torch.device("cpu")), batch_size=8)
    hook.remove()
    assert max(seen) == 200 and len(seen) > 4
    for u, vector in zip(utterances, x, strict=True):
        waveform = audio.read_audio(u.path)
        with torch.no_grad():
            features = encoder.log_mel(waveform[None], torch.tensor([len(waveform)]))
            expected = masked_mean(*encoder.encoder(*features))[0]
        assert np.abs(vector - expected.numpy()).max() < 1e-4
