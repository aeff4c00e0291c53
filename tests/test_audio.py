"""Reading audio, log-mel features and SpecAugment: against NeMo's recorded features, a slow front
end written from its description, analytic sines, loops, and files that are not what they say."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairasr_min.audio import (
    AudioError,
    LogMel,
    SpecAugment,
    audio_seconds,
    loudest_sample,
    read_audio,
)

NEMO = Path(__file__).parent / "fixtures" / "nemo"


def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_mel(waveforms, n_samples):
    return LogMel()(waveforms, torch.tensor(n_samples))


# ---- log-mel features ----------------------------------------------------------------------------


def test_features_are_those_of_nemo():
    waves, expected = np.load(NEMO / "waveforms.npz"), np.load(NEMO / "expected_tiny.npz")
    features, n_frames = LogMel()(
        torch.from_numpy(waves["waveforms"]), torch.from_numpy(waves["lengths"])
    )
    assert n_frames.tolist() == expected["features_len"].tolist()
    theirs = torch.from_numpy(expected["features"]).transpose(1, 2)  # (B, F, T) -> (B, T, F)
    assert features.shape == theirs.shape
    assert (features - theirs).abs().max() < 1e-4


def slaney_filters():
    """Triangles of equal area on the Slaney scale: linear to 1 kHz, then 27 to a factor of 6.4."""

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))

    top = 15 + 27 * math.log(8000 / 1000) / math.log(6.4)
    corners = [hertz(top * i / 81) for i in range(82)]
    filters = np.zeros((80, 257))
    for i in range(80):
        low, centre, high = corners[i : i + 3]
        for k in range(257):
            f = k * 16000 / 512
            rising, falling = (f - low) / (centre - low), (high - f) / (high - centre)
            filters[i, k] = max(0.0, min(rising, falling)) * 2 / (high - low)
    return filters


def slow_log_mel(x):
    """One utterance, one frame and one frequency at a time, in float64."""
    x = np.asarray(x, dtype=np.float64)
    emphasised = [x[0]] + [x[t] - 0.97 * x[t - 1] for t in range(1, len(x))]
    padded = np.concatenate([np.zeros(256), emphasised, np.zeros(256)])
    window = np.zeros(512)
    for i in range(400):
        window[56 + i] = 0.5 - 0.5 * math.cos(2 * math.pi * i / 399)
    filters = slaney_filters()
    angle = 2 * math.pi * np.arange(512) / 512
    frames = []
    for t in range(len(x) // 160):
        frame = padded[160 * t : 160 * t + 512] * window
        power = [
            (frame * np.cos(k * angle)).sum() ** 2 + (frame * np.sin(k * angle)).sum() ** 2
            for k in range(257)
        ]
        frames.append(np.log(filters @ np.array(power) + 2.0**-24))
    frames = np.array(frames)
    mean, std = frames.mean(axis=0), frames.std(axis=0, ddof=1)
    return (frames - mean) / (std + 1e-5)


@pytest.mark.parametrize("n", [320, 1599, 4000])
def test_features_are_those_of_a_slow_front_end(n):
    wave = noise(n, seed=n)
    features, n_frames = log_mel(wave[None], [n])
    expected = slow_log_mel(wave.numpy())
    assert n_frames.item() == len(expected) == n // 160
    assert np.abs(features[0, : len(expected)].numpy() - expected).max() < 1e-3
    assert LogMel().mel.numpy() == pytest.approx(slaney_filters(), abs=1e-6)


@pytest.mark.parametrize("size", [160, 161, 319, 320, 400, 1000, 1600, 16001])
def test_shapes(size):
    n_samples = [size, size // 2, 1]
    features, n_frames = log_mel(noise(3, size), n_samples)
    assert features.shape == (3, size // 160 + 1, 80)
    assert n_frames.tolist() == [n // 160 for n in n_samples]
    for utterance, n in zip(features, n_frames.tolist()):
        assert not utterance[n:].any()


def test_features_have_mean_0_and_variance_1():
    features, n_frames = log_mel(noise(2, 8000), [8000, 4000])
    for utterance, n in zip(features, n_frames.tolist()):
        assert utterance[:n].mean(0).abs().max() < 1e-4
        assert (utterance[:n].std(0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("garbage", [0.0, 1e3, 1e15, math.nan])
def test_features_do_not_depend_on_the_batch(garbage):
    lengths = [16000, 9999, 4321, 480, 170]
    waves = [noise(n, seed=n) for n in lengths]
    batch = garbage * torch.ones(len(lengths), 20000)
    for row, wave in zip(batch, waves):
        row[: len(wave)] = wave
    together, n_frames = log_mel(batch, lengths)
    for i, wave in enumerate(waves):
        alone, n = log_mel(wave[None], [len(wave)])
        assert n_frames[i] == n
        assert (together[i, : n.item()] - alone[0, : n.item()]).abs().max() < 1e-5
        assert not together[i, n.item() :].any()


@pytest.mark.parametrize("size", [0, 1, 159, 160, 320])
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_very_short_audio_is_finite(size, scale):
    features, n_frames = log_mel(noise(2, size, scale=scale), [size, size])
    assert features.shape == (2, size // 160 + 1, 80)
    assert features.isfinite().all() and n_frames.tolist() == [size // 160] * 2


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_digital_silence_is_finite_and_small(level):
    features, _ = log_mel(torch.full((1, 48000), level), [48000])
    assert features.isfinite().all()
    assert features[0, 2:299].abs().max() < 1  # rounding noise must not become a signal


def test_features_stay_float32_under_autocast():
    wave = noise(2, 4000)
    expected, _ = log_mel(wave, [4000, 3000])
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = log_mel(wave, [4000, 3000])
        rounded, _ = log_mel(wave.bfloat16(), [4000, 3000])
    assert features.dtype == rounded.dtype == torch.float32
    assert torch.equal(features, expected)


def test_a_state_dict_carries_the_front_end():
    assert set(LogMel().state_dict()) == {"mel", "window"}
    assert not list(LogMel().parameters())


# ---- reading audio -------------------------------------------------------------------------------


def sine(hertz, rate, seconds=1.0):
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("hertz", [200, 3000])
def test_other_sample_rates_are_resampled(tmp_path, rate, hertz):
    path, seconds = tmp_path / "sine.wav", 0.73
    soundfile.write(path, sine(hertz, rate, seconds), rate, subtype="FLOAT")
    wave = read_audio(path)
    assert wave.dtype == torch.float32 and wave.ndim == 1
    assert abs(len(wave) - seconds * 16000) <= 1
    expected = sine(hertz, 16000, seconds)  # the same sine: frequency, phase and amplitude
    middle = slice(400, -400)
    assert np.abs(wave.numpy() - expected[: len(wave)])[middle].max() < 0.02
    spectrum = np.abs(np.fft.rfft(wave.numpy() * np.hanning(len(wave))))
    assert abs(spectrum.argmax() * 16000 / len(wave) - hertz) < 2


@pytest.mark.parametrize("rate", [44100, 48000])
def test_resampling_does_not_alias(tmp_path, rate):
    soundfile.write(tmp_path / "high.wav", sine(10000, rate), rate)
    assert read_audio(tmp_path / "high.wav")[400:-400].abs().max() < 0.005  # 40 dB down


def test_channels_are_averaged(tmp_path):
    channels = np.stack([sine(300, 16000), sine(700, 16000), np.full(16000, 0.1)], axis=1)
    soundfile.write(tmp_path / "three.wav", channels, 16000, subtype="FLOAT")
    wave = read_audio(tmp_path / "three.wav")
    assert np.abs(wave.numpy() - channels.mean(axis=1)).max() < 1e-6


EXACT = [
    ("wav", "PCM_U8", 2.0**-7),
    ("wav", "PCM_16", 2.0**-15),
    ("wav", "PCM_24", 2.0**-23),
    ("wav", "PCM_32", 2.0**-23),
    ("wav", "FLOAT", 2.0**-24),
    ("wav", "DOUBLE", 2.0**-24),
    ("flac", "PCM_16", 2.0**-15),
    ("flac", "PCM_24", 2.0**-23),
]


@pytest.mark.parametrize("suffix, subtype, step", EXACT)
def test_lossless_formats(tmp_path, suffix, subtype, step):
    samples = noise(3000, scale=0.2).clamp(-0.99, 0.99).double().numpy()
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, samples, 16000, subtype=subtype)
    assert np.abs(read_audio(path).numpy() - samples).max() <= step
    assert audio_seconds(path) == 3000 / 16000


LOSSY = [
    ("ogg", "OGG", "VORBIS", 16000),
    ("ogg", "OGG", "VORBIS", 44100),
    ("opus", "OGG", "OPUS", 48000),
    ("ogg", "OGG", "OPUS", 16000),
    ("mp3", "MP3", "MPEG_LAYER_III", 16000),
    ("mp3", "MP3", "MPEG_LAYER_III", 44100),
]


@pytest.mark.parametrize("suffix, format, subtype, rate", LOSSY)
def test_lossy_formats(tmp_path, suffix, format, subtype, rate):
    if not soundfile.check_format(format, subtype):
        pytest.skip(f"this libsndfile cannot write {subtype}")
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, sine(440, rate), rate, format=format, subtype=subtype)
    wave = read_audio(path).numpy()
    assert abs(audio_seconds(path) - 1) < 0.05 and abs(len(wave) - 16000) <= 0.05 * 16000
    middle = slice(2000, 14000)
    assert np.corrcoef(wave[middle], sine(440, 16000)[middle])[0, 1] > 0.99
    half = read_audio(path, 0.25, 0.5).numpy()
    assert len(half) == 8000
    assert np.corrcoef(half[2000:6000], wave[6000:10000])[0, 1] > 0.99


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("offset, seconds", [(0.0, 0.5), (0.3, 0.25), (0.75, None), (0.9, 5.0)])
def test_a_segment_is_a_slice(tmp_path, suffix, rate, offset, seconds):
    samples = noise(rate, scale=0.2).clamp(-0.9, 0.9).numpy()
    soundfile.write(tmp_path / f"long.{suffix}", samples, rate)
    first = round(offset * rate)
    last = rate if seconds is None else min(rate, first + round(seconds * rate))
    soundfile.write(tmp_path / f"cut.{suffix}", samples[first:last], rate)
    segment = read_audio(tmp_path / f"long.{suffix}", offset, seconds)
    assert len(segment) == (last - first) * 16000 // rate
    assert torch.equal(segment, read_audio(tmp_path / f"cut.{suffix}"))


def bad_file(folder, kind):
    samples = noise(16000).numpy()
    if kind == "missing":
        return folder / "missing.wav"
    if kind == "folder":
        return folder
    path = folder / f"{kind.replace(' ', '_')}.{'flac' if 'flac' in kind else 'wav'}"
    if kind in ("nan", "inf"):
        samples[7777] = float(kind)
        soundfile.write(path, samples, 16000, subtype="FLOAT")
    elif kind == "beyond float32":
        soundfile.write(path, np.array([0.0, 1e300, 0.0]), 16000, subtype="DOUBLE")
    elif kind == "no samples":
        soundfile.write(path, samples[:0], 16000)
    elif kind == "no bytes":
        path.touch()
    elif kind == "text":
        path.write_text("this is not audio\n" * 100)
    elif kind == "truncated flac":
        soundfile.write(path, samples, 16000)
        path.write_bytes(path.read_bytes()[:9999])
    elif kind == "raw":  # libsndfile goes by the name: no header, so it asks for a sample rate
        path = path.with_suffix(".raw")
        path.write_bytes(samples.tobytes())
    return path


BAD_FILES = ["missing", "folder", "nan", "inf", "beyond float32", "no samples", "no bytes", "text"]
BAD_FILES += ["truncated flac", "raw"]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_unusable_audio_is_refused_by_name(tmp_path, kind):
    path = bad_file(tmp_path, kind)
    for name in (path, str(path)):
        with pytest.raises(AudioError) as caught:
            read_audio(name)
        reason = str(caught.value).removeprefix(f"{path}: ")
        assert str(caught.value).startswith(f"{path}: ") and len(reason) > 5
    if kind not in ("nan", "inf", "beyond float32", "truncated flac"):  # the header tells
        with pytest.raises(AudioError) as caught:
            audio_seconds(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_segment_after_the_end_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(1600).numpy(), 16000)
    with pytest.raises(AudioError, match="x.wav"):
        read_audio(tmp_path / "x.wav", offset=5.0, seconds=1.0)


# ---- SpecAugment ---------------------------------------------------------------------------------

ALMOST_1 = 1 - 2.0**-24  # the largest that float32 knows


def slow_spec_augment(features, n_frames, draws, time_masks, time_width, freq_masks, freq_width):
    """One mask at a time; draws: all widths (time, then frequency), then all starts."""
    out = features.clone()
    masks = time_masks + freq_masks
    for b in range(len(features)):
        for m in range(masks):
            width, start = draws[b, m].item(), draws[b, masks + m].item()
            size = n_frames[b].item() if m < time_masks else features.shape[2]
            longest = freq_width
            if m < time_masks:
                longest = time_width * size if time_width < 1 else time_width
            width = min(math.floor(width * longest), size)
            first = math.floor(start * (size - width + 1))
            for i in range(first, first + width):
                if m < time_masks:
                    out[b, i, :] = 0
                else:
                    out[b, :, i] = 0
    return out


@pytest.mark.parametrize("masks", [(1, 30, 1, 15), (2, 0.25, 2, 27), (3, 5, 0, 15), (0, 30, 1, 80)])
def test_masks_are_those_of_a_loop(masks):
    augment = SpecAugment(*masks)
    lengths = torch.tensor([64, 40, 16, 1, 0])
    features = torch.ones(5, 64, 80)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):  # eighths: their products are exact in float32, and so are the floors
        draws = torch.randint(0, 8, (5, augment.n_draws), generator=generator) / 8
        expected = slow_spec_augment(features, lengths, draws, *masks)
        assert torch.equal(augment(features, lengths, draws), expected)
    assert augment.n_draws == 2 * (masks[0] + masks[2])


def stretches(masked):
    """Lengths of the runs of true in a list."""
    return [len(list(run)) for value, run in itertools.groupby(masked) if value]


def random_draws(n, n_draws, seed=0):
    return torch.rand(n, n_draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width, bound", [(30, lambda n: 30), (0.1, lambda n: 0.1 * n)])
def test_time_masks_stay_inside_the_utterance(width, bound):
    augment = SpecAugment(1, width, 0, 15)
    lengths = torch.arange(200)
    out = augment(torch.ones(200, 200, 4), lengths, random_draws(200, 2))
    masked = out == 0
    for b, n in enumerate(lengths.tolist()):
        assert not masked[b, n:].any()
        assert torch.equal(masked[b].all(1), masked[b].any(1))  # whole frames
        runs = stretches(masked[b, :, 0].tolist())
        assert len(runs) <= 1 and sum(runs) <= bound(n)
    assert masked.any()


def test_frequency_masks_are_bands():
    out = SpecAugment(0, 30, 1, 15)(
        torch.ones(200, 9, 80), torch.full((200,), 9), random_draws(200, 2)
    )
    masked = out == 0
    assert torch.equal(masked.all(1), masked.any(1))  # whole bins
    runs = [stretches(m[0].tolist()) for m in masked]
    assert all(len(r) <= 1 and sum(r) <= 15 for r in runs)
    assert max(map(sum, runs)) >= 13


def test_each_utterance_has_masks_of_its_own_whatever_its_batch():
    augment = SpecAugment(2, 20, 2, 10)
    features, lengths = noise(6, 100, 80), torch.tensor([100, 90, 80, 70, 60, 50])
    before, draws = features.clone(), random_draws(6, augment.n_draws)
    out = augment(features, lengths, draws)
    assert torch.equal(features, before)  # not in place
    assert torch.equal(out, augment(features, lengths, draws.clone()))
    assert len({tuple((row == 0).flatten().tolist()) for row in out}) == 6
    for b in range(6):
        alone = augment(features[b : b + 1], lengths[b : b + 1], draws[b : b + 1])
        assert torch.equal(out[b], alone[0])


@pytest.mark.parametrize("n", [1, 7, 20, 1000, 16384, 36001])
def test_extreme_draws(n):
    augment, lengths = SpecAugment(1, 20, 1, 15), torch.tensor([n])
    features = torch.ones(1, n + 3, 80)
    assert torch.equal(augment(features, lengths, torch.zeros(1, 4)), features)  # no width
    out = augment(features, lengths, torch.full((1, 4), ALMOST_1))  # widest, last
    time, bins = (out[0, :, 0] == 0).tolist(), (out[0, n] == 0).tolist()
    width = min(19, n)
    assert [i for i, masked in enumerate(time) if masked] == list(range(n - width, n))
    assert [i for i, masked in enumerate(bins) if masked] == list(range(66, 80))
    first = torch.tensor([[ALMOST_1, ALMOST_1, 0.0, 0.0]])  # widest, first
    out = augment(features, lengths, first)
    assert (out[0, :width] == 0).all() and (out[0, width:, 14:] == 1).all()


def test_widths_and_places_are_uniform():
    n, trials = 12, 12000
    augment, lengths = SpecAugment(1, 8, 0, 15), torch.full((trials,), n)
    out = augment(torch.ones(trials, n, 1), lengths, random_draws(trials, 2))
    masked = out[:, :, 0] == 0
    widths = masked.sum(1)
    counts = torch.bincount(widths, minlength=8).tolist()
    assert len(counts) == 8
    assert all(abs(count - trials / 8) < 5 * math.sqrt(trials / 8) for count in counts)
    for width in range(1, 8):
        first = masked[widths == width].float().argmax(1)
        places = torch.bincount(first, minlength=n - width + 1).tolist()
        assert len(places) == n - width + 1
        expected = counts[width] / len(places)
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in places)


def test_a_fraction_follows_the_length_and_a_number_does_not():
    features, lengths = torch.ones(2, 400, 4), torch.tensor([400, 100])
    draws = torch.tensor([[0.5, 0.0]]).repeat(2, 1)
    fraction = SpecAugment(1, 0.2, 0, 15)(features, lengths, draws)
    frames = SpecAugment(1, 40, 0, 15)(features, lengths, draws)
    assert (fraction == 0).all(2).sum(1).tolist() == [40, 10]
    assert (frames == 0).all(2).sum(1).tolist() == [20, 20]


def test_an_end_that_is_missing_is_no_audio(tmp_path):
    """Of so short a segment, nothing at all is within the tolerance for inexact headers."""
    path = tmp_path / "cut.mp3"
    soundfile.write(path, sine(440, 16000, 4), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (read_audio, loudest_sample):
        with pytest.raises(AudioError, match="cut short|not readable"):
            read(path, 3.5, 0.09)
