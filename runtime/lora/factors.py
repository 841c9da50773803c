"""Low-rank changes of weights: W + s up down (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError

Floats = NDArray[np.floating[Any]]
Layers = Mapping[str, tuple[int, ...]]
"""Name of a layer (its weight's in the checkpoint, without ".weight") -> shape of its weight."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The change `scale` up down of a weight [out, in, ...]: down [r, in, ...] and up [out, r]."""

    down: Floats
    up: Floats
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def times(self, weight: float) -> "Factors":
        """The same change, `weight` times as large."""
        return replace(self, scale=self.scale * weight)


Change = Mapping[str, Factors]
"""Layer -> what is added to its weight."""


def lora(down: Floats, up: Floats, mid: Floats | None, scale: float, shape: tuple[int, ...]) -> Factors:
    """Factors for a weight of `shape` from those of LoRA, or of LoCon, where a core `mid` [r, r, ...] lies between.

    Raises InputError: their shapes do not make this weight's.
    """
    if mid is not None:  # mid (down x): taps are in the core, and down is a matrix
        down = np.einsum("rp...,pi->ri...", mid, down.reshape(len(down), -1))
    rank = len(down)
    if up.ndim < 2 or down.size != rank * prod(shape[1:]) or up.shape[:2] != (shape[0], rank) or up[0, 0].size != 1:
        raise InputError(f"factors {list(down.shape)} and {list(up.shape)} do not make a weight {list(shape)}")
    return Factors(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank), scale)


def loha(pairs: Sequence[tuple[Floats, Floats]], scale: float, shape: tuple[int, ...]) -> Factors:
    """LoHa's (u_1 d_1) * (u_2 d_2), multiplied by elements, as factors of rank r_1 r_2: exact, by rows and columns.

    Each pair is up [out, r] and down [r, in ...]. Source: Hyeon-Woo et al. 2021 (arXiv:2108.06098), proposition 1.
    Raises InputError: their shapes do not make this weight's.
    """
    (up_1, down_1), (up_2, down_2) = ((lora(d, u, None, 1.0, shape).up, d.reshape(len(d), -1)) for u, d in pairs)
    down = np.einsum("pi,qi->pqi", down_1, down_2)
    up = np.einsum("op,oq->opq", up_1, up_2)
    return Factors(down.reshape(-1, *shape[1:]), up.reshape(shape[0], -1), scale)


def joined(every: Sequence[Factors]) -> Factors:
    """The sum of several changes of one weight, in float32 with a scale of 1: side by side along the rank."""
    downs = [one.down.astype(np.float32, copy=False) for one in every]
    ups = [np.float32(one.scale) * one.up.astype(np.float32, copy=False) for one in every]
    return Factors(np.concatenate(downs), np.concatenate(ups, axis=1)) if len(every) > 1 else Factors(downs[0], ups[0])


def summed(changes: Sequence[Change]) -> dict[str, Factors]:
    """Several changes at once."""
    layers = {layer: None for change in changes for layer in change}
    return {layer: joined([change[layer] for change in changes if layer in change]) for layer in layers}


def added(weight: Floats, factors: Factors) -> NDArray[np.float32]:
    """W + s up down in float32, [out, in, ...]."""
    one = joined([factors])
    change = (one.up @ one.down.reshape(one.rank, -1)).reshape(weight.shape)
    return weight.astype(np.float32) + change.astype(np.float32, copy=False)


def padded(factors: Factors, rank: int) -> Factors:
    """The same change at a larger rank, filled up with zeros."""
    more = rank - factors.rank
    sides = [(0, more), *[(0, 0)] * (factors.down.ndim - 1)]
    return replace(factors, down=np.pad(factors.down, sides), up=np.pad(factors.up, [(0, 0), (0, more)]))


def nothing(shape: tuple[int, ...]) -> Factors:
    """Factors of rank 1 that change nothing."""
    return Factors(np.zeros((1, *shape[1:]), np.float32), np.zeros((shape[0], 1), np.float32))
