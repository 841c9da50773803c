"""Seeded Gaussian noise, the same numbers as PyTorch's CPU generator gives, without PyTorch."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError

VECTOR = 16
"""From this many numbers on, PyTorch fills whole vectors; below, it draws number by number in double precision."""


class Stream:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`, drawn from by `torch.randn`.

    Uniform numbers come from the 32-bit Mersenne twister MT19937 (Matsumoto & Nishimura 1998), seeded with the
    seed's low 32 bits; normal ones from pairs of them by r = sqrt(-2 ln u), r cos(2 pi v), r sin(2 pi v)
    (Box & Muller 1958). Equal to PyTorch to about 5e-7.

    Raises InputError: the seed is outside 0 .. 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise InputError(f"seed {seed} is no whole number from 0 to 2**64 - 1")
        self._twister = np.random.MT19937()
        self._twister._legacy_seeding(seed & 0xFFFFFFFF)
        self._second: float | None = None

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next prod(shape) numbers of N(0, 1), float32."""
        count = math.prod(shape)
        values = self._vectors(count) if count >= VECTOR else self._scalars(count)
        return values.reshape(shape)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        bits = self._twister.random_raw(count).astype(np.uint32) & np.uint32((1 << 24) - 1)
        return bits.astype(np.float32) / np.float32(1 << 24)

    def _vectors(self, count: int) -> NDArray[np.float32]:
        """Eight cosines, then their eight sines, from sixteen uniform numbers; the last vector is drawn anew."""
        values = self._uniform(count)
        whole = count - count % VECTOR
        values[:whole] = _box_muller(values[:whole])
        if whole < count:
            values[count - VECTOR :] = _box_muller(self._uniform(VECTOR))
        return values

    def _scalars(self, count: int) -> NDArray[np.float32]:
        values = np.empty(count, np.float32)
        for index in range(count):
            if self._second is not None:
                values[index], self._second = self._second, None
                continue
            u, v = (int(high) << 32 | int(low) for high, low in self._twister.random_raw(4).reshape(2, 2))
            radius = math.sqrt(-2 * math.log1p(-(v % 2**53) / 2**53))
            angle = 2 * math.pi * (u % 2**53) / 2**53
            values[index], self._second = radius * math.cos(angle), radius * math.sin(angle)
        return values


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = uniform.reshape(-1, VECTOR)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - rows[:, :8]))
    angle = np.float32(2 * np.pi) * rows[:, 8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class NoiseSource(Protocol):
    """Where a generation gets its random numbers from, in the order in which it asks."""

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """N(0, 1) for every picture: `shape` is one picture's, the result is [N, *shape]."""


class SeededNoise:
    """One stream per picture, so that a picture does not depend on its batch-mates."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [Stream(seed) for seed in seeds]

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.stack([stream.normal(shape) for stream in self._streams])


class TorchNoise:
    """PyTorch generators, drawn from as diffusers does: one for the whole batch, or a list of one per picture.

    Raises InputError: something else than generators, or another number of them than pictures.
    """

    def __init__(self, generator: Any, images: int) -> None:
        import torch

        self._generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        self._images = images
        if not all(isinstance(one, torch.Generator) for one in self._generators):
            raise InputError("generator is neither a torch.Generator nor a list of them; for a number use seed=")
        if isinstance(generator, list | tuple) and len(self._generators) != images:
            raise InputError(f"there are {len(self._generators)} generators for {images} pictures; give one per picture")

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        import torch

        each = self._images // len(self._generators)
        draws = [torch.randn((each, *shape), generator=one, device=one.device).cpu() for one in self._generators]
        return torch.cat(draws).numpy()
