"""Speech: frames of a waveform as tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Config, Stem
from d2v.model.layers import (
    NORM_EPS,
    LayerNorm,
    Linear,
    check_lengths,
    convolve,
    norm_gelu,
    standardise,
    valid_positions,
)
from d2v.model.stems.base import InputStem, StemFlops

SAMPLE_RATE = 16_000
_WINDOW, _HOP, _FFT = 400, 160, 512  # 25 ms every 10 ms
_RANGE = 1e-4
"""Power of the quietest band that differs from silence, over the loudest of the utterance: 40 dB."""
_LEAST_POWER = 1e-5


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None  # type: ignore[attr-defined]


class SpeechStem(InputStem):
    """What stems of waveforms share: checks, and the lengths of their tokens."""

    spec: tuple[tuple[int, int, int], ...]
    """Channels, kernel and stride of each step from samples to tokens."""
    shape: tuple[int, ...] = ()  # of one sample of a waveform; (N,) for N channels

    def samples_needed(self) -> int:
        """Samples of the shortest waveform that yields a token: 400 for the published convolutions."""
        field = 1
        for _, kernel, stride in reversed(self.spec):
            field = (field - 1) * stride + kernel
        return field

    def count_tokens(self, samples: int) -> int:
        """Tokens of a waveform: (n - kernel) // stride + 1 through all steps; what fills no token is dropped."""
        for _, kernel, stride in self.spec:
            samples = (samples - kernel) // stride + 1
        return samples

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Checks inputs (B,S), or (B,S,N) of N channels, and lengths, int64 (B,) on the host: samples before the
        padding.

        Returns the tokens T, and of each row those before its padding, or None: all.

        Raises:
            ValueError, TypeError: other shapes or dtypes, waveforms that yield no token, lengths that do not fit; on
                the host also samples that are not finite.
        """
        if not inputs.is_floating_point():
            raise TypeError(f"inputs: expected floating waveforms, got {str(inputs.dtype).removeprefix('torch.')}")
        if inputs.dim() < 2 or tuple(inputs.shape[2:]) != self.shape:
            expected = ", ".join(["B", "S", *map(str, self.shape)])
            raise ValueError(f"inputs: expected waveforms of shape ({expected}), got {tuple(inputs.shape)}")
        batch, samples = inputs.shape[:2]
        if samples < (needed := self.samples_needed()):
            raise ValueError(f"inputs: expected at least {needed} samples, the receptive field, got {samples}")
        lengths = check_lengths(lengths, batch, samples, needed)
        if inputs.device.type == "cpu" and not bool(torch.isfinite(inputs).all()):
            rows = (~torch.isfinite(inputs)).flatten(1).any(dim=1).nonzero()[:, 0].tolist()[:8]
            raise ValueError(f"inputs: expected finite samples, got NaN or infinity in rows {rows}")
        tokens = self.count_tokens(samples)
        if lengths is None:
            return tokens, None
        valid = torch.tensor([self.count_tokens(n) for n in lengths.tolist()], dtype=torch.int64)
        return tokens, None if bool((valid == tokens).all()) else valid


class WaveformStem(SpeechStem):
    """Convolutions of the waveform, each with GELU, and layer norm over channels before it or, behind the first one
    alone, a norm over time; then layer norm and a projection.

    wav2vec 2.0 (Baevski et al. 2020, section 2), as data2vec 1.0 and 2.0 use it.
    """

    def __init__(
        self, config: Stem, width: int, channels: int | None = None, over_padding: bool = False
    ) -> None:  # fmt: skip
        """
        Args:
            config: the convolutions.
            width: channels C of a token.
            channels: N of inputs (B,S,N); None: inputs are (B,S).
            over_padding: the norm over time counts padding.
        """
        super().__init__()
        self.over_padding = over_padding
        self.spec, self.gradient_scale = config.convolutions, config.gradient_scale
        self.step = math.prod(stride for _, _, stride in self.spec)
        self.shape = () if channels is None else (channels,)
        inputs = [channels or 1, *(c for c, _, _ in self.spec)]
        self.convs = nn.ModuleList(
            nn.Conv1d(i, channels, kernel, stride, bias=config.convolution_bias)
            for i, (channels, kernel, stride) in zip(inputs[:-1], self.spec, strict=True)
        )
        if config.convolution_norm == "group":
            self.norms = nn.ModuleList([nn.GroupNorm(inputs[1], inputs[1], eps=NORM_EPS)])
        else:
            self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=NORM_EPS) for channels in inputs[1:])
        self.norm = LayerNorm(inputs[-1], eps=config.norm_eps)
        self.proj = Linear(inputs[-1], width)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv1d)
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames (B,T,C) of waveforms that `measure` took, or `mark` made; padded frames are computed too."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient_scale > 0.0):
            x = inputs if inputs.dim() == 3 else inputs[..., None]
            if isinstance(self.norms[0], nn.GroupNorm):
                x = self._norm_over_time(x, self.norms[0])
            else:
                for conv, norm in zip(self.convs, self.norms, strict=True):
                    assert isinstance(conv, nn.Conv1d)
                    assert isinstance(norm, nn.LayerNorm)
                    x = norm_gelu(convolve(conv, x), norm.weight, norm.bias)
        if self.gradient_scale not in (0.0, 1.0):
            x = _ScaleGradient.apply(x, self.gradient_scale)
        return self.proj(self.norm(x))

    def mark(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B,S,N+1) where the norm over time needs to know the padding: the last channel is 1 before it, else 0."""
        if self.over_padding or lengths is None or not isinstance(self.norms[0], nn.GroupNorm):
            return inputs
        valid = valid_positions(lengths, inputs.shape[1], inputs.device)
        assert valid is not None
        return torch.cat([inputs if self.shape else inputs[..., None], valid[..., None].to(inputs)], dim=2)

    def _norm_over_time(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """The convolutions, with a norm of each channel over the frames before the padding behind the first one."""
        first, *others = self.convs
        assert isinstance(first, nn.Conv1d)
        shown = None
        if x.shape[2] > first.in_channels:  # a frame is before the padding where its last sample is
            _, kernel, stride = self.spec[0]
            x, shown = x[..., :-1], x[:, kernel - 1 :: stride, -1:]
        x = convolve(first, x)
        x = F.gelu((standardise(x, 1, shown) * norm.weight + norm.bias).to(x.dtype))
        for conv in others:
            assert isinstance(conv, nn.Conv1d)
            x = F.gelu(convolve(conv, x))
        return x

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """Of its convolutions and the projection."""
        layers = []
        for conv, (_, kernel, stride) in zip(self.convs, self.spec, strict=True):
            length = (length - kernel) // stride + 1
            layers.append(2.0 * length * conv.weight.numel())  # type: ignore[operator]
        projection = 2.0 * tokens * self.proj.weight.numel()
        if self.gradient_scale == 0.0:
            return 0.0, projection, sum(layers)
        return layers[0], sum(layers[1:]) + projection, 0.0


class LogMelStem(SpeechStem):
    """Log-mel spectrogram without its mean over time, some frames a token, layer norm, linear. Not a published stem."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: Stem, width: int) -> None:
        """
        Args:
            config: bands and frames a token.
            width: channels C of a token.
        """
        super().__init__()
        self.frames = config.mel_frames
        width_in = config.mel_bins * self.frames
        self.spec = ((config.mel_bins, _WINDOW, _HOP), (width_in, self.frames, self.frames))
        self.step = _HOP * self.frames
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(config.mel_bins), persistent=False)
        self.norm = LayerNorm(width_in, eps=NORM_EPS)
        self.proj = Linear(width_in, width)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (B,T,C) of waveforms (B,S) at 16 kHz that `measure` took, or of what `prepare` made of them; padded
        tokens are computed too."""
        bands = inputs if inputs.dim() == 3 else self.prepare(inputs, lengths)
        tokens = bands.shape[1] // self.frames
        return self.proj(self.norm(bands.reshape(bands.shape[0], tokens, -1).to(self.proj.weight.dtype)))

    def prepare(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B,F,bins) float32: `make_bands` minus the mean of each band over the frames before the padding, where it
        becomes 0. The mean holds the spectrum of voice, reverberation and microphone (cepstral mean normalisation:
        Atal 1974)."""
        if lengths is None:
            bands = self.make_bands(inputs)
            return bands - bands.mean(dim=1, keepdim=True)
        tokens = self.count_tokens(inputs.shape[1])
        valid = valid_positions(lengths * self.frames, tokens * self.frames, inputs.device)
        assert valid is not None
        bands = self.make_bands(inputs, valid) * valid[..., None]
        return (bands - bands.sum(dim=1, keepdim=True) / valid.sum(dim=1)[:, None, None]) * valid[..., None]

    def make_bands(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B,F,bins) float32: log power of each band in the F frames that fill tokens, of waveforms (B,S).

        At least 40 dB below the loudest band of the row's frames before its padding: what is quieter is the noise of a
        recording, and in bands that a low sampling rate left empty the rounding, which distinguishes
        speakers and not words. valid: bool (B,F), True before the padding; None: there is none.
        """
        tokens = self.count_tokens(inputs.shape[1])
        frames = inputs.unfold(1, _WINDOW, _HOP)[:, : tokens * self.frames]
        with torch.autocast(inputs.device.type, enabled=False):
            spectrum = torch.fft.rfft(frames.float() * self.window.float(), _FFT)
            # Not abs().square(): that takes a square root on the way, three times as slow on a CPU.
            power = (spectrum.real.square() + spectrum.imag.square()) @ self.filters.float()
            loudest = (power if valid is None else power * valid[..., None]).amax(dim=(1, 2), keepdim=True)
            return power.maximum(loudest * _RANGE).clamp_min(_LEAST_POWER).log()

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """The bands are not trained; before the projection stands a trained norm."""
        frequencies, bins = self.filters.shape
        projection = 2.0 * tokens * bins * self.frames * self.proj.out_features
        return 0.0, projection, 2.0 * tokens * self.frames * frequencies * bins


def make_stem(config: Config) -> SpeechStem:
    """The stem of speech."""
    if config.stem.kind == "log-mel":
        return LogMelStem(config.stem, config.encoder.width)
    over_padding = "statistics-over-padding" in config.published
    return WaveformStem(config.stem, config.encoder.width, over_padding=over_padding)


def mel_filters(bins: int) -> Tensor:
    """(257, bins) float32: triangles on the mel scale, mel = 2595 log10(1 + f / 700), from 0 to 8 kHz."""
    top = 2595.0 * math.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, bins + 2, dtype=torch.float64) / 2595.0) - 1.0)
    hertz = torch.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0.0).float()
