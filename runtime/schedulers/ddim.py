"""DDPM, DDIM and its inverse: one first-order formula on the levels of the training schedule."""

from typing import ClassVar

import numpy as np

from anamorph.schedulers.configuration import CURVES, LEADING, NOISE, THRESHOLD
from anamorph.schedulers.grids import Grid, Request, as_indices, custom_timesteps, spaced, variance_preserving
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Columns, first_order, to_noise
from anamorph.schedulers.table import Table
from anamorph.schedulers.training import TrainingLevels

CLIP = {"clip_sample": True, "clip_sample_range": 1.0}


@register
class DDPMScheduler(TrainingLevels):
    """Ancestral sampling: the posterior of each step, with noise (Ho et al. 2020, arXiv:2006.11239, eq. 7).

    `variance_type` chooses the noise: "fixed_small" the posterior's, "fixed_large" the step's own beta, "learned" and
    "learned_range" what the model predicts beside the mean (arXiv:2102.09672, eq. 15).
    """

    SUMMARY: ClassVar = "the original sampler; wants hundreds of steps, and is the yardstick for training"
    DEFAULTS: ClassVar = {
        **NOISE,
        **CLIP,
        **THRESHOLD,
        "variance_type": "fixed_small",
        **LEADING,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {
        "beta_schedule": (*CURVES, "sigmoid", "laplace"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"),
    }
    TRANSLATE: ClassVar = {("variance_type", None): "fixed_small"}
    TAKES: ClassVar = ("timesteps",)
    STATELESS: ClassVar = True
    UNPREPARED: ClassVar = True

    def plan(self, request: Request) -> Grid:
        """Each call leads to the next timestep of the list, the last one to the clean sample."""
        if request.timesteps is not None:
            places = as_indices(custom_timesteps(request.timesteps, len(self)), len(self))
        else:
            places = self.indices(request.count)
        return variance_preserving(places, np.append(places[1:], -1), self.alphas_cumprod, 1.0, len(places))

    def solve(self, grid: Grid) -> Table:
        """The first-order step with eta = 1; noise of the chosen variance, none at timestep 0."""
        a, b, c = first_order(grid, 1.0)
        kind, noisy = self.own["variance_type"], grid.timesteps > 0
        small = np.maximum(c, 1e-10)  # diffusers keeps the variance above 1e-20
        large = np.sqrt(1 - (grid.alpha / grid.alpha_next) ** 2)
        steps = Columns(X=a, D=b, Z=np.where(noisy, large if kind == "fixed_large" else small, 0.0))
        learned = kind.startswith("learned")
        log_c = None
        if learned:  # log c is linear in v, from log(small) at v = -1 to log(large) at v = 1
            log_c = (np.log(small) + np.log(large)) / 2, (np.log(large) - np.log(small)) / 2
        return self.table_of(grid, steps, draws=noisy, log_c=log_c, variance=kind if learned else None)


@register
class DDIMScheduler(TrainingLevels):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, eq. 12); `eta` scales the noise.

    With `clip_sample` or `thresholding` the clean sample is clipped but the noise estimate E is not, as in diffusers:
    x' = alpha' clip(D) + sqrt(sigma'^2 - c^2) E + c noise; `use_clipped_model_output` takes E from the clipped one.
    """

    SUMMARY: ClassVar = "deterministic and invertible; 50 steps; the safe choice for old checkpoints"
    DEFAULTS: ClassVar = {
        **NOISE,
        **CLIP,
        **THRESHOLD,
        "set_alpha_to_one": True,
        **LEADING,
        "rescale_betas_zero_snr": False,
    }
    OPTIONS: ClassVar = {"eta": 0.0, "use_clipped_model_output": False}
    STATELESS: ClassVar = True

    def plan(self, request: Request) -> Grid:
        """Each call leads num_train_timesteps // steps timesteps on, which may miss the next one by rounding."""
        steps = request.count
        places = self.indices(steps)
        return variance_preserving(
            places, places - len(self) // steps, self.alphas_cumprod, self.final_alpha_bar, steps
        )

    def solve(self, grid: Grid, eta: float, use_clipped_model_output: bool) -> Table:
        """The first-order step; with clipping of D alone, its two parts have a column each."""
        a, b, c = first_order(grid, eta)
        if self.clip is None or use_clipped_model_output:
            steps = Columns(X=a, D=b, Z=c)
        else:
            p, q = to_noise(self.own["prediction_type"], grid.alpha, grid.sigma)
            steps = Columns(X=a * grid.sigma * p, D=grid.alpha_next, O=a * grid.sigma * q, Z=c)
        return self.table_of(grid, steps, draws=eta > 0)


@register
class DDIMInverseScheduler(TrainingLevels):
    """DDIM backwards, from a picture to the noise that gives it (arXiv:2010.02502, section 4.3).

    At timestep t the sample still has the level of t minus a stride; the network is asked as if it were at t.
    """

    SUMMARY: ClassVar = "runs DDIM backwards: finds the noise behind a given picture, for editing"
    DEFAULTS: ClassVar = {
        **NOISE,
        **CLIP,
        "set_alpha_to_one": True,
        **LEADING,
        "rescale_betas_zero_snr": False,
    }
    ONLY: ClassVar = {"timestep_spacing": ("leading", "trailing")}
    STATELESS: ClassVar = True

    def idle(self) -> Grid:
        """All training timesteps, ascending."""
        timesteps = np.arange(len(self))
        return variance_preserving(timesteps, timesteps, self.alphas_cumprod, 1.0, len(self))

    def plan(self, request: Request) -> Grid:
        """Ascending timesteps; each call starts num_train_timesteps // steps below its timestep."""
        steps = request.count
        self.at_most(steps, len(self), "num_train_timesteps")
        places = as_indices(spaced(self.own, steps)[::-1], len(self))
        there = variance_preserving(places, places, self.alphas_cumprod, 1.0, steps)
        here = variance_preserving(
            places, places - len(self) // steps, self.alphas_cumprod, self.final_alpha_bar, steps
        )
        return Grid(places, here.alpha_next, here.sigma_next, there.alpha, there.sigma, steps)

    def solve(self, grid: Grid) -> Table:
        """x' = alpha' clip(D) + sigma' E with E the noise estimate; the first level may have no noise at all."""
        p, q = to_noise(self.own["prediction_type"], grid.alpha, grid.sigma)
        return self.table_of(grid, Columns(X=grid.sigma_next * p, D=grid.alpha_next, O=grid.sigma_next * q))
