"""How a DPT's features of several stages become one picture of nearness."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.models.linear import Linear


class Reassemble(nn.Module):
    """Features of one stage in other channels, with their sides times `factor`."""

    def __init__(self, width: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=int(1 / factor), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        resized: Tensor = self.resize(self.projection(x))
        return resized


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.convolution2(F.relu(self.convolution1(F.relu(x))))
        return total


class Fusion(nn.Module):
    """Features of a stage joined to those of the deeper ones, at twice the sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, 1)
        self.residual_layer1 = Residual(channels)
        self.residual_layer2 = Residual(channels)

    def forward(self, x: Tensor, deeper: Tensor | None) -> Tensor:
        if deeper is not None:
            if x.shape != deeper.shape:
                x = F.interpolate(x, size=deeper.shape[2:], mode="bilinear")
            x = deeper + self.residual_layer1(x)
        x = F.interpolate(self.residual_layer2(x), scale_factor=2, mode="bilinear", align_corners=True)
        joined: Tensor = self.projection(x)
        return joined


class Neck(nn.Module):
    """The features of all stages -> one picture of features (Ranftl et al. 2021, arXiv:2103.13413, section 3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, sizes, ready = config.hidden_size, config.neck_hidden_sizes, ready_stages(config)
        stages = [
            nn.Identity() if n in ready else Reassemble(width, channels, factor)
            for n, (channels, factor) in enumerate(zip(sizes, config.reassemble_factors, strict=True))
        ]
        self.reassemble_stage = nn.ModuleDict({"layers": nn.ModuleList(stages)})
        self.readout = config.readout_type
        if self.readout == "project":
            readouts = [
                nn.Identity() if n in ready else nn.Sequential(Linear(2 * width, width), nn.GELU())
                for n in range(len(sizes))
            ]
            self.reassemble_stage["readout_projects"] = nn.ModuleList(readouts)
        features = config.fusion_hidden_size
        self.convs = nn.ModuleList(nn.Conv2d(channels, features, 3, padding=1, bias=False) for channels in sizes)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(features) for _ in sizes)})

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        parts: Any = self.reassemble_stage
        fusion: Any = self.fusion_stage["layers"]
        features = [
            conv(x if x.ndim == 4 else parts["layers"][n](self._picture(x, n)))
            for n, (x, conv) in enumerate(zip(stages, self.convs, strict=True))
        ]
        joined: Tensor | None = None
        for x, layer in zip(reversed(features), fusion, strict=True):
            joined = layer(x, joined)
        assert joined is not None
        return joined

    def _picture(self, tokens: Tensor, n: int) -> Tensor:
        """Tokens [B, 1 + s^2, D] as a picture [B, D, s, s] that knows of the whole."""
        whole, patches = tokens[:, :1], tokens[:, 1:]
        if self.readout == "project":
            projects: Any = self.reassemble_stage["readout_projects"]
            patches = projects[n](torch.cat((patches, whole.expand_as(patches)), -1))
        elif self.readout == "add":
            patches = patches + whole
        side = int(patches.shape[1] ** 0.5)
        return torch.unflatten(patches.transpose(1, 2), 2, (side, side))


class Head(nn.Module):
    """Features -> nearness of each pixel, 0 or more, at twice the sides."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        features = config.fusion_hidden_size
        self.projection = nn.Conv2d(features, features, 3, padding=1) if config.add_projection else None
        self.head = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.projection is None else F.relu(self.projection(x))
        near: Tensor = self.head(x).squeeze(1)
        return near


def ready_stages(config: Config) -> tuple[int, ...]:
    """The stages that are pictures of features already."""
    return (0, 1) if config.is_hybrid else ()
