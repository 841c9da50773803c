"""Gaussian noise: seeded without PyTorch, equal to its CPU generator, or drawn from the caller's generators.

A seed names one stream of numbers on every engine, so that seed 0 is the same picture everywhere.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError

F32 = NDArray[np.float32]
BLOCK = 16
"""PyTorch transforms noise in blocks of this size; draws of fewer numbers go one pair at a time."""


class NoiseSource(Protocol):
    """Where a generation takes its noise from."""

    @property
    def separate(self) -> bool:
        """Whether each image has a stream of its own."""

    def normal(self, shape: tuple[int, ...], first: int | None = None) -> F32:
        """Draw the next noise of all N images, or of the `first` ones alone, which leaves the others where they are.

        `shape` is that of one image, the result is [N or first, *shape].
        """


class Stream:
    """The normal numbers of `torch.Generator("cpu").manual_seed(seed)`, within 1e-6, in the same order.

    Uniform numbers come from MT19937 (Matsumoto & Nishimura 1998), seeded with the low 32 bits of `seed`; pairs of
    them become pairs of normal numbers (Box & Muller 1958):

        r = sqrt(-2 ln(1 - u)),  theta = 2 pi v,  z = r cos(theta),  z' = r sin(theta)

    From 16 numbers on, a block of 16 floats with 24 random bits each gives 8 times (u, v) = (block[i], block[i + 8]),
    and z, z' take their places; if the size is no multiple of 16, the last 16 numbers are drawn anew as one block.
    Fewer than 16 numbers are drawn pair by pair in double precision with 53 random bits (v first, then u); an
    unused z' is kept for the next such draw.

    Raises InputError: `seed` is no whole number from 0 to 2**64 - 1 (torch takes a negative one modulo 2**64).
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise InputError(f"seed {seed!r} is no whole number from 0 to 2**64 - 1")
        # RandomState's streams are frozen for good, unlike those of NumPy's newer generators.
        self._twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._kept: float | None = None

    def normal(self, shape: Sequence[int]) -> F32:
        """The next normal numbers, mean 0 and variance 1, in an array of `shape`."""
        size = math.prod(shape)
        values = self._blocks(size) if size >= BLOCK else self._singles(size)
        return values.reshape(tuple(shape))

    def _bits(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 1 << 32, count, np.uint32)

    def _blocks(self, size: int) -> F32:
        values = _box_muller(self._bits(size))
        if size % BLOCK:
            values[-BLOCK:] = _box_muller(self._bits(BLOCK))
        return values

    def _singles(self, size: int) -> F32:
        values = np.empty(size, np.float32)
        for index in range(size):
            if self._kept is not None:
                values[index], self._kept = self._kept, None
            else:
                values[index], self._kept = self._pair()
        return values

    def _pair(self) -> tuple[float, float]:
        high, low, high2, low2 = (int(bits) for bits in self._bits(4))
        v = ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53
        u = ((high2 << 32 | low2) & ((1 << 53) - 1)) * 2.0**-53
        r, theta = math.sqrt(-2 * math.log1p(-u)), 2 * math.pi * v
        return r * math.cos(theta), r * math.sin(theta)


def _box_muller(bits: NDArray[np.uint32]) -> F32:
    """Whole blocks of 32-bit numbers to normal numbers; a rest smaller than a block is left undefined."""
    values = (bits & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2**-24)
    blocks = values[: len(values) // BLOCK * BLOCK].reshape(-1, 2, BLOCK // 2)
    r = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    theta = np.float32(2 * math.pi) * blocks[:, 1]
    blocks[:, 0], blocks[:, 1] = r * np.cos(theta), r * np.sin(theta)
    return values


class SeededNoise:
    """One stream per image, so that an image does not depend on those that share its batch.

    Raises InputError: there are no seeds, or a seed is out of range.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if not len(seeds):
            raise InputError("there are no seeds, expected one for each image")
        self._streams = tuple(Stream(seed) for seed in seeds)

    @property
    def separate(self) -> bool:
        return True

    def normal(self, shape: tuple[int, ...], first: int | None = None) -> F32:
        """Draw [len(seeds) or first, *shape]."""
        return np.stack([stream.normal(shape) for stream in self._streams[:first]])


class TorchNoise:
    """Noise for `n` images from the caller's `torch.Generator`, or from a sequence of one per image.

    One generator draws the batch at once, several draw an image each, as diffusers does; each draws on its own
    device.

    Raises InputError: something else than a generator, or another number of them than `n`.
    """

    def __init__(self, generator: Any, n: int) -> None:
        self._single = not isinstance(generator, list | tuple)
        self._generators: tuple[Any, ...] = (generator,) if self._single else tuple(generator)
        self._n = n
        # Such objects can exist only where their maker has imported PyTorch.
        torch = sys.modules.get("torch")
        for item in self._generators:
            if torch is None or not isinstance(item, torch.Generator):
                raise InputError(
                    f"generator is a {type(item).__name__}, expected torch.Generator(s); for a number use seed="
                )
        if not self._single and len(self._generators) != n:
            raise InputError(f"there are {len(self._generators)} generators for {n} pictures; give one per picture")

    @property
    def separate(self) -> bool:
        return not self._single

    def normal(self, shape: tuple[int, ...], first: int | None = None) -> F32:
        """Draw [n or first, *shape]."""
        if self._single:
            return _torch_normal(self._generators[0], (self._n if first is None else first, *shape))
        return np.concatenate([_torch_normal(item, (1, *shape)) for item in self._generators[:first]])


def _torch_normal(generator: Any, shape: tuple[int, ...]) -> F32:
    import torch

    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    values: F32 = drawn.cpu().numpy()
    return values
