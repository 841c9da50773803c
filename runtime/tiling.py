"""Large pictures through an autoencoder in overlapping tiles, so that memory does not grow with them.

The functions work on NumPy arrays and PyTorch tensors alike and import neither's engine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut: tiles of `size`, one every `step`; their results overlap by `blend` and are cut to `kept`.

    `size` and `step` count what goes in, `blend` and `kept` what comes out (pixels or latents).
    """

    size: int
    step: int
    blend: int
    kept: int


@dataclass(frozen=True)
class Operations:
    """What the tiles need besides arithmetic: arrays joined along an axis, and numbers put where the arrays are."""

    join: Callable[[Sequence[Array], int], Array]
    put: Callable[[NDArray[np.float32]], Array]


OVERLAP = 0.25
"""The part of a tile that it shares with the next."""
NUMPY = Operations(lambda parts, axis: np.concatenate(list(parts), axis), lambda numbers: numbers)


def plans(pixels: int, latents: int, overlap: float) -> tuple[Tiles, Tiles]:
    """How diffusers' AutoencoderKL cuts pictures to encode them and latents to decode them.

    `pixels`, `latents`: sides of one tile; `overlap`: the part of it that it shares with the next, 0..1.
    """
    encode = Tiles(pixels, int(pixels * (1 - overlap)), int(latents * overlap), latents - int(latents * overlap))
    decode = Tiles(latents, int(latents * (1 - overlap)), int(pixels * overlap), pixels - int(pixels * overlap))
    return encode, decode


USUAL_SIDE = 512
"""Pixels along one side where a configuration names no size of its training."""


def autoencoder_tiles(config: Mapping[str, Any]) -> tuple[Tiles, Tiles]:
    """How an autoencoder of that configuration cuts pictures to encode them and latents to decode them."""
    size = config.get("sample_size", USUAL_SIDE)
    pixels = size[0] if isinstance(size, tuple) else size
    levels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return plans(pixels, int(pixels / 2 ** (len(levels) - 1)), OVERLAP)


def tiled(call: Callable[[Array], Array], x: Array, tiles: Tiles, operations: Operations = NUMPY) -> Array:
    """`call` on each tile of x [B, C, h, w]; each result fades in from those above and to the left of it.

    Only one row of results is kept beside what is finished.
    """
    strips: list[Array] = []
    above: list[Array] = []
    for top in range(0, x.shape[2], tiles.step):
        row: list[Array] = []
        for column, left in enumerate(range(0, x.shape[3], tiles.step)):
            result = call(x[:, :, top : top + tiles.size, left : left + tiles.size])
            if above:
                result = _faded(above[column], result, tiles.blend, 2, operations)
            row.append(_faded(row[-1], result, tiles.blend, 3, operations) if row else result)
        strips.append(operations.join([result[:, :, : tiles.kept, : tiles.kept] for result in row], 3))
        above = row
    return operations.join(strips, 2)


def _faded(before: Array, after: Array, blend: int, axis: int, operations: Operations) -> Array:
    """`after`, whose first lines fade in over the last lines of `before`: line y of n is y/n new."""
    lines = min(before.shape[axis], after.shape[axis], blend)
    if lines < 1:
        return after
    head = (slice(None),) * axis
    old = before[*head, before.shape[axis] - lines :]
    new, rest = after[*head, :lines], after[*head, lines:]
    ramp = np.linspace(0, 1, lines, endpoint=False, dtype=np.float32)
    share = operations.put(ramp.reshape((-1, 1) if axis == 2 else (-1,)))
    return operations.join([old * (1 - share) + new * share, rest], axis)


def sparing(
    call: Callable[[Array], Array], x: Array, tiles: Tiles, operations: Operations, *, slicing: bool, tiling: bool
) -> Array:
    """`call` on x [B, C, h, w]: picture by picture with `slicing`, and large ones tile by tile with `tiling`."""

    def one(part: Array) -> Array:
        large = tiling and max(part.shape[2:]) > tiles.size
        return tiled(call, part, tiles, operations) if large else call(part)

    if not slicing or x.shape[0] < 2:
        return one(x)
    return operations.join([one(x[index : index + 1]) for index in range(x.shape[0])], 0)
