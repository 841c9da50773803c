"""The denoiser of pictures without texts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, SupportsFloat, overload

from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.base import Model
from anamorph.models.blocks import Residual, same_size
from anamorph.models.conditioning import class_embedding
from anamorph.models.embeddings import FourierFeatures, LearnedSteps, Sinusoids, TimestepEmbedding
from anamorph.models.levels import PLAIN_DOWN_BLOCKS, PLAIN_UP_BLOCKS, Kind, Level, check_level, kinds
from anamorph.models.outputs import UNet2DOutput
from anamorph.models.pixel_attention import renamed
from anamorph.models.unet_blocks import MidBlock, Style, check_even, down_ways, timesteps, up_sizes, up_ways

FOURIER_SCALE = 16
"""Standard deviation of the frequencies of new models."""


class UNet2DModel(Model):
    """epsilon, v or x_0 of x_t given t and perhaps a class: [B, C, h, w], t -> [B, C_out, h, w].

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Song et al. 2021 (arXiv:2011.13456), appendix H.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "sample_size": None,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (224, 448, 672, 896),
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "dropout": 0.0,
        "act_fn": "silu",
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "attn_norm_num_groups": None,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": None,
        "num_train_timesteps": None,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "time_embedding_type": ("positional", "fourier", "learned"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "dropout": (0.0,),
        "act_fn": tuple(ACTIVATIONS),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
    }
    PARTS: ClassVar[Mapping[str, str]] = {"unet": "denoise"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, first = self.config, self.config.block_out_channels[0]
        time_width = full.time_embedding_dim or 4 * first
        waves = 2 * first if full.time_embedding_type == "fourier" else first
        self.conv_in = same_size(full.in_channels, first, 3)
        self.time_proj = _waves(full, first)
        self.time_embedding = TimestepEmbedding(waves, time_width)
        self.class_embedding = class_embedding(full, waves, time_width, "silu")
        scale_shift = full.resnet_time_scale_shift == "scale_shift"
        common = Residual(full.norm_num_groups, full.norm_eps, time_width, scale_shift, full.act_fn)
        style = Style(common, full.norm_num_groups, padding=full.downsample_padding)
        down, up = _plans(full)
        self.down_blocks, self.up_blocks = down_ways(down, style), up_ways(up, style)
        self.mid_block = None if full.mid_block_type is None else _middle(full, down[-1][1], style)
        # Which blocks carry a picture along, and how many states of the way down each block of the way up takes.
        self.carrying = tuple(kind.family == "skip" for kind, _ in (*down, *up))
        self.even = any(self.carrying) or any(kind.resample == "resnet" for kind, _ in up)
        self.taken: tuple[int, ...] = tuple(block.taken for block in self.up_blocks)  # type: ignore[misc]
        self.conv_norm_out = common.norm(first)
        self.conv_out = same_size(first, full.out_channels, 3)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        down, up = _plans(full)
        for kind, level in (*down, *up):
            check_level(cls.__name__, kind, level)
            if full.norm_num_groups is None and kind.family != "skip":
                raise ConfigError(f"{cls.__name__} serves norm_num_groups=None only where all blocks are Skip blocks")
        if full.time_embedding_type == "learned" and full.num_train_timesteps is None:
            raise ConfigError(f"{cls.__name__}: time_embedding_type='learned' needs num_train_timesteps")
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return renamed(name)

    def denoise(self, sample: Tensor, timestep: Tensor, *class_labels: Tensor) -> tuple[Tensor]:
        """One call of the denoiser: [B, C, h, w], t (scalar or [B]), perhaps classes -> ([B, C_out, h, w],)."""
        return (self._predict(sample, timestep, *class_labels),)

    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        class_labels: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> UNet2DOutput: ...
    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        class_labels: Tensor | None = None,
        *,
        return_dict: bool,
    ) -> UNet2DOutput | tuple[Tensor]: ...
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from x_t [B, C, h, w] and t (a number, or [B]); `class_labels` are what `class_embed_type` says.

        Raises InputError: an argument does not fit the configuration or the others.
        """
        if (class_labels is None) != (self.class_embedding is None):
            needs = "needs class_labels, which are missing" if class_labels is None else "takes no class_labels"
            raise InputError(f"this UNet {needs}: its class_embed_type is {self.config.class_embed_type!r}")
        predicted = self._predict(sample, timestep, class_labels)
        return UNet2DOutput(predicted) if return_dict else (predicted,)

    def _predict(self, sample: Tensor, timestep: SupportsFloat | Tensor, labels: Tensor | None = None) -> Tensor:
        if self.even:
            check_even(sample, len(self.taken))
        t = timesteps(timestep, sample)
        time = self._time(t, labels, sample)
        picture = 2 * sample - 1 if self.config.center_input_sample else sample
        x = self.conv_in(picture)
        skips = [x]
        carrying = iter(self.carrying)
        for block in self.down_blocks:
            if next(carrying):
                x, states, picture = block(x, picture, time)
            else:
                x, states = block(x, time)
            skips += states
        x = x if self.mid_block is None else self.mid_block(x, time)
        draft: Tensor | None = None
        sizes = up_sizes(sample, skips, self.taken, self.even_sizes)
        for block, count, size in zip(self.up_blocks, self.taken, sizes, strict=True):
            if next(carrying):
                x, draft = block(x, skips[-count:], draft, time)
            else:
                x = block(x, skips[-count:], time, size=size)
            del skips[-count:]
        predicted: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        predicted = predicted if draft is None else predicted + draft
        # With Fourier features the timestep is the noise level sigma, and the net predicts sigma times the score.
        return predicted / t[:, None, None, None] if self.config.time_embedding_type == "fourier" else predicted

    def _time(self, t: Tensor, labels: Tensor | None, sample: Tensor) -> Tensor:
        """act(t_emb) with the class added, [1 or B, time_width]."""
        time: Tensor = self.time_embedding(self.time_proj(t).to(sample.dtype))
        if self.class_embedding is not None and labels is not None:
            timed = self.config.class_embed_type == "timestep"
            labels = self.time_proj(labels).to(sample.dtype) if timed else labels
            time = time + self.class_embedding(labels).to(sample.dtype)
        return ACTIVATIONS[self.config.act_fn](time)


def _waves(config: Config, width: int) -> nn.Module:
    if config.time_embedding_type == "fourier":
        return FourierFeatures(width, log=True, scale=FOURIER_SCALE)
    if config.time_embedding_type == "learned":
        return LearnedSteps(config.num_train_timesteps, width)
    return Sinusoids(width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)


def _plans(config: Config) -> tuple[list[tuple[Kind, Level]], list[tuple[Kind, Level]]]:
    """The way down and the way up: the kind and the level of each block, in order."""
    name, widths, layers = UNet2DModel.__name__, config.block_out_channels, config.layers_per_block
    down = kinds(name, config, "down_block_types", PLAIN_DOWN_BLOCKS)
    up = kinds(name, config, "up_block_types", PLAIN_UP_BLOCKS)
    ways = (
        (down, config.downsample_type, widths, layers),
        (up, config.upsample_type, widths[::-1], layers + 1),
    )
    first, second = (
        [_level(config, kind, change, width, count) for kind, width in zip(every, sizes, strict=True)]
        for every, change, sizes, count in ways
    )
    return first, second


def _level(config: Config, kind: Kind, change: str, width: int, layers: int) -> tuple[Kind, Level]:
    # Only blocks with attention ask the configuration what changes their resolution.
    kind = replace(kind, resample=change) if kind == Kind("pixels") else kind
    head_width = config.attention_head_dim or width
    return kind, Level(width, (1,) * layers, heads=1, head_width=head_width, context_width=1, only_cross=False)


def _middle(config: Config, level: Level, style: Style) -> MidBlock:
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    groups = config.attn_norm_num_groups
    if groups is None and not scale_shift:
        groups = config.norm_num_groups or min(level.channels // 4, 32)
    common = replace(style.residual, scale=config.mid_block_scale_factor)
    style = replace(style, residual=common, attention_groups=groups)
    return MidBlock(Kind("pixels" if config.add_attention else None), level, style, count=2)
