"""Pictures as prompts in a call: what the denoiser is told of them (IP-Adapter, arXiv:2308.06721)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.conditions import IMAGE_BIAS, IMAGE_KEYS, IMAGE_MASKS, IMAGE_VALUES
from anamorph.interface import Port, size_of
from anamorph.ip_adapter import Adapter
from anamorph.native import attentions
from anamorph.pipelines.image_scales import Share
from anamorph.pipelines.pictures import bicubic

F32 = NDArray[np.float32]
FILLED = -10000.0
"""What is added to the scores of tokens that only fill a group up."""


@dataclass
class Adapters:
    """The IP-Adapters of a denoiser, and the scale of each for every transformer."""

    loaded: tuple[Adapter, ...] = ()
    scales: tuple[tuple[Share, ...], ...] = ()


@dataclass(frozen=True)
class Looks:
    """The pictures of one call, for each adapter.

    `pixels` [n, C, s, s] are to be encoded, `embeds` [1 or 2, n, ...] are, those of the negative branch first. `masks`
    [n, H, W] say where they count, None: everywhere.
    """

    pixels: tuple[F32, ...] = ()
    embeds: tuple[F32, ...] = ()
    masks: tuple[F32 | None, ...] = ()
    scales: tuple[tuple[Share, ...], ...] = ()


@dataclass(frozen=True)
class Group:
    """Tokens that share a softmax: keys and values of one branch [T, sum of widths], and where they count [H, W]."""

    keys: F32
    values: F32
    mask: F32 | None = None


def groups_of(
    adapter: Adapter, embeds: F32, scale: Sequence[Share], mask: F32 | None, config: Mapping[str, Any]
) -> list[Group]:
    """What one adapter makes of pictures [n, ...]: a group for all of them, or for each where they are masked."""
    keys, values = adapter.seen(embeds)
    if mask is None:
        whole = _weighted(values.reshape(-1, values.shape[-1]), scale, config)
        return [Group(keys.reshape(-1, keys.shape[-1]), whole)]
    apart = [[one if isinstance(one, float) else one[index] for one in scale] for index in range(len(mask))]
    return [Group(keys[index], _weighted(values[index], own, config), mask[index]) for index, own in enumerate(apart)]


def _weighted(values: F32, scale: Sequence[Share], config: Mapping[str, Any]) -> F32:
    """Values times the scale of their transformer."""
    widths = [place.width * place.depth for place in attentions(config)]
    return values * np.repeat(np.asarray(scale, np.float32), widths)


def inputs_of(
    branches: Sequence[Sequence[Group]], images: int, ports: Sequence[Port], sides: Mapping[str, int]
) -> dict[str, F32]:
    """The denoiser's inputs [branches * N, ...] from the groups of each branch; empty where none counts."""
    counts = [any(group.values.any() for group in same) for same in zip(*branches, strict=True)]
    kept = [[group for group, counted in zip(branch, counts, strict=True) if counted] for branch in branches]
    if not any(counts):
        return {}
    longest = max(len(group.keys) for group in kept[0])

    def stacked(parts: Sequence[Sequence[F32]]) -> F32:
        return np.repeat(np.stack([np.stack(branch) for branch in parts]), images, axis=0)

    def filled(array: F32, value: float = 0.0) -> F32:
        missing = [(0, longest - len(array)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(array, missing, constant_values=value)

    made = {
        IMAGE_KEYS: stacked([[filled(group.keys) for group in branch] for branch in kept]),
        IMAGE_VALUES: stacked([[filled(group.values) for group in branch] for branch in kept]),
    }
    if any(len(group.keys) != longest for group in kept[0]):
        lengths = [[np.zeros(len(group.keys), np.float32) for group in branch] for branch in kept]
        made[IMAGE_BIAS] = stacked([[filled(one, FILLED) for one in branch] for branch in lengths])
    if any(group.mask is not None for group in kept[0]):
        for port in ports:
            if port.name.startswith(f"{IMAGE_MASKS}."):
                height, width = (size_of(axis, sides) for axis in port.axes[-2:])
                taken = [[_taken(group.mask, height, width) for group in branch] for branch in kept]
                made[port.name] = stacked(taken)
    return made


def _taken(mask: F32 | None, height: int, width: int) -> F32:
    """A mask less 1 at the size of one level; zeros where there is none."""
    return np.zeros((height, width), np.float32) if mask is None else small_mask(mask, height, width) - 1


def small_mask(mask: F32, height: int, width: int) -> F32:
    """A mask [H, W] for height x width pixels of a level, as diffusers' `IPAdapterMaskProcessor.downsample` has it.

    A mask of other proportions keeps them, and is filled up with zeros, or cut, line by line.
    """
    pixels, ratio = height * width, mask.shape[1] / mask.shape[0]
    rows = int(math.sqrt(pixels / ratio))
    rows += rows == 0 or pixels % rows != 0
    columns = pixels // rows
    flat = bicubic(mask[None], (rows, columns)).reshape(-1)
    if rows * columns != pixels:
        warnings.warn(
            f"a mask of {mask.shape[0]}x{mask.shape[1]} pixels does not have the proportions of the picture; make one "
            "that has",
            stacklevel=2,
        )
        flat = np.pad(flat[:pixels], (0, max(0, pixels - len(flat))))
    return flat.reshape(height, width)
