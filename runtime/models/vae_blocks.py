"""The two halves of an autoencoder between pictures and latents."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.models.blocks import Downsample2D, Residual, ResnetBlock2D, Upsample2D, through
from anamorph.models.pixel_attention import PixelAttention


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then half of it."""

    def __init__(self, channels_in: int, channels: int, layers: int, common: Residual, *, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnets(channels_in, channels, layers, common))
        self.downsamplers = nn.ModuleList([Downsample2D(channels, padding=0)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets, self.downsamplers)


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then twice of it."""

    def __init__(self, channels_in: int, channels: int, layers: int, common: Residual, *, double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnets(channels_in, channels, layers, common))
        self.upsamplers = nn.ModuleList([Upsample2D(channels)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets, self.upsamplers)


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, attention between them where the configuration has it."""

    def __init__(self, channels: int, common: Residual, *, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=common.groups)] if attention else [])
        self.resnets = nn.ModuleList(_resnets(channels, channels, 2, common))

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.resnets[:1], self.attentions, self.resnets[1:])


class Encoder(nn.Module):
    """Pictures [B, C, H, W] -> [B, width, h, w], one level per entry of `block_out_channels`."""

    def __init__(self, config: Config, common: Residual, width: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], width, layers, common, halve=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], common, attention=config.mid_block_add_attention)
        self.conv_norm_out = common.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = through(self.conv_in(x), self.down_blocks)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return encoded


class Decoder(nn.Module):
    """Latents [B, c, h, w] -> pictures [B, C, H, W]; the encoder's levels in reverse, one residual block more each."""

    def __init__(self, config: Config, common: Residual) -> None:
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], common, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(widths[max(i - 1, 0)], width, layers, common, double=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = common.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = through(self.mid_block(self.conv_in(z)), self.up_blocks)
        decoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(z)))
        return decoded


def _resnets(channels_in: int, channels: int, layers: int, common: Residual) -> Iterable[ResnetBlock2D]:
    return (ResnetBlock2D(channels if layer else channels_in, channels, common) for layer in range(layers))


def check_blocks(class_name: str, config: Config) -> None:
    """Raise ConfigError where a level's block is another than the one kind that is served."""
    levels = len(config.block_out_channels)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if config[key] != (block,) * levels:
            raise ConfigError(f"{class_name} does not serve {key}={config[key]!r}; it serves {levels} times {block}")
