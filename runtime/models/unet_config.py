"""The configuration of a UNet that looks at a text: diffusers' keys, and which of their values are served."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from anamorph.conditions import ADDED, PROJECTED
from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.models.activations import ACTIVATIONS
from anamorph.models.conditioning import CLASS_TYPES
from anamorph.models.levels import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, Kind, check_levels, kinds, up_levels

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "only_cross_attention": False,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    }
)
"""diffusers' keys and defaults."""

ONLY: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "mid_block_type": tuple(MID_BLOCKS),
        "dropout": (0.0,),
        "act_fn": tuple(ACTIVATIONS),
        "encoder_hid_dim_type": tuple(PROJECTED),
        "dual_cross_attention": (False,),
        "class_embed_type": CLASS_TYPES,
        "addition_embed_type": tuple(ADDED),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "time_embedding_type": ("positional", "fourier"),
        "time_embedding_act_fn": (None, *ACTIVATIONS),
        "timestep_post_act": (None, *ACTIVATIONS),
        "attention_type": ("default",),
        "cross_attention_norm": (None, "layer_norm", "group_norm"),
    }
)
"""Keys of which only some values are served."""


def check_unet(class_name: str, config: Config) -> None:
    """Raise ConfigError where keys contradict one another, or a level does not come out even."""
    check_levels(class_name, config)
    down = kinds(class_name, config, "down_block_types", DOWN_BLOCKS)
    up = kinds(class_name, config, "up_block_types", UP_BLOCKS)
    middle = MID_BLOCKS[config.mid_block_type]
    every = (*down, *up, *(() if middle is None else (middle,)))
    karras = down[0].family == "k"
    if karras and not _fits(config, down):
        raise ConfigError(
            f"{class_name}: the ways of k-diffusion's blocks do not fit; attention in the lowest one down needs a "
            "lowest one up with as many channels as the next and as time_embedding_dim, and no other needs it"
        )
    if config.norm_num_groups is None and not (karras and middle is None):
        raise ConfigError(f"{class_name} does not serve norm_num_groups=None; it needs the number of groups")
    if config.resnet_skip_time_act and any(kind.resample != "resnet" for kind in every):
        raise ConfigError(f"{class_name} serves resnet_skip_time_act only where every block is of IF's kind")
    for key, needed in (
        ("encoder_hid_dim", config.encoder_hid_dim_type is not None or config.addition_embed_type == "image"),
        ("addition_time_embed_dim", config.addition_embed_type == "text_time"),
        (
            "projection_class_embeddings_input_dim",
            config.addition_embed_type == "text_time" or "projection" in (config.class_embed_type or ""),
        ),
    ):
        if needed and config[key] is None:
            raise ConfigError(f"{class_name}: the kinds of its embeddings need a number for {key}, got None")


def _fits(config: Config, down: Sequence[Kind]) -> bool:
    """Whether those of k-diffusion's blocks that take no state of the way down are those that get none."""
    levels = up_levels(config)
    time_width = (
        config.time_embedding_dim or (2 if config.time_embedding_type == "fourier" else 4) * levels[-1].channels
    )
    after = (*levels[1:], levels[-1])
    alone = [level.channels == following.channels == time_width for level, following in zip(levels, after, strict=True)]
    up = kinds("", config, "up_block_types", UP_BLOCKS)
    taken = [not (kind.attention and lonely) for kind, lonely in zip(up, alone, strict=True)]
    return taken == [down[-1].attention is None, *[True] * (len(levels) - 1)]
