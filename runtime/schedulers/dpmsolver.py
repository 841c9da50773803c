"""DPM-Solver and DPM-Solver++, multistep: exponential integrators in half the log signal-to-noise ratio."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.schedulers.base import CURVES, NOISE, SPACINGS, Scheduler
from anamorph.schedulers.ddim import clip_of
from anamorph.schedulers.euler import finite_sigmas
from anamorph.schedulers.grids import (
    F64,
    Grid,
    custom_timesteps,
    family,
    family_sigmas,
    leading,
    sigma_to_timestep,
    trailing,
)
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import rows_of, to_clean, to_noise
from anamorph.schedulers.table import Table

FEW_STEPS = 15
"""Below this number of steps, `lower_order_final` takes effect."""

NO_STEP = 1e-5
"""A last step this short in lambda stays where it is: some families of levels already end at sigma_min."""


def integrals(algorithm: str, solver_type: str, grid: Grid, h: F64) -> tuple[F64, F64, F64, F64, F64]:
    """a, phi_0, phi_1, phi_2, c of x' = a x + phi_0 D + phi_1 D' + phi_2 D'' + c noise over a step h in lambda.

    D', D'' are derivatives with respect to lambda, times h and h^2. With k = 1 (ordinary) or 2 (stochastic):

        dpmsolver++   a = sigma'/sigma e^-(k-1)h   phi_0 = alpha' (1 - e^-kh)            (arXiv:2211.01095, eq. 9)
        dpmsolver     a = alpha'/alpha             phi_0 = -k sigma' (e^h - 1)           (arXiv:2206.00927, eq. 3.4)

    phi_1 is half of phi_0 ("midpoint"), or the integral of the linear term ("heun"; with it phi_2).
    """
    k = 2.0 if algorithm.startswith("sde-") else 1.0
    alpha, sigma, alpha_next, sigma_next = grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next
    if algorithm.endswith("++"):
        fade = np.exp(-k * h)  # zero in a last step that ends without noise, where h is infinite
        a = sigma_next / sigma * (np.exp(-h) if k == 2 else 1.0)
        phi_0 = alpha_next * (1 - fade)
        linear = alpha_next * (1 - (1 - fade) / (k * h))
        square = alpha_next * ((1 - fade - k * h) / (k * h) ** 2 + (0.5 if k == 1 else -0.5))
        c = sigma_next * np.sqrt(np.maximum(1 - fade, 0)) if k == 2 else np.zeros_like(h)
    else:
        growth = np.expm1(h)
        a = alpha_next / alpha
        phi_0 = -k * sigma_next * growth
        linear = -k * sigma_next * (growth / h - 1)
        square = -sigma_next * ((growth - h) / h**2 - 0.5)
        c = sigma_next * np.sqrt(np.maximum(np.expm1(2 * h), 0)) if k == 2 else np.zeros_like(h)
    return a, phi_0, phi_0 / 2 if solver_type == "midpoint" else linear, square, c


@register
class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ of order 1 to 3 (Lu et al. 2022, arXiv:2211.01095, alg. 2), and its relatives by `algorithm_type`.

    The order rises from 1 as the history fills. It falls again at the end: to 1 in the last step with
    `euler_at_final`, `final_sigmas_type="zero"`, or below 15 steps `lower_order_final`, which also caps the step
    before at 2.
    """

    DEFAULTS: ClassVar = {
        **NOISE,
        "solver_order": 2,
        "prediction_type": "epsilon",
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    }
    ONLY: ClassVar = {
        "beta_schedule": CURVES,
        "solver_order": (1, 2, 3),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "solver_type": ("midpoint", "heun"),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": (None,),
        "timestep_spacing": SPACINGS,
    }
    TRANSLATE: ClassVar = {
        ("algorithm_type", "deis"): "dpmsolver++",
        ("solver_type", "logrho"): "midpoint",
        ("solver_type", "bh1"): "midpoint",
        ("solver_type", "bh2"): "midpoint",
    }
    TIMESTEPS: ClassVar = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.training_sigmas = finite_sigmas(self.alphas_cumprod)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """Also refuses what DPM-Solver cannot do: end at zero noise, threshold, or order 3 with its noise."""
        full = super().complete(config)
        algorithm = full["algorithm_type"]
        if not algorithm.endswith("++"):
            if full["final_sigmas_type"] == "zero":
                raise ConfigError(
                    f"algorithm_type={algorithm!r} cannot end at final_sigmas_type='zero'; use 'sigma_min'"
                )
            if full["thresholding"]:
                raise ConfigError(f"thresholding=True is not served with {algorithm!r}; use 'dpmsolver++'")
        if algorithm == "sde-dpmsolver" and full["solver_order"] == 3:
            raise ConfigError("algorithm_type='sde-dpmsolver' has no solver_order=3; use 1 or 2")
        return full

    def idle(self) -> Grid:
        """All training timesteps, descending, then zero."""
        timesteps = np.arange(len(self))[::-1]
        return self._grid_of(timesteps, np.append(self.training_sigmas[::-1], np.float32(0)))

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """Levels at whole timesteps, or one family of levels; InputError: own timesteps beside a family."""
        del sigmas  # refused before
        chosen, schedule = family(self.config), self.training_sigmas
        if timesteps is not None:
            if chosen:
                raise InputError(f"timesteps of your own cannot go with {chosen}=True; turn that off")
            places = custom_timesteps(timesteps, len(self)).astype(np.int64)
        else:
            assert steps is not None
            places = self._spaced(steps)
        if chosen and steps is not None:
            values = family_sigmas(chosen, self.config, schedule[::-1], steps)
            found = sigma_to_timestep(values, np.log(schedule))
            whole = chosen in ("use_karras_sigmas", "use_lu_lambdas")
            if whole and self.config["beta_schedule"] != "squaredcos_cap_v2":
                found = found.round()
            places = found.astype(np.int64)
        else:
            values = np.interp(places, np.arange(len(self)), schedule)
        final = schedule[0] if self.config["final_sigmas_type"] == "sigma_min" else 0.0
        return self._grid_of(places, np.append(values, final).astype(np.float32))

    def _spaced(self, steps: int) -> np.typing.NDArray[np.int64]:
        """Descending timesteps from the first whose lambda is above `lambda_min_clipped`; N + 1 points, less one."""
        half_log_snr = -np.log(self.training_sigmas)
        last = len(self) - int(np.searchsorted(half_log_snr[::-1], self.config["lambda_min_clipped"]))
        kind = self.config["timestep_spacing"]
        if kind == "linspace":
            points = np.linspace(0, last - 1, steps + 1)[::-1][:-1]
        elif kind == "leading":
            points = leading(last, steps + 1)[::-1][:-1] + self.config["steps_offset"]
        else:
            points = trailing(last, len(self) / steps, steps)
        return points.round().astype(np.int64)

    def _grid_of(self, timesteps: np.typing.NDArray[np.int64], sigmas: F32) -> Grid:
        levels = sigmas.astype(np.float64)
        alpha = 1 / np.hypot(1.0, levels)
        sigma = levels * alpha
        return Grid(timesteps, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], len(timesteps), sigmas)

    def solve(self, grid: Grid, eta: float) -> Table:
        """Rows with as many past estimates as the order of each step needs."""
        del eta  # refused before
        algorithm, kind = self.config["algorithm_type"], self.config["prediction_type"]
        levels = grid.sigma / grid.alpha
        if (np.diff(levels) >= 0).any():
            raise InputError(f"two of the {grid.steps} steps share a noise level; ask for fewer steps")
        clean = algorithm.endswith("++")
        estimate = (to_clean if clean else to_noise)(kind, grid.alpha, grid.sigma)
        with np.errstate(divide="ignore"):
            h = np.log(levels) - np.log(grid.sigma_next / grid.alpha_next)
        orders = self._orders(grid, h)
        with np.errstate(invalid="ignore"):  # an infinite last step is of order 1, which uses no quotients
            second = integrals(algorithm, self.config["solver_type"], grid, h)
            third = integrals(algorithm, "heun", grid, h)
        a, phi_0, c = second[0], second[1], second[4]
        phi_1 = np.where(np.array(orders) == 3, third[2], second[2])
        b = [_weights(orders[n], n, h, *(float(phi[n]) for phi in (phi_0, phi_1, third[3]))) for n in range(len(h))]
        rows = rows_of(grid, estimate, (a, b, c), draws=algorithm.startswith("sde-"))
        return Table(rows, grid.timesteps, grid.sigmas, clip=clip_of(self.config), estimates_clean=clean)

    def _orders(self, grid: Grid, h: F64) -> list[int]:
        config, count = self.config, len(grid.timesteps)
        few = config["lower_order_final"] and grid.steps < FEW_STEPS
        orders = [min(n + 1, config["solver_order"]) for n in range(count)]
        if few and count > 1:
            orders[-2] = min(orders[-2], 2)
        if few or config["euler_at_final"] or config["final_sigmas_type"] == "zero" or abs(h[-1]) < NO_STEP:
            orders[-1] = 1
        return orders


def _weights(order: int, n: int, h: F64, phi_0: float, phi_1: float, phi_2: float) -> tuple[float, ...]:
    """b of D_n, D_n-1, D_n-2: divided differences stand for the derivatives in lambda."""
    if order == 1:
        return (phi_0,)
    r0 = float(h[n - 1] / h[n])
    if order == 2:
        return phi_0 + phi_1 / r0, -phi_1 / r0
    r1 = float(h[n - 2] / h[n])
    # First differences (D_n - D_n-1) / r0 and (D_n-1 - D_n-2) / r1, as vectors over the three estimates.
    near, far = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    first = near + r0 / (r0 + r1) * (near - far)
    curve = (near - far) / (r0 + r1)
    weights = np.array([phi_0, 0, 0]) + phi_1 * first + phi_2 * curve
    return tuple(weights.tolist())
