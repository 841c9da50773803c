"""DDPM and DDIM: one first-order formula on the levels of the training schedule."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, coefficients, numbers
from anamorph.schedulers.base import CURVES, NOISE, SPACINGS, Scheduler
from anamorph.schedulers.grids import Grid, as_indices, custom_timesteps, spaced, variance_preserving
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import first_order, rows_of, single, to_clean
from anamorph.schedulers.table import Clip, Table, Threshold


class TrainingLevels(Scheduler):
    """Schedulers whose steps lie on the levels of the training schedule, looked up by timestep."""

    def idle(self) -> Grid:
        """All training timesteps, each leading to the one before."""
        timesteps = np.arange(len(self))[::-1]
        return variance_preserving(timesteps, timesteps - 1, self.alphas_cumprod, 1.0, len(self))

    def indices(self, steps: int) -> np.typing.NDArray[np.int64]:
        """Descending timesteps by `timestep_spacing`; InputError with more steps than training has."""
        if steps > len(self):
            raise InputError(f"num_inference_steps is {steps}, expected at most num_train_timesteps={len(self)}")
        return as_indices(spaced(self.config, steps), len(self))

    def _noise_levels(self, timesteps: Sequence[float]) -> tuple[list[float], list[float]]:
        bar = self.alphas_cumprod[as_indices(np.asarray(timesteps), len(self))].astype(np.float64)
        return np.sqrt(bar).tolist(), np.sqrt(1 - bar).tolist()


def clip_of(config: Config) -> Clip | Threshold | None:
    """What the configuration does to the estimate of the clean sample."""
    if config["thresholding"]:
        return Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


class _Velocity(TrainingLevels):
    """Adds the training target of v-prediction."""

    def get_velocity(self, sample: Array, noise: Array, timesteps: Any) -> Array:
        """v = alpha noise - sigma sample, the target of v-prediction (arXiv:2202.00512); timesteps as in add_noise."""
        alpha, sigma = self._noise_levels(numbers(timesteps))
        return coefficients(alpha, noise) * noise - coefficients(sigma, sample) * sample


@register
class DDPMScheduler(_Velocity):
    """Ancestral sampling: the posterior of each step, with noise (Ho et al. 2020, arXiv:2006.11239, eq. 7).

    `variance_type` chooses the noise: "fixed_small" the posterior's, "fixed_large" the step's own beta.
    """

    DEFAULTS: ClassVar = {
        **NOISE,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "prediction_type": "epsilon",
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {
        "beta_schedule": (*CURVES, "sigmoid", "laplace"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": SPACINGS,
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }
    TIMESTEPS: ClassVar = True
    STATELESS: ClassVar = True

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """Each call leads to the next timestep of the list, the last one to the clean sample."""
        del sigmas  # refused before
        if steps is None:
            assert timesteps is not None
            places = as_indices(custom_timesteps(timesteps, len(self)), len(self))
        else:
            places = self.indices(steps)
        return variance_preserving(places, np.append(places[1:], -1), self.alphas_cumprod, 1.0, len(places))

    def solve(self, grid: Grid, eta: float) -> Table:
        """The first-order step with eta = 1; noise of the chosen variance, none at timestep 0."""
        del eta  # refused before
        a, b, c = first_order(grid, 1.0)
        if self.config["variance_type"] == "fixed_large":
            c = np.sqrt(1 - (grid.alpha / grid.alpha_next) ** 2)
        else:
            c = np.maximum(c, 1e-10)  # diffusers keeps the variance above 1e-20
        c = np.where(grid.timesteps > 0, c, 0.0)
        estimate = to_clean(self.config["prediction_type"], grid.alpha, grid.sigma)
        rows = rows_of(grid, estimate, (a, single(b), c), draws=grid.timesteps > 0)
        return Table(rows, grid.timesteps, clip=clip_of(self.config))


@register
class DDIMScheduler(_Velocity):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, eq. 12); `eta` scales the noise.

    With `clip_sample` or `thresholding` the clean sample is clipped but the noise estimate is not, as in diffusers:
    x' = alpha' clip(D) + sqrt(sigma'^2 - c^2) (x - alpha D) / sigma + c noise.
    """

    DEFAULTS: ClassVar = {
        **NOISE,
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "epsilon",
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {
        "beta_schedule": CURVES,
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": SPACINGS,
    }
    ETA: ClassVar = True
    STATELESS: ClassVar = True

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """Each call leads num_train_timesteps // steps timesteps on, which may miss the next one by rounding."""
        del timesteps, sigmas  # refused before
        assert steps is not None
        places = self.indices(steps)
        final = 1.0 if self.config["set_alpha_to_one"] else float(self.alphas_cumprod[0])
        return variance_preserving(places, places - len(self) // steps, self.alphas_cumprod, final, steps)

    def solve(self, grid: Grid, eta: float) -> Table:
        """The first-order step; with clipping, its two parts have a column each."""
        a, b, c = first_order(grid, eta)
        clip = clip_of(self.config)
        estimate = to_clean(self.config["prediction_type"], grid.alpha, grid.sigma)
        e = None
        if clip is not None:
            b, e = grid.alpha_next, b - grid.alpha_next
        rows = rows_of(grid, estimate, (a, single(b), c), e=e, draws=eta > 0)
        return Table(rows, grid.timesteps, clip=clip)
