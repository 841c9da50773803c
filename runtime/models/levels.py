"""The levels of a UNet and the kinds of its blocks, read from its configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anamorph.config import Config
from anamorph.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """What a block consists of.

    `family` "plain": residual blocks and, behind each, the attention named: "transformer" (to the text, blocks of
    a transformer), "added" (to text and pixels at once) or "pixels". "skip": the same with a picture that is carried
    along beside the states. "k": k-diffusion's blocks. `resample` "conv" or "resnet": what changes the resolution.
    """

    attention: str | None = None
    resample: str = "conv"
    family: str = "plain"

    @property
    def cross(self) -> bool:
        """Whether its attention looks at the text."""
        return self.attention in ("transformer", "added", "k")


DOWN_BLOCKS: Mapping[str, Kind] = MappingProxyType(
    {
        "DownBlock2D": Kind(),
        "CrossAttnDownBlock2D": Kind("transformer"),
        "AttnDownBlock2D": Kind("pixels"),
        "ResnetDownsampleBlock2D": Kind(None, "resnet"),
        "SimpleCrossAttnDownBlock2D": Kind("added", "resnet"),
        "KDownBlock2D": Kind(family="k"),
        "KCrossAttnDownBlock2D": Kind("k", family="k"),
    }
)
"""Blocks of the way down of a UNet that looks at a text."""

UP_BLOCKS: Mapping[str, Kind] = MappingProxyType(
    {
        "UpBlock2D": Kind(),
        "CrossAttnUpBlock2D": Kind("transformer"),
        "AttnUpBlock2D": Kind("pixels"),
        "ResnetUpsampleBlock2D": Kind(None, "resnet"),
        "SimpleCrossAttnUpBlock2D": Kind("added", "resnet"),
        "KUpBlock2D": Kind(family="k"),
        "KCrossAttnUpBlock2D": Kind("k", family="k"),
    }
)
"""Blocks of the way up of a UNet that looks at a text."""

MID_BLOCKS: Mapping[str | None, Kind | None] = MappingProxyType(
    {
        "UNetMidBlock2DCrossAttn": Kind("transformer"),
        "UNetMidBlock2DSimpleCrossAttn": Kind("added", "resnet"),
        "UNetMidBlock2D": Kind(),
        None: None,
    }
)
"""Blocks of the middle of a UNet that looks at a text."""


@dataclass(frozen=True)
class Level:
    """One resolution of one way: channels, and what stands behind each of its residual blocks.

    `depths`: blocks of each transformer, one per residual block. `heads` is for transformers, `head_width` for the
    other attentions.
    """

    channels: int
    depths: tuple[int, ...]
    heads: int
    head_width: int
    context_width: int
    only_cross: bool


def down_levels(config: Config) -> tuple[Level, ...]:
    """The way down: one level per entry of `block_out_channels`, the highest resolution first."""
    return _levels(config, config.transformer_layers_per_block, 0, reverse=False)


def up_levels(config: Config) -> tuple[Level, ...]:
    """The way up, the lowest resolution first; each level has one residual block more than on the way down.

    `reverse_transformer_layers_per_block` is already in this order. So is `attention_head_dim` as the width of a
    head, which diffusers does not reverse.
    """
    depths = config.reverse_transformer_layers_per_block
    if depths is None:
        depths = _per_level(config, "transformer_layers_per_block")[::-1]
    return _levels(config, depths, 1, reverse=True)


def _levels(config: Config, depths: Any, extra: int, *, reverse: bool) -> tuple[Level, ...]:
    heads = "attention_head_dim" if config.num_attention_heads is None else "num_attention_heads"
    keys = ("block_out_channels", "layers_per_block", heads, "cross_attention_dim", "only_cross_attention")
    columns = [_per_level(config, key)[:: -1 if reverse else 1] for key in keys]
    columns += [_per_level(config, "attention_head_dim"), _spread(depths, config, "transformer_layers_per_block")]
    return tuple(
        Level(channels, _depths(depth, layers + extra), count, width or channels, context, only_cross)
        for channels, layers, count, context, only_cross, width, depth in zip(*columns, strict=True)
    )


def _depths(depth: Any, layers: int) -> tuple[int, ...]:
    values = depth if isinstance(depth, tuple) else (depth,) * layers
    if len(values) != layers:
        raise ConfigError(
            f"transformer_layers_per_block gives {len(values)} depths {values} to a level of {layers} residual blocks, "
            "expected one each; a way up of other depths needs reverse_transformer_layers_per_block"
        )
    return values


def check_levels(class_name: str, config: Config) -> None:
    """Raise ConfigError where a key has too many or too few values, or one that is not served."""
    down = kinds(class_name, config, "down_block_types", DOWN_BLOCKS)
    up = kinds(class_name, config, "up_block_types", UP_BLOCKS)
    if len({kind.family for kind in (*down, *up)}) > 1:
        raise ConfigError(f"{class_name} does not serve blocks of k-diffusion beside others in one UNet")
    for kind, level in (*zip(down, down_levels(config), strict=True), *zip(up, up_levels(config), strict=True)):
        check_level(class_name, kind, level)


def check_level(class_name: str, kind: Kind, level: Level) -> None:
    """Raise ConfigError where a level's numbers are none, or its channels do not divide into its heads."""
    numbers = (level.channels, len(level.depths), *level.depths, level.heads, level.head_width, level.context_width)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ConfigError(f"{class_name} needs positive numbers for each level, got {level}")
    parts = level.heads if kind.attention == "transformer" else level.head_width
    if kind.attention and level.channels % parts:
        name = "heads" if kind.attention == "transformer" else "channels per head"
        raise ConfigError(f"{class_name}: {level.channels} channels do not divide into {parts} {name}")


def kinds(class_name: str, config: Config, key: str, known: Mapping[str, Kind]) -> tuple[Kind, ...]:
    """The kinds of the blocks named under `key`; raises ConfigError where one is not served."""
    names = [str(name).removeprefix("UNetRes") for name in _per_level(config, key)]
    if strange := [name for name in names if name not in known]:
        raise ConfigError(f"{class_name} does not serve {key}={strange[0]!r}; it serves {', '.join(known)}")
    return tuple(known[name] for name in names)


def _per_level(config: Config, key: str) -> tuple[Any, ...]:
    return _spread(config[key], config, key)


def _spread(value: Any, config: Config, key: str) -> tuple[Any, ...]:
    count = len(config.block_out_channels)
    values: Sequence[Any] = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise ConfigError(f"{key} holds {len(values)} values, expected {count} as in block_out_channels")
    return tuple(values)
