"""PNDM and IPNDM: linear multistep on the network's output, with or without a Runge-Kutta warm-up."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.configuration import LEADING, NO_SAMPLE, NOISE
from anamorph.schedulers.grids import I64, Grid, Request, variance_preserving
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Terms, to_clean, to_noise
from anamorph.schedulers.table import Table
from anamorph.schedulers.training import TrainingLevels

ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
"""Adams-Bashforth weights of the newest and earlier outputs, by their number."""

WARM_UP = 12
"""Calls of the Runge-Kutta warm-up: three steps of four."""


def adams(outputs: list[int], m: float) -> Terms:
    """m times the Adams-Bashforth sum of the last outputs (calls, oldest first), of order 4 at most."""
    recent = outputs[:-5:-1]
    return {("D", call): m * weight for call, weight in zip(recent, ADAMS[len(recent)], strict=True)}


@register
class PNDMScheduler(TrainingLevels):
    """Pseudo numerical methods on manifolds (Liu et al. 2022, arXiv:2202.09778, eq. 11 to 13).

    With m the combined output, read as noise eps, every step is DDIM's transfer from timestep t to t':
    x' = (alpha' / alpha) x + (sigma' - sigma alpha' / alpha) eps. `skip_prk_steps=True` starts with an Euler step
    that its second call corrects (PLMS); False starts with three Runge-Kutta steps of four calls each.
    Image-to-image starts the multistep afresh on the timesteps that are left, exactly as diffusers does.
    """

    SUMMARY: ClassVar = "fourth order on DDIM's grid; the default of Stable Diffusion 1; 50 steps"
    DEFAULTS: ClassVar = {
        **NOISE,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
        **LEADING,
    }
    SECOND: ClassVar = None
    ONLY: ClassVar = NO_SAMPLE

    def plan(self, request: Request) -> Grid:
        """One entry per call: the second timestep twice (PLMS), or twelve warm-up calls and the rest."""
        steps = request.count
        base = self.indices(steps)
        if self.own["skip_prk_steps"]:
            calls = np.concatenate([base[:1], base[1:2], base[1:]])
        else:
            calls = np.concatenate([_warm_up(base, len(self) // steps), base[3:]])
        return variance_preserving(calls, calls, self.alphas_cumprod, 1.0, steps)

    def solve(self, grid: Grid) -> Table:
        """Rows in terms of the raw output: p = 0, q = 1."""
        warm = not self.own["skip_prk_steps"]
        if warm and grid.first:
            raise InputError(
                "PNDMScheduler cannot begin inside its Runge-Kutta warm-up; for image-to-image set "
                "skip_prk_steps=True in its configuration"
            )
        steps = self._runge_kutta(grid) if warm else []
        steps += self._multistep(grid, WARM_UP if warm else 0)
        zeros = np.zeros(len(grid.timesteps))
        return self.table_of(grid, steps, estimate=(zeros, zeros + 1), clean=self.estimate(grid))

    def _move(self, start: int, end: int) -> tuple[float, float]:
        """A, M of x' = A x + M m between two timesteps; a negative end is the final level."""
        here = float(self.alphas_cumprod[start])
        there = float(self.alphas_cumprod[end]) if end >= 0 else self.final_alpha_bar
        alpha, sigma, alpha_next, sigma_next = here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5
        a, m = alpha_next / alpha, sigma_next - sigma * alpha_next / alpha
        if self.own["prediction_type"] == "v_prediction":
            return a + m * sigma, m * alpha
        return a, m

    def _multistep(self, grid: Grid, begin: int) -> list[Terms]:
        ratio = len(self) // grid.steps
        steps: list[Terms] = []
        outputs = list(range(0, begin, 4))[:3]  # the first call of each warm-up step
        for n in range(begin, len(grid.timesteps)):
            t = int(grid.timesteps[n])
            if n == 1:  # the first step once more, from its own sample, with the mean of both outputs
                a, m = self._move(t + ratio, t)
                steps.append({("X", 0): a, ("D", 0): m / 2, ("D", 1): m / 2})
                continue
            a, m = self._move(t, t - ratio)
            outputs.append(n)
            steps.append({("X", n): a} | adams(outputs, m))
        return steps

    def _runge_kutta(self, grid: Grid) -> list[Terms]:
        half = len(self) // grid.steps // 2
        steps: list[Terms] = []
        for n in range(WARM_UP):
            stage, first = n % 4, n // 4 * 4
            a, m = self._move(int(grid.timesteps[first]), int(grid.timesteps[n]) - (0 if n % 2 else half))
            shares = {n: 1.0} if stage < 3 else {first: 1 / 6, first + 1: 1 / 3, first + 2: 1 / 3, n: 1 / 6}
            steps.append({("X", first): a} | {("D", k): m * w for k, w in shares.items()})
        return steps


def _warm_up(base: I64, ratio: int) -> I64:
    """Timesteps of the twelve Runge-Kutta calls: t, t/2, t/2, t' for each of the first three steps."""
    if len(base) < 4:
        raise InputError(
            f"PNDMScheduler with Runge-Kutta warm-up needs 4 steps or more, got {len(base)}; "
            f"ask for more, or set skip_prk_steps=True in its configuration"
        )
    calls = [(base[i], base[i + 1] + ratio // 2, base[i + 1] + ratio // 2, base[i + 1]) for i in range(3)]
    return np.array(calls, np.int64).ravel()


@register
class IPNDMScheduler(Scheduler):
    """PNDM without warm-up on a cosine schedule (arXiv:2202.09778, eq. 9; order 1 to 4 as the history fills).

    sigma = sin^2(pi u / 2), alpha = sqrt(1 - sigma^2) for u from 1 to 0; the output is v.
    """

    SUMMARY: ClassVar = "fourth-order multistep for v-prediction models on a cosine schedule (audio, first of its kind)"
    DEFAULTS: ClassVar = {"num_train_timesteps": 1000, "trained_betas": None}

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """Also refuses levels of one's own that are not within 0..1."""
        full = super().complete(config)
        if not all(0 <= value <= 1 for value in full["trained_betas"] or ()):
            raise ConfigError(f"{cls.__name__}: trained_betas are its noise levels, expected one from 1 to 0 per point")
        return full

    SECOND: ClassVar = None

    def idle(self) -> Grid:
        """All training timesteps, descending."""
        return self.plan(Request(len(self)))

    def plan(self, request: Request) -> Grid:
        """Equidistant u; the timestep is the angle of (alpha, sigma) in units of a quarter turn."""
        steps = request.count
        if self.own["trained_betas"] is None:
            u = np.linspace(1, 0, steps + 1)
            sigma = (np.sin(u.astype(np.float32) * np.float32(np.pi / 2)) ** 2).astype(np.float32)
        else:
            sigma = np.asarray(self.own["trained_betas"], np.float32)
            if len(sigma) != steps + 1:
                raise InputError(
                    f"IPNDMScheduler has {len(sigma)} trained_betas, which serve {len(sigma) - 1} steps, got {steps}"
                )
        alpha: F32 = np.sqrt(np.float32(1) - sigma**2)
        timesteps: F32 = (np.arctan2(sigma, alpha) / np.float32(np.pi) * 2).astype(np.float32)[:-1]
        s, a = sigma.astype(np.float64), alpha.astype(np.float64)
        return Grid(timesteps, a[:-1], s[:-1], a[1:], s[1:], steps)

    def solve(self, grid: Grid) -> Table:
        """D = sigma x + alpha out, the noise; x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) adams(D)."""
        steps: list[Terms] = []
        for n in range(len(grid.timesteps)):
            alpha, sigma = float(grid.alpha[n]), float(grid.sigma[n])
            # Without signal x is the noise D itself, and the first term and its counterpart cancel.
            a = float(grid.alpha_next[n]) / alpha if alpha > 1e-8 else 0.0
            m = float(grid.sigma_next[n]) - sigma * a
            steps.append({("X", n): a} | adams(list(range(n + 1)), m))
        estimate, clean = (read("v_prediction", grid.alpha, grid.sigma) for read in (to_noise, to_clean))
        return self.table_of(grid, steps, estimate=estimate, clean=clean)
