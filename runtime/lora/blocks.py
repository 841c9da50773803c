"""Weights of an adapter by blocks of a UNet, as diffusers' `set_adapters` takes them."""

from collections.abc import Mapping
from typing import Any

from anamorph.errors import InputError
from anamorph.lora.factors import Layers

WAYS = ("down", "up")
MIDDLE = "mid_block.attentions.0"


def by_blocks(scales: Mapping[str, Any], layers: Layers) -> dict[str, float]:
    """{"down": s, "mid": s, "up": {"block_1": [s, s, s]}} as parts of layers' names -> s; what is left out is 1.

    A number counts for all transformers of a way or block, a list has one for each.
    Raises InputError: a way or block is unknown or has no transformers, or a list has another length.
    """
    if strange := [name for name in scales if name not in (*WAYS, "mid")]:
        raise InputError(f"weights of blocks name {strange[0]!r}, expected down, mid and up")
    found = {MIDDLE: _single(scales.get("mid", 1.0), "mid")}
    for way in WAYS:
        blocks = _blocks(way, layers)
        given = scales.get(way, 1.0)
        wanted = given if isinstance(given, Mapping) else {f"block_{block}": given for block in blocks}
        if strange := [name for name in wanted if name not in {f"block_{block}" for block in blocks}]:
            known = ", ".join(f"block_{block}" for block in blocks)
            raise InputError(f"weights name {way}.{strange[0]}, which has no transformers; expected {known or 'none'}")
        for block in blocks:
            count = len(blocks[block])
            values = _list(wanted.get(f"block_{block}", 1.0), count, f"{way}.block_{block}")
            found |= {f"{way}_blocks.{block}.attentions.{index}.": value for index, value in enumerate(values)}
    return {place: value for place, value in found.items() if value != 1.0}


def _blocks(way: str, layers: Layers) -> dict[int, set[int]]:
    """Block with transformers -> their numbers."""
    found: dict[int, set[int]] = {}
    for layer in layers:
        steps = layer.split(".")
        if steps[0] == f"{way}_blocks" and steps[2] == "attentions":
            found.setdefault(int(steps[1]), set()).add(int(steps[3]))
    return found


def _list(value: Any, count: int, where: str) -> list[float]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) not in (1, count):
        raise InputError(f"there are {len(values)} weights for the {count} transformers of {where}; give as many")
    return [_single(one, where) for one in (values if len(values) == count else values * count)]


def _single(value: Any, where: str) -> float:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"the weight of {where} is {value!r}, expected a number")
    return float(value)
