"""Guidance and the rows of a scheduler's table as weights of the sums in `anamorph.stepping`."""

import itertools

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError
from anamorph.schedulers import Table
from anamorph.stepping import HELD, SCOPE


def check_table(table: Table) -> None:
    """Raise InputError where a table has rows that are no sums, or remember more than a graph does."""
    if table.clip is not None:
        raise InputError(f"this scheduler clamps its estimates, which {SCOPE} cannot; open the model without it")
    if table.variance is not None:
        raise InputError(f"this scheduler takes variances from the model, which {SCOPE} cannot; open it without")
    most = max(len(row.keep) for row in table.rows)
    if most > HELD:
        raise InputError(f"this scheduler remembers {most} states, {SCOPE} {HELD}; open the model without it")


def step_weights(table: Table, n: int) -> NDArray[np.float32]:
    """W of row n, [1 + K, 3 + K]: the rule of `schedulers.Row`, followed for weights instead of arrays."""
    row, unit = table.rows[n], np.eye(3 + HELD)
    x, out, noise = unit[:3]
    history = unit[3 : 2 + len(row.b)]
    x = x + row.churn * noise
    estimate = row.p * x + row.q * out
    if row.fix:
        x = _sum(row.fix, (x, estimate, *history))
    following = _sum((row.a, row.b[0], row.e, row.c, *row.b[1:]), (x, estimate, out, noise, *history))
    pool = (estimate, x, *history, noise)
    kept = [pool[position] for position in row.keep]
    return np.stack([following, *kept, *[0 * noise] * (HELD - len(kept))]).astype(np.float32)


def _sum(weights: tuple[float, ...], terms: tuple[NDArray[np.float64], ...]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum([weight * term for weight, term in zip(weights, terms, strict=True)], axis=0)
    return total


def guidance_weights(scales: tuple[float, ...]) -> NDArray[np.float32]:
    """g of o = o_0 + sum_k scales_k (o_k+1 - o_k), [branches, 1]."""
    steps = (1.0, *scales, 0.0)
    return np.array([[here - after] for here, after in itertools.pairwise(steps)], np.float32)
