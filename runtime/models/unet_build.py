"""What a UNet that looks at a text is built of, read from its configuration."""

from dataclasses import replace

from torch import nn

from anamorph.config import Config
from anamorph.models.blocks import Residual
from anamorph.models.embeddings import FourierFeatures, Sinusoids
from anamorph.models.levels import MID_BLOCKS, down_levels
from anamorph.models.unet_blocks import MidBlock, Style


def waves(config: Config, width: int) -> nn.Module:
    """What makes waves [N, width] of timesteps [N]."""
    if config.time_embedding_type == "fourier":
        return FourierFeatures(width // 2, log=False, flip_sin_to_cos=config.flip_sin_to_cos)
    return Sinusoids(width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)


def style_of(config: Config, time_width: int) -> Style:
    """What all blocks have in common."""
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    return Style(
        Residual(config.norm_num_groups, config.norm_eps, time_width, scale_shift, config.act_fn),
        config.norm_num_groups,
        padding=config.downsample_padding,
        out_scale=config.resnet_out_scale_factor,
        linear=config.use_linear_projection,
        norm_context=config.cross_attention_norm,
    )


def middle(config: Config, style: Style) -> MidBlock | None:
    """The block in the middle, if there is one."""
    kind, level = MID_BLOCKS[config.mid_block_type], down_levels(config)[-1]
    if kind is None:
        return None
    only_cross = config.mid_block_only_cross_attention
    if only_cross is None:
        only_cross = config.only_cross_attention if isinstance(config.only_cross_attention, bool) else False
    # A transformer in the middle looks at its own tokens first whatever the configuration says, as in diffusers.
    level = replace(level, only_cross=only_cross and kind.attention != "transformer")
    style = replace(style, residual=replace(style.residual, scale=config.mid_block_scale_factor))
    return MidBlock(kind, level, style, count=2 if kind.attention else 1)
