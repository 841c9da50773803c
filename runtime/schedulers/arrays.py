"""The few operations in which NumPy arrays and torch tensors differ. A tensor exists only where torch is loaded."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from anamorph.errors import InputError

Array = Any
"""A NumPy array or a torch tensor."""


def is_tensor(value: Array) -> bool:
    """Whether `value` is a torch tensor; told by a method, which is the quickest way and imports nothing."""
    return hasattr(value, "new_tensor")


def coefficients(values: Sequence[float], like: Array) -> Array:
    """One number per image, shaped (batch, 1, 1, ...) to multiply `like`, of its type and on its device."""
    column = like.new_tensor(list(values)) if is_tensor(like) else np.asarray(values, like.dtype)
    return spread(column, like)


def spread(column: Array, like: Array) -> Array:
    """Reshape (batch,) to (batch, 1, 1, ...) of the rank of `like`."""
    return column.reshape((-1,) + (1,) * (like.ndim - 1))


def per_image_quantile(values: Array, ratio: float) -> Array:
    """The `ratio` quantile of each image, linear between order statistics; shape (batch,), type of `values`."""
    flat = widen(values).reshape(values.shape[0], -1)
    if is_tensor(values):
        return flat.quantile(ratio, dim=1).to(values.dtype)
    return np.asarray(np.quantile(flat, ratio, axis=1), values.dtype)


def widen(value: Array) -> Array:
    """Half precision as float32; wider types as they are."""
    if value.dtype.itemsize >= 4:
        return value
    return value.float() if is_tensor(value) else value.astype(np.float32)


def cast(value: Array, like: Array) -> Array:
    """`value` in the type of `like`."""
    if value.dtype == like.dtype:
        return value
    return value.to(like.dtype) if is_tensor(value) else value.astype(like.dtype)


def weighted_sum(weights: Sequence[float], values: Sequence[Array]) -> Array:
    """sum_i w_i v_i in an array of its own; what has no weight is left out, and may be None."""
    return combined([term for term in enumerate(weights) if term[1]], values)


def combined(terms: Sequence[tuple[int, float]], values: Sequence[Array]) -> Array:
    """The sum of weight values[place] over terms (place, weight), in an array of its own.

    Tensors take one pass over memory per term, in place once there is one of its own.
    """
    if not is_tensor(values[0]):
        parts = [weight * values[place] for place, weight in terms]
        return sum(parts[1:], parts[0]) if parts else 0.0 * values[0]
    result: Array = None
    fresh = False
    for place, weight in terms:
        if fresh:
            result.add_(values[place], alpha=weight)
        elif result is None:
            result, fresh = (values[place], False) if weight == 1.0 else (values[place].mul(weight), True)
        else:
            result, fresh = result.add(values[place], alpha=weight), True
    if result is None:
        return values[0].mul(0.0)
    return result if fresh else result.clone()


def numbers(values: Any) -> list[float]:
    """Timesteps of any kind (a number, a list, an array, a tensor of any device) as a flat list of floats."""
    flat = values.detach().cpu().numpy() if is_tensor(values) else values
    return [float(value) for value in np.asarray(flat).ravel()]


def draw(like: Array, generator: Any) -> Array:
    """Standard normal noise of shape, type and device of `like`.

    `generator` is a torch.Generator (or a list, one per image) for tensors, a numpy.random.Generator for arrays,
    or None for fresh noise. A torch generator of the CPU serves tensors of every device, as in diffusers.
    Raises InputError: the generator is of the other library, or the list does not fit the batch.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != like.shape[0]:
            raise InputError(f"got {len(generator)} generators for a batch of {like.shape[0]}; pass one per image")
        parts = [draw(like[i : i + 1], one) for i, one in enumerate(generator)]
        return sys.modules["torch"].cat(parts) if is_tensor(like) else np.concatenate(parts)
    if not is_tensor(like):
        if generator is not None and not isinstance(generator, np.random.Generator):
            raise InputError(f"a NumPy sample needs a numpy.random.Generator, got {type(generator).__name__}")
        source = np.random.default_rng() if generator is None else generator
        wide = np.float64 if like.dtype == np.float64 else np.float32
        return np.asarray(source.standard_normal(like.shape, wide), like.dtype)
    torch = sys.modules["torch"]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"a tensor needs a torch.Generator, got {type(generator).__name__}")
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
