"""How strongly pictures count as prompts: one number, or one for each block of the denoiser."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from anamorph.errors import InputError
from anamorph.native import Looking, attentions

Share = float | tuple[float, ...]
"""A scale, or one for each masked picture of an adapter."""


def shares(scale: Any, config: Mapping[str, Any], default: float = 0.0) -> tuple[Share, ...]:
    """The scale of each transformer, in the order of `native.attentions`.

    `scale` is a number (or one per masked picture), or as diffusers has it a mapping of "down", "mid" and "up" to
    numbers or to mappings of "block_0" ... to a number or one per transformer; blocks that it leaves out get `default`.
    Raises InputError: it is something else, or names a block that has no attentions to the text.
    """
    places = attentions(config)
    if not isinstance(scale, Mapping):
        return (_share(scale, "the scale"),) * len(places)
    ways: dict[str, dict[str, list[Looking]]] = {}
    for place in places:
        way, block = _parts(place.name)
        ways.setdefault(way, {}).setdefault(block, []).append(place)
    if strange := [way for way in scale if way not in ways]:
        raise InputError(f"scales name {strange[0]!r}, expected {', '.join(ways)}, which have attentions to the text")
    found: dict[str, Share] = {}
    for way, given in scale.items():
        blocks = ways[way]
        named = given if isinstance(given, Mapping) else dict.fromkeys(blocks, given)
        if strange := [block for block in named if block not in blocks]:
            raise InputError(f"scales name {way} {strange[0]!r}, expected {', '.join(blocks)}")
        for block, value in named.items():
            each = _each(value, len(blocks[block]), f"{way} {block}")
            found |= {place.name: one for place, one in zip(blocks[block], each, strict=True)}
    return tuple(found.get(place.name, default) for place in places)


def _parts(name: str) -> tuple[str, str]:
    """down_blocks.1.attentions.0 -> down, block_1; the middle is a block of its own."""
    way, number, *_ = name.split(".")
    return way.removesuffix("_blocks").removesuffix("_block"), f"block_{number}"


def _each(value: Any, count: int, where: str) -> list[Share]:
    if not isinstance(value, list | tuple):
        return [_share(value, where)] * count
    values = list(value) * count if len(value) == 1 else list(value)
    if len(values) != count:
        raise InputError(f"there are {len(values)} scales for {where}, which has {count} transformers; give as many")
    return [_share(one, where) for one in values]


def _share(value: Any, where: str) -> Share:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return tuple(_number(one, where) for one in value)
    return _number(value, where)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} is {value!r}, expected a finite number")
    return float(value)
