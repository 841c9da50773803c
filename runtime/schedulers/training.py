"""Schedulers whose steps lie on the levels of the training schedule: what they share."""

from typing import Any

import numpy as np

from anamorph.schedulers.arrays import Array, coefficients, numbers
from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.grids import I64, Grid, as_indices, spaced, variance_preserving
from anamorph.schedulers.noise import F32


class TrainingLevels(Scheduler):
    """Levels are looked up by timestep."""

    def idle(self) -> Grid:
        """All training timesteps, each leading to the one before."""
        timesteps = np.arange(len(self))[::-1]
        return variance_preserving(timesteps, timesteps - 1, self.alphas_cumprod, 1.0, len(self))

    def indices(self, steps: int) -> I64:
        """Descending timesteps by `timestep_spacing`; InputError with more steps than training has."""
        self.at_most(steps, len(self), "num_train_timesteps")
        return as_indices(spaced(self.own, steps), len(self))

    @property
    def final_alpha_bar(self) -> float:
        """The level that the last step leads to, by `set_alpha_to_one`."""
        return 1.0 if self.own["set_alpha_to_one"] else float(self.alphas_cumprod[0])

    def get_velocity(self, sample: Array, noise: Array, timesteps: Any) -> Array:
        """v = alpha noise - sigma sample, see `velocity`."""
        return velocity(self.alphas_cumprod, sample, noise, timesteps)

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep that a call leads to, -1 after the last; before `set_timesteps`, the one below."""
        if self.num_inference_steps is None:
            return int(timestep) - 1
        places = self.timesteps.tolist()
        after = places.index(int(timestep)) + 1
        return int(places[after]) if after < len(places) else -1

    def _noise_levels(self, timesteps: list[float]) -> tuple[list[float], list[float]]:
        return training_levels(self.alphas_cumprod, timesteps)


def training_levels(bar: F32, timesteps: list[float]) -> tuple[list[float], list[float]]:
    """alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar) of training timesteps; InputError: one is none."""
    level = bar[as_indices(np.asarray(timesteps), len(bar))].astype(np.float64)
    return np.sqrt(level).tolist(), np.sqrt(1 - level).tolist()


def velocity(bar: F32, sample: Array, noise: Array, timesteps: Any) -> Array:
    """v = alpha noise - sigma sample, the target of v-prediction (arXiv:2202.00512); timesteps as in add_noise."""
    alpha, sigma = training_levels(bar, numbers(timesteps))
    return coefficients(alpha, noise) * noise - coefficients(sigma, sample) * sample
