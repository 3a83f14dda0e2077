"""Who speaks: the CAM++ speaker embedding.

H. Wang, S. Zheng, Y. Chen, L. Cheng and Q. Chen, "CAM++: A fast and efficient network for speaker verification using
context-aware masking", Interspeech 2023. Sizes and parameter names are those of ``campplus_cn_common.bin``, the
weights that Seed-VC uses.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from seedvc_train.features.weights import build_empty, digest, fill, read_weights, require

__all__ = ["CampplusEncoder", "CampplusNetwork", "kaldi_fbank"]

DIM = 192
_SR = 16_000
_BINS = 80
_GROWTH = 32
_BOTTLENECK = 128
_BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers and dilation of each dense block
_SEGMENT = 100  # frames over which the mask's local context is averaged
_LEAST = 720  # samples: three frames, of which the network keeps two, the fewest that have a deviation


class CampplusEncoder:
    """The embedding of a voice, as Seed-VC feeds its DiT with it.

    Args:
        path: ``campplus_cn_common.bin``.
        device: where it runs.

    Raises:
        EncoderError: the file is missing, damaged or holds another network.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        require("kaldi_native_fbank", "kaldi-native-fbank")
        self._network = build_empty(CampplusNetwork)
        fill(self._network, read_weights(path), path)
        self.identity = f"campplus {digest(self._network)}"
        self.dim = DIM
        self._device = torch.device(device)
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        """Embed a voice.

        Args:
            wave: float32 at 16 kHz in -1 to 1, (samples,); at least 720 samples.

        Returns:
            (192,), float32 on the CPU.

        Raises:
            ValueError: the wave is too short.
        """
        if len(wave) < _LEAST:
            raise ValueError(f"{len(wave)} samples are too few to tell a voice from, at least {_LEAST} are needed")
        features = kaldi_fbank(wave)
        centred = features - features.mean(dim=0, keepdim=True)
        embedding: torch.Tensor = self._network(centred[None].to(self._device))
        return embedding[0].cpu()


def kaldi_fbank(wave: torch.Tensor) -> torch.Tensor:
    """Log energies of 80 mel bins, (frames, 80), of a float32 wave (samples,) at 16 kHz, as Kaldi computes them.

    Frames of 25 ms every 10 ms, only whole ones; each without its mean, pre-emphasised by 0.97, under the Povey
    window; power spectra of 512 points; triangles on the mel scale from 20 Hz to 8 kHz; no dither. These are the
    defaults of ``torchaudio.compliance.kaldi.fbank``, by which Seed-VC computes them. Samples stay in -1 to 1,
    where Kaldi takes 16-bit integers: this shifts all values alike, but for the floor of float32's epsilon.
    """
    from kaldi_native_fbank import FbankOptions, OnlineFbank

    options = FbankOptions()
    options.frame_opts.samp_freq = _SR
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = _BINS
    fbank = OnlineFbank(options)
    fbank.accept_waveform(_SR, wave.cpu().numpy())
    fbank.input_finished()
    frames = [fbank.get_frame(number) for number in range(fbank.num_frames_ready)]
    return torch.from_numpy(np.stack(frames))


class CampplusNetwork(nn.Module):
    """CAM++: a convolutional front end, three densely connected blocks of masked TDNN layers, statistics pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _FrontEnd()
        channels, layers = 128, OrderedDict[str, nn.Module]()
        layers["tdnn"] = _tdnn(self.head.channels, channels)
        for number, (depth, dilation) in enumerate(_BLOCKS, start=1):
            layers[f"block{number}"] = _dense_block(channels, depth, dilation)
            channels += depth * _GROWTH
            layers[f"transit{number}"] = _named(
                nonlinear=_normed(channels), linear=nn.Conv1d(channels, channels // 2, 1, bias=False)
            )
            channels //= 2
        layers["out_nonlinear"] = _normed(channels)
        layers["stats"] = _Statistics()
        layers["dense"] = _named(
            linear=nn.Conv1d(2 * channels, DIM, 1, bias=False),
            nonlinear=_named(batchnorm=nn.BatchNorm1d(DIM, affine=False)),
        )
        self.xvector = nn.Sequential(layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Mean-free log-mel features (B, frames, 80) to embeddings (B, 192)."""
        pooled: torch.Tensor = self.xvector(self.head(features.transpose(1, 2)))
        return pooled[..., 0]


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _normed(channels: int) -> nn.Sequential:
    return _named(batchnorm=nn.BatchNorm1d(channels), relu=nn.ReLU())


def _tdnn(channels: int, out_channels: int) -> nn.Sequential:
    """Halves the number of frames."""
    linear = nn.Conv1d(channels, out_channels, 5, stride=2, padding=2, bias=False)
    return _named(linear=linear, nonlinear=_normed(out_channels))


def _dense_block(channels: int, depth: int, dilation: int) -> nn.Sequential:
    layers = {f"tdnnd{i + 1}": _DenseLayer(channels + i * _GROWTH, dilation) for i in range(depth)}
    return _named(**layers)


class _FrontEnd(nn.Module):
    """Two-dimensional convolutions over 80 bins and time, which halve the bins three times: (B, 80, T) to
    (B, 320, T).
    """  # noqa: D205

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Residual(width, stride=2), _Residual(width))
        self.layer2 = nn.Sequential(_Residual(width, stride=2), _Residual(width))
        self.conv2 = nn.Conv2d(width, width, 3, stride=(2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.channels = width * _BINS // 8

    def forward(self, bins: torch.Tensor) -> torch.Tensor:
        planes = functional.relu(self.bn1(self.conv1(bins[:, None])))
        planes = self.layer2(self.layer1(planes))
        return functional.relu(self.bn2(self.conv2(planes))).flatten(1, 2)


class _Residual(nn.Module):
    """Two convolutions and a shortcut; ``stride`` is over the bins."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, width, 1, stride=(stride, 1), bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.bn1(self.conv1(planes)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(planes))


class _DenseLayer(nn.Module):
    """A bottleneck and a masked TDNN, whose output is appended to its input: (B, C, T) to (B, C + 32, T)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = _normed(channels)
        self.linear1 = nn.Conv1d(channels, _BOTTLENECK, 1, bias=False)
        self.nonlinear2 = _normed(_BOTTLENECK)
        self.cam_layer = _ContextAwareMask(dilation)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        new = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(frames))))
        return torch.cat([frames, new], dim=1)


class _ContextAwareMask(nn.Module):
    """A TDNN under a mask that is predicted from the mean over the clip plus that over 100 frames (section 2.3)."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(_BOTTLENECK, _GROWTH, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(_BOTTLENECK, _BOTTLENECK // 2, 1)
        self.linear2 = nn.Conv1d(_BOTTLENECK // 2, _GROWTH, 1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        segments = functional.avg_pool1d(frames, _SEGMENT, _SEGMENT, ceil_mode=True)
        local = segments.repeat_interleave(_SEGMENT, dim=-1)[..., : frames.shape[-1]]
        context = functional.relu(self.linear1(frames.mean(dim=-1, keepdim=True) + local))
        masked: torch.Tensor = self.linear_local(frames) * torch.sigmoid(self.linear2(context))
        return masked


class _Statistics(nn.Module):
    """Mean and standard deviation over time: (B, C, T) to (B, 2C, 1)."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.cat([frames.mean(dim=-1), frames.std(dim=-1)], dim=-1)[..., None]
