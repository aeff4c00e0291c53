"""Waveforms and log-mel features.

Shapes: B batch, S samples at 16 kHz, T frames of 10 ms, F mel bins.
The only file of this package that knows torchaudio and soundfile.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional
from torch import nn

from fairasr_min.layers import length_mask, linear

SAMPLE_RATE = 16_000
WINDOW = 400  # 25 ms
HOP = 160  # 10 ms
N_FFT = 512
N_MELS = 80
PRE_EMPHASIS = 0.97
BLOCK = 2**20  # samples of each channel decoded at once
FRAMES = 2**15  # whose spectra stand in memory at once: five minutes
ABSURD = 1e6  # of samples, which lie within 1; squared, larger ones overflow in the end
LARGEST_RATIO = 1500  # of sample rates: resampling by 44,101 / 16,000 needs a filter of gigabytes
LOG_GUARD = 2.0**-24  # added before the logarithm: digital silence has no logarithm


class AudioError(ValueError):
    """An audio file that cannot be used; the message names the file and the reason."""


def audio_seconds(path: str | Path) -> float:
    """Length in seconds, read from the file's header. Raises AudioError."""
    try:
        info = soundfile.info(path)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:
        raise AudioError(f"{path}: not readable as audio ({_reason(error)})") from None
    if info.frames <= 0 or info.samplerate <= 0:
        raise AudioError(f"{path}: holds no audio samples")
    return info.frames / info.samplerate


def read_audio(path: str | Path, offset: float = 0.0, seconds: float | None = None) -> torch.Tensor:
    """Read wav, flac, ogg, opus or mp3 as mono float32 (S,) at 16 kHz.

    Channels are averaged, other sample rates resampled (band-limited sinc). `offset` and
    `seconds` cut a segment out of a longer recording. Raises AudioError if the file cannot be
    decoded, is empty or cut short, or holds NaN or infinite samples.
    """
    return at_16_khz(*decode_audio(path, offset, seconds))


def decode_audio(path: str | Path, offset: float = 0.0, seconds: float | None = None):
    """The first half of read_audio: -> sample rate in Hz, mono float32 samples (S,) at that rate.
    The decoders run outside of Python's lock: several threads can do this at once. Raises
    AudioError as read_audio does."""
    rates, blocks = zip(*_blocks(path, offset, seconds))
    return rates[0], np.concatenate(blocks)


def at_16_khz(rate: int, samples: np.ndarray) -> torch.Tensor:
    """The second half of read_audio: rate in Hz, samples (S,) -> waveform (S',) at 16 kHz."""
    waveform = torch.from_numpy(samples)
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
    return waveform


def loudest_sample(path: str | Path, offset: float = 0.0, seconds: float | None = None) -> float:
    """Largest absolute sample, 0 for digital silence; decodes everything, little at a time.
    Raises AudioError wherever read_audio does."""
    return max(float(abs(block).max()) for _, block in _blocks(path, offset, seconds))


def _blocks(path, offset, seconds):
    """Yield (sample rate, mono float32 samples): one block after another, so that many channels
    or hours never stand in memory at once. At least one; see read_audio for what is raised."""
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if rate // math.gcd(rate, SAMPLE_RATE) > LARGEST_RATIO:
                raise AudioError(f"{path}: {rate} Hz has no simple ratio to 16 kHz; resample it")
            first = min(round(offset * rate), file.frames)
            left = file.frames - first
            if seconds is not None:
                left = min(left, round(seconds * rate))
            if left <= 0:
                raise AudioError(f"{path}: holds no audio samples")
            promised, size, lead = left, BLOCK, 0
            if file.format == "MP3":  # each of its frames needs those before it: read in one go
                size, lead = left, min(first, rate)
            if first:
                file.seek(first - lead)
            while left > 0:
                block = file.read(lead + min(left, size), dtype="float32", always_2d=True)[lead:]
                lead = 0
                if len(block) == 0:
                    break
                if not (peak := np.abs(block).max()) < ABSURD:  # also NaN
                    odd = (
                        f"a sample of {peak:.0e}"
                        if np.isfinite(peak)
                        else "NaN or infinite samples"
                    )
                    raise AudioError(f"{path}: holds {odd}")
                left -= len(block)
                yield rate, block.mean(axis=1)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:
        raise AudioError(f"{path}: not readable as audio ({_reason(error)})") from None
    # headers of some mp3 files are not exact
    if left == promised or left > max(0.1 * rate, 0.02 * promised):
        there = (promised - left) / rate
        raise AudioError(f"{path}: cut short, {there:.2f} of {promised / rate:.2f} s are there")


def _reason(error: Exception) -> str:
    # libsndfile repeats the path in front of its reason; the caller names it already
    return str(error).split(": ", 1)[-1].strip().rstrip(".") or type(error).__name__


def pad_waveforms(waveforms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Samples at 16 kHz, (S,) each -> (B, S'), zeros at the end: as few as give a multiple of 16
    feature frames (of 10 ms). What is made for the shape of a batch then serves many batches
    (runtime.setup; a GPU wants still fewer shapes: recurring() in conformer.py)."""
    padded = nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
    more = -(padded.shape[1] + HOP) % (16 * HOP)  # S samples have S // HOP + 1 frames
    return F.pad(padded, (0, more))


class LogMel(nn.Module):
    """Log-mel features as NeMo (2.5 and later) computes them, without its random dither.

    Pre-emphasis 0.97, 25 ms Hann window every 10 ms, 512-point power spectrum, 80 Slaney mel
    bins, logarithm; then zero mean and unit variance per utterance and bin over its own frames.
    Always float32, whatever autocast says: a power spectrum overflows half precision.

    The filter matrix and the window are buffers, so that a checkpoint carries its own.
    """

    def __init__(
        self,
        n_mels: int = N_MELS,
        *,
        window: int = WINDOW,  # samples
        hop: int = HOP,  # samples
        n_fft: int = N_FFT,
        window_type: str = "hann",  # or hamming, blackman, bartlett
        low_freq: float = 0.0,  # Hz, of the mel bins
        high_freq: float = SAMPLE_RATE / 2,
        mel_norm: str | None = "slaney",  # triangles of equal area; None: of equal height
        pre_emphasis: float = PRE_EMPHASIS,  # 0: none
        mag_power: float = 2.0,  # 1: magnitudes instead of power
        log: bool = True,
        log_guard: float = LOG_GUARD,
        log_guard_type: str = "add",  # or clamp
        normalize: str = "per_feature",  # or all_features: one mean and variance; or none
        pad_to: int = 0,  # T is filled up to a multiple of this; 0: it is not
        pad_value: float = 0.0,
    ):
        """Raises ValueError for lengths that make no sense."""
        super().__init__()
        if not (0 < hop <= window <= n_fft and 0 <= pad_to <= 1024):
            raise ValueError(f"window {window}, hop {hop}, n_fft {n_fft}, pad_to {pad_to}")
        mel = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, low_freq, high_freq, n_mels, SAMPLE_RATE, mel_norm, "slaney"
        )
        self.register_buffer("mel", mel.T.contiguous())  # (F, 257)
        make_window = getattr(torch, f"{window_type}_window")
        self.register_buffer("window", make_window(window, periodic=False))  # (400,)
        self.hop, self.n_fft = hop, n_fft
        self.pre_emphasis, self.mag_power = pre_emphasis, mag_power
        self.log, self.log_guard, self.log_guard_type = log, log_guard, log_guard_type
        self.normalize, self.pad_to, self.pad_value = normalize, pad_to, pad_value

    @torch.no_grad()
    def forward(self, waveforms: torch.Tensor, n_samples: torch.Tensor):
        """(B, S), (B,) -> features (B, T, F), n_frames (B,).

        n_frames = n_samples // hop, and T = S // hop + 1 (or more, see pad_to): the last frame is
        always padding. Frames from n_frames on hold pad_value, and no utterance depends on what it
        is batched with.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            x = waveforms.float()
            x = torch.cat([x[:, :1], x[:, 1:] - self.pre_emphasis * x[:, :-1]], dim=1)
            x = x.masked_fill(~length_mask(n_samples, x.shape[1]), 0.0)  # also NaN
            # frames are centred on multiples of the hop; those of an hour come block by block
            x = F.pad(x, (self.n_fft // 2, self.n_fft // 2))
            starts = range(0, x.shape[1] - self.n_fft + 1, FRAMES * self.hop)
            size = (FRAMES - 1) * self.hop + self.n_fft
            blocks = [self._log_mel(x[:, start : start + size]) for start in starts]
            x = torch.cat(blocks, dim=1)  # (B, T, F)

            n_frames = n_samples // self.hop
            valid = length_mask(n_frames, x.shape[1])[:, :, None]
            if self.normalize != "none":
                x = standardized(x, valid, over=1 if self.normalize == "per_feature" else (1, 2))
            x = x.masked_fill(~valid, self.pad_value)
            if self.pad_to:
                x = F.pad(x, (0, 0, 0, -x.shape[1] % self.pad_to), value=self.pad_value)
            return x, n_frames

    def _log_mel(self, x):
        """(B, S) -> (B, T, F): a frame of n_fft samples at each multiple of the hop."""
        spectrum = torch.stft(  # (B, 257, T)
            x, self.n_fft, self.hop, len(self.window), self.window,
            center=False, return_complex=True,
        )  # fmt: skip
        squares = torch.view_as_real(spectrum).square()
        power = squares[..., 0] + squares[..., 1]
        if self.mag_power != 2:
            power = power.pow(self.mag_power / 2)
        x = linear(power.transpose(1, 2), self.mel)
        if not self.log:
            return x
        clamp = self.log_guard_type == "clamp"
        return torch.log(x.clamp(min=self.log_guard) if clamp else x + self.log_guard)


def standardized(x: torch.Tensor, valid: torch.Tensor, over: int | tuple[int, int]):
    """(B, T, F), (B, T, 1) bool -> (B, T, F): mean 0 and variance 1 over the valid frames alone."""
    count = valid.expand_as(x).sum(over, keepdim=True)
    mean = (x * valid).sum(over, keepdim=True) / count.clamp(min=1)
    x = (x - mean) * valid
    variance = x.square().sum(over, keepdim=True) / (count - 1).clamp(min=1)
    return x / (variance.sqrt() + 1e-5)


class SpecAugment:
    """Masks random stretches of time and bands of frequency with zeros (the mean of LogMel).

    Park et al., "SpecAugment", Interspeech 2019. Every utterance gets masks of its own, inside
    its true length. A width below 1 is a fraction of the utterance, else a number of frames.

    The random numbers come in as an argument: the data set draws them from (seed, epoch,
    utterance), so that a mask depends neither on batch mates, nor on workers or processes.
    """

    def __init__(self, time_masks: int, time_width: float, freq_masks: int, freq_width: int):
        self.time_masks, self.time_width = time_masks, time_width
        self.freq_masks, self.freq_width = freq_masks, freq_width
        self.n_draws = 2 * (time_masks + freq_masks)

    def __call__(self, features: torch.Tensor, n_frames: torch.Tensor, draws: torch.Tensor):
        """(B, T, F), (B,), (B, n_draws) uniform in [0, 1) -> (B, T, F). Does not write in place."""
        width, start = draws.to(features.device).chunk(2, dim=1)  # (B, masks) each
        limit = n_frames[:, None].float()
        longest = limit * self.time_width if self.time_width < 1 else float(self.time_width)
        t, f = self.time_masks, self.time_masks + self.freq_masks
        time = _bands(width[:, :t] * longest, start[:, :t], limit, features.shape[1])
        bins = torch.full_like(limit, features.shape[2])
        freq = _bands(width[:, t:f] * self.freq_width, start[:, t:f], bins, features.shape[2])
        return features.masked_fill(time[:, :, None] | freq[:, None, :], 0.0)


def _bands(width, start, limit, size):
    """Widths and relative starts (B, masks) -> (B, size), true inside any of the masks."""
    width = torch.minimum(width.floor(), limit)
    first = (start * (limit - width + 1)).floor()
    position = torch.arange(size, device=width.device)[None, None, :]
    inside = (position >= first[:, :, None]) & (position < (first + width)[:, :, None])
    return inside.any(dim=1)
