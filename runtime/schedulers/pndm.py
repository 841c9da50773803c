"""PNDM: linear multistep on the network's output, with or without a Runge-Kutta warm-up."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.base import CURVES, NOISE, SPACINGS
from anamorph.schedulers.ddim import TrainingLevels
from anamorph.schedulers.grids import I64, Grid, variance_preserving
from anamorph.schedulers.registry import register
from anamorph.schedulers.table import Row, Table

ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
"""Adams-Bashforth weights of the newest and earlier outputs, by their number."""

WARM_UP = 12
"""Calls of the Runge-Kutta warm-up: three steps of four."""


@register
class PNDMScheduler(TrainingLevels):
    """Pseudo numerical methods on manifolds (Liu et al. 2022, arXiv:2202.09778, eq. 11 to 13).

    With m the combined output, read as noise eps, every step is DDIM's transfer from timestep t to t':
    x' = (alpha' / alpha) x + (sigma' - sigma alpha' / alpha) eps. `skip_prk_steps=True` starts with an Euler step
    that its second call corrects (PLMS); False starts with three Runge-Kutta steps of four calls each.
    Image-to-image starts the multistep afresh on the timesteps that are left, exactly as diffusers does.
    """

    DEFAULTS: ClassVar = {
        **NOISE,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    ONLY: ClassVar = {
        "beta_schedule": CURVES,
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": SPACINGS,
    }

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """One entry per call: the second timestep twice (PLMS), or twelve warm-up calls and the rest."""
        del timesteps, sigmas  # refused before
        assert steps is not None
        base = self.indices(steps)
        if self.config["skip_prk_steps"]:
            calls = np.concatenate([base[:1], base[1:2], base[1:]])
        else:
            calls = np.concatenate([_warm_up(base, len(self) // steps), base[3:]])
        return variance_preserving(calls, calls, self.alphas_cumprod, 1.0, steps)

    def solve(self, grid: Grid, eta: float) -> Table:
        """Rows in terms of the raw output: p = 0, q = 1."""
        del eta  # refused before
        if self.config["skip_prk_steps"]:
            rows = self._multistep(grid, 0)
        else:
            expected = WARM_UP + grid.steps - 3
            if len(grid.timesteps) < expected:
                raise InputError(
                    "PNDMScheduler cannot begin inside its Runge-Kutta warm-up; for image-to-image set "
                    "skip_prk_steps=True in its configuration"
                )
            rows = self._runge_kutta(grid) + self._multistep(grid, WARM_UP)
        return Table(tuple(rows), grid.timesteps, estimates_clean=False)

    def _move(self, start: int, end: int) -> tuple[float, float]:
        """A, M of x' = A x + M m between two timesteps; a negative end is the final level."""
        final = 1.0 if self.config["set_alpha_to_one"] else float(self.alphas_cumprod[0])
        here, there = float(self.alphas_cumprod[start]), float(self.alphas_cumprod[end]) if end >= 0 else final
        alpha, sigma, alpha_next, sigma_next = here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5
        a, m = alpha_next / alpha, sigma_next - sigma * alpha_next / alpha
        if self.config["prediction_type"] == "v_prediction":
            return a + m * sigma, m * alpha
        return a, m

    def _row(self, grid: Grid, n: int, a: float, b: tuple[float, ...], keep: tuple[int, ...]) -> Row:
        last = n == len(grid.timesteps) - 1
        return Row(
            int(grid.timesteps[n]), float(grid.alpha[n]), float(grid.sigma[n]), 0.0, 1.0, a, b,
            keep=() if last else keep,
        )  # fmt: skip

    def _multistep(self, grid: Grid, begin: int) -> list[Row]:
        ratio = len(self) // grid.steps
        rows, outputs = [], 3 if begin else 0  # outputs that the history holds
        for n in range(begin, len(grid.timesteps)):
            t = int(grid.timesteps[n])
            if n == 1:  # the first step once more, from its own sample, with the mean of both outputs
                a, m = self._move(t + ratio, t)
                rows.append(self._row(grid, n, 0.0, (m / 2, m / 2, a), (2,)))
                continue
            a, m = self._move(t, t - ratio)
            weights = ADAMS[outputs + 1]
            outputs = min(outputs + 1, 3)
            keep = (0, 1) if n == 0 else (0, 2, 3)[:outputs]
            rows.append(self._row(grid, n, a, tuple(m * weight for weight in weights), keep))
        return rows

    def _runge_kutta(self, grid: Grid) -> list[Row]:
        half = len(self) // grid.steps // 2
        rows: list[Row] = []
        for n in range(WARM_UP):
            stage, start = n % 4, int(grid.timesteps[n // 4 * 4])
            a, m = self._move(start, int(grid.timesteps[n]) - (0 if n % 2 else half))
            older = (0.0,) * (n // 4)  # first outputs of earlier steps, kept for the multistep that follows
            rest = range(len(older))
            # The history of stage s: outputs s-1 .. 0 of this step, the sample it started from, the older outputs.
            if stage == 0:
                rows.append(self._row(grid, n, a, (m, *older), (0, 1, *(2 + i for i in rest))))
            elif stage < 3:
                unused, keep = (0.0,) * stage, (0, *range(2, 3 + stage + len(older)))
                rows.append(self._row(grid, n, 0.0, (m, *unused, a, *older), keep))
            else:
                weights = (m / 6, m / 3, m / 3, m / 6)
                rows.append(self._row(grid, n, 0.0, (*weights, a, *older), (4, *(6 + i for i in rest))))
        return rows


def _warm_up(base: I64, ratio: int) -> I64:
    """Timesteps of the twelve Runge-Kutta calls: t, t/2, t/2, t' for each of the first three steps."""
    if len(base) < 4:
        raise InputError(
            f"PNDMScheduler with Runge-Kutta warm-up needs 4 steps or more, got {len(base)}; "
            f"ask for more, or set skip_prk_steps=True in its configuration"
        )
    calls = [(base[i], base[i + 1] + ratio // 2, base[i + 1] + ratio // 2, base[i + 1]) for i in range(3)]
    return np.array(calls, np.int64).ravel()
