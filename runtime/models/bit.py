"""The convolutional network before the transformer of DPT's hybrid: a residual network of standardised weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError

DEFAULTS: Mapping[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": (256, 512, 1024, 2048),
    "depths": (3, 4, 9),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "global_padding": "SAME",
    "num_groups": 32,
    "embedding_dynamic_padding": True,
    "output_stride": 32,
    "width_factor": 1,
}
ONLY: Mapping[str, tuple[Any, ...]] = {
    "layer_type": ("bottleneck",),
    "hidden_act": ("relu",),
    "global_padding": ("SAME", "same"),
    "embedding_dynamic_padding": (True,),
    "output_stride": (32,),
    "width_factor": (1,),
}
STAGES = 3
"""How many stages a hybrid has; each but the first halves the sides."""
NARROWER = 4
"""How many times fewer channels the 3x3 convolutions have."""


def backbone_config(given: Mapping[str, Any] | None) -> Config:
    """The keys of a hybrid's `backbone_config` that say something about it; transformers writes many others.

    Raises ConfigError: a value is not served.
    """
    full = Config({key: (given or {}).get(key, value) for key, value in DEFAULTS.items()})
    for key, allowed in ONLY.items():
        if full[key] not in allowed:
            served = ", ".join(map(repr, allowed))
            raise ConfigError(f"a DPT's backbone_config does not serve {key}={full[key]!r}; it serves {served}")
    if len(full.depths) != STAGES:
        raise ConfigError(f"a DPT's backbone_config has depths={full.depths!r}, expected {STAGES} of them")
    return full


class StandardizedConv(nn.Conv2d):
    """A convolution with (w - mean) / sqrt(variance + eps) per output channel, padded so that a stride rounds up.

    Source: Qiao et al. 2019 (arXiv:1903.10520), equation 6.
    """

    def __init__(self, channels: int, out: int, size: int, stride: int = 1) -> None:
        super().__init__(channels, out, size, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-8)
        return F.conv2d(padded(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


def padded(x: Tensor, size: int, stride: int) -> Tensor:
    """Zeros around [B, C, h, w] so that windows of `size` are there for every begun `stride`, the odd one last."""
    missing = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[:1:-1]]
    return F.pad(x, [part for total in missing for part in (total // 2, total - total // 2)])


class Downsample(nn.Module):
    """The shortcut of a stage's first layer: other channels, perhaps half the sides."""

    def __init__(self, channels: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = StandardizedConv(channels, out, 1, stride)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        short: Tensor = self.norm(self.conv(x))
        return short


class Bottleneck(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))), each convolution normed (He et al. 2015, arXiv:1512.03385, fig. 5)."""

    def __init__(self, channels: int, out: int, stride: int, groups: int, *, first: bool) -> None:
        super().__init__()
        inner = out // NARROWER
        self.downsample = Downsample(channels, out, stride, groups) if first else None
        self.conv1 = StandardizedConv(channels, inner, 1)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.conv2 = StandardizedConv(inner, inner, 3, stride)
        self.norm2 = nn.GroupNorm(groups, inner)
        self.conv3 = StandardizedConv(inner, out, 1)
        self.norm3 = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + short)


class Backbone(nn.Module):
    """Pictures [B, C, H, W] -> the features of each stage, [B, C_n, H / 4, W / 4], then half the sides each.

    Source: Kolesnikov et al. 2019 (arXiv:1912.11370), section 3.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        groups, width = config.num_groups, config.embedding_size
        stages = []
        for n, (depth, out) in enumerate(zip(config.depths, config.hidden_sizes, strict=False)):
            layers = [
                Bottleneck(width if m == 0 else out, out, 2 if n and m == 0 else 1, groups, first=m == 0)
                for m in range(depth)
            ]
            stages.append(nn.ModuleDict({"layers": nn.Sequential(*layers)}))
            width = out
        stem = StandardizedConv(config.num_channels, config.embedding_size, 7, 2)
        norm = nn.GroupNorm(groups, config.embedding_size)
        self.bit = nn.ModuleDict(
            {
                "embedder": nn.ModuleDict({"convolution": stem, "norm": norm}),
                "encoder": nn.ModuleDict({"stages": nn.ModuleList(stages)}),
            }
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        stem: Any = self.bit["embedder"]
        encoder: Any = self.bit["encoder"]
        x = F.relu(stem["norm"](stem["convolution"](pixels)))
        x = F.max_pool2d(padded(x, 3, 2), 3, 2)
        features = []
        for stage in encoder["stages"]:
            x = stage["layers"](x)
            features.append(x)
        return features
