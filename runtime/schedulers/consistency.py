"""Latent consistency and trajectory consistency: few-step samplers for distilled models."""

import math
from functools import cached_property
from typing import ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, cast, weighted_sum
from anamorph.schedulers.configuration import K_NOISE, LEADING, THRESHOLD
from anamorph.schedulers.grids import F64, I64, Grid, Request, as_indices, custom_timesteps, variance_preserving
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import Columns
from anamorph.schedulers.table import StepOutput, Table, clean_estimate
from anamorph.schedulers.training import TrainingLevels

DISTILLED = {
    **K_NOISE,
    **THRESHOLD,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    **LEADING,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}


class _Distilled(TrainingLevels):
    """Steps on the timesteps that the student was distilled on."""

    TAKES: ClassVar = ("timesteps", "strength", "original_inference_steps")

    def plan(self, request: Request) -> Grid:
        """Timesteps among the teacher's, evenly from the noisiest that `strength` leaves; each leads to the next.

        Raises InputError: strength is not within 0..1, or leaves fewer timesteps than steps.
        """
        strength, steps = request.strength, request.count
        if not 0 < strength <= 1:
            raise InputError(f"strength is {strength}, expected more than 0 and at most 1")
        if request.timesteps is not None:
            places = as_indices(custom_timesteps(request.timesteps, len(self)), len(self))
            places = places[steps - int(steps * strength) :]
        else:
            teacher = request.original_inference_steps or self.own["original_inference_steps"]
            self.at_most(teacher, len(self), "num_train_timesteps")
            self.at_most(steps, teacher, "original_inference_steps")
            choices = self.choices(teacher, strength, own=request.original_inference_steps is None)[::-1]
            places = choices[np.floor(np.linspace(0, len(choices), steps, endpoint=False)).astype(np.int64)]
        if len(np.unique(places)) < steps * (request.timesteps is None) or not len(places):
            raise InputError(f"strength={strength} leaves fewer than {steps} timesteps; ask for fewer or a higher one")
        return variance_preserving(places, np.append(places[1:], 0), self.alphas_cumprod, 1.0, steps)

    def choices(self, teacher: int, strength: float, *, own: bool) -> I64:
        """The timesteps that a run may pass, ascending; `own` says that the configuration names the teacher's steps."""
        del own
        return np.arange(1, int(teacher * strength) + 1) * (len(self) // teacher) - 1


def landing(output: StepOutput) -> Array:
    """Where a step comes to before noise is added: the y of x' = sqrt(1 - c^2) y + c noise."""
    table, n, x, out, _ = output.inputs
    row, clean = table.rows[n], clean_estimate(table, n, x, out)
    kept = math.sqrt(1 - row.c**2)
    return cast(weighted_sum((row.a / kept, row.b[0] / kept), (x, clean)), output.prev_sample)


class LCMSchedulerOutput(StepOutput):
    """The next sample, and f, to which noise was added."""

    @cached_property
    def denoised(self) -> Array:
        """f = c_skip x + c_out D, of the sample's shape and type."""
        return landing(self)


class TCDSchedulerOutput(StepOutput):
    """The next sample, and that at the lower level s, to which noise was added."""

    @cached_property
    def pred_noised_sample(self) -> Array:
        """x_s = alpha_s D + sigma_s E, of the sample's shape and type."""
        return landing(self)


@register
class LCMScheduler(_Distilled):
    """Latent consistency models: jump to the clean sample, add noise of the next level (arXiv:2310.04378, alg. 3).

    The jump is f = c_skip x + c_out D with c_skip = 1/4 / (s^2 + 1/4), c_out = s / sqrt(s^2 + 1/4) and
    s = timestep_scaling t (eq. 8).
    """

    SUMMARY: ClassVar = "only for LCM models and LoRAs: two to eight steps"
    DEFAULTS: ClassVar = DISTILLED
    OUTPUT: ClassVar = LCMSchedulerOutput
    SECOND: ClassVar = "denoised"

    def solve(self, grid: Grid) -> Table:
        """x' = alpha' f + sigma' noise, in the last step x' = f."""
        scaled = grid.timesteps * self.own["timestep_scaling"]
        skip, jump = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        more = np.arange(len(scaled)) < len(scaled) - 1
        alpha = np.where(more, grid.alpha_next, 1.0)
        steps = Columns(X=alpha * skip, D=alpha * jump, Z=np.where(more, grid.sigma_next, 0.0))
        return self.table_of(grid, steps, draws=more)


@register
class TCDScheduler(_Distilled):
    """Trajectory consistency distillation: strategic stochastic sampling (Zheng et al. 2024, arXiv:2402.19159, alg. 4).

    A step goes down to s = (1 - eta) t', then up to t' by noise; eta = 0 is deterministic, 1 is LCM's way.
    """

    SUMMARY: ClassVar = "only for TCD models and LoRAs: two to twenty steps, detail set by eta"
    DEFAULTS: ClassVar = DISTILLED
    ONLY: ClassVar = {"clip_sample": (False,), "thresholding": (False,)}
    OPTIONS: ClassVar = {"eta": 0.3}
    OUTPUT: ClassVar = TCDSchedulerOutput
    SECOND: ClassVar = "pred_noised_sample"

    def choices(self, teacher: int, strength: float, *, own: bool) -> I64:
        """All training timesteps where the caller names the teacher's steps, as in diffusers."""
        return super().choices(teacher, strength, own=own) if own else np.arange(int(len(self) * strength))

    def solve(self, grid: Grid, eta: float) -> Table:
        """x_s = alpha_s D + sigma_s E; x' = (alpha'/alpha_s) x_s + sqrt(1 - (alpha'/alpha_s)^2) noise."""
        goals = np.append(grid.timesteps[1:], 0)
        bar: F64 = self.alphas_cumprod[np.floor((1 - eta) * goals).astype(np.int64)].astype(np.float64)
        down = np.sqrt(1 - bar) / grid.sigma  # weight of x, with E = (x - alpha D) / sigma
        up = grid.alpha_next / np.sqrt(bar)
        more = np.arange(len(goals)) < len(goals) - 1
        c = np.where(more, np.sqrt(np.clip(1 - up**2, 0, None)), 0.0)
        steps = Columns(X=up * down, D=up * (np.sqrt(bar) - grid.alpha * down), Z=c)
        return self.table_of(grid, steps, draws=more & (eta > 0))
