"""The levels of a UNet, read from its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anamorph.config import Config
from anamorph.errors import ConfigError

DOWN_BLOCKS: Mapping[str, bool] = MappingProxyType({"DownBlock2D": False, "CrossAttnDownBlock2D": True})
"""Names of the blocks of the way down -> whether they hold transformers."""

UP_BLOCKS: Mapping[str, bool] = MappingProxyType({"UpBlock2D": False, "CrossAttnUpBlock2D": True})
"""Names of the blocks of the way up -> whether they hold transformers."""


@dataclass(frozen=True)
class Level:
    """One resolution: channels, residual blocks on the way down, and what its transformers are like."""

    channels: int
    layers: int
    depth: int
    heads: int
    context_width: int
    only_cross: bool
    linear: bool


def levels(config: Config) -> tuple[Level, ...]:
    """One level per entry of `block_out_channels`, the highest resolution first."""
    heads = "attention_head_dim" if config.num_attention_heads is None else "num_attention_heads"
    keys = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", heads, "cross_attention_dim",
            "only_cross_attention", "use_linear_projection")  # fmt: skip
    columns = (_per_level(config, key) for key in keys)
    return tuple(Level(*row) for row in zip(*columns, strict=True))


def check_levels(class_name: str, config: Config) -> None:
    """Raise ConfigError where a key has too many or too few values, or one that is not served."""
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if strange := [name for name in _per_level(config, key) if name not in known]:
            raise ConfigError(f"{class_name} does not serve {key}={strange[0]!r}; it serves {', '.join(known)}")
    for level in levels(config):
        numbers = (level.channels, level.layers, level.depth, level.heads, level.context_width)
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ConfigError(f"{class_name} needs positive numbers for each level, got {level}")
        if level.channels % level.heads:
            raise ConfigError(f"{class_name}: {level.channels} channels do not divide into {level.heads} heads")


def _per_level(config: Config, key: str) -> tuple[Any, ...]:
    value, count = config[key], len(config.block_out_channels)
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise ConfigError(f"{key} holds {len(values)} values, expected {count} as in block_out_channels")
    return values
