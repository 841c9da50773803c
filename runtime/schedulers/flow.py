"""Flow matching: x = (1 - sigma) x_0 + sigma noise, and the network predicts noise - x_0 (arXiv:2210.02747)."""

from typing import Any, ClassVar

import numpy as np

from anamorph.errors import InputError
from anamorph.schedulers.arrays import Array, draw, widen
from anamorph.schedulers.base import Scheduler
from anamorph.schedulers.configuration import SIGMAS
from anamorph.schedulers.grids import F64, Grid, Request
from anamorph.schedulers.levels import family, family_sigmas, shifted, shifted_for_size, stretched
from anamorph.schedulers.noise import F32
from anamorph.schedulers.registry import register
from anamorph.schedulers.solvers import CHURN, Columns, Terms, churned
from anamorph.schedulers.table import StepOutput, Table


class Flow(Scheduler):
    """Levels from 1 to 0; the timestep is the level times num_train_timesteps."""

    SECOND: ClassVar = None

    def idle(self) -> Grid:
        """All training timesteps, descending, then zero."""
        return self.grid_of(shifted(np.arange(len(self), 0, -1) / len(self), self._shift))

    @property
    def _shift(self) -> float:
        return 1.0 if self.own.get("use_dynamic_shifting") else float(self.own["shift"])

    def even(self, steps: int) -> F64:
        """Equidistant levels between the ends of the training schedule, which are shifted already."""
        ends = shifted(np.array([1.0, 1 / len(self)]).astype(np.float32).astype(np.float64), self._shift)
        high, low = ends.astype(np.float32).tolist()
        return np.linspace(high * len(self), low * len(self), steps) / len(self)

    def grid_of(self, levels: F64, timesteps: F32 | None = None) -> Grid:
        """The grid through these levels and zero."""
        sigmas = levels.astype(np.float32)
        return self.through(np.append(sigmas, np.float32(0)), sigmas * np.float32(len(self)), timesteps)

    def through(self, sigmas: F32, timesteps: F32, given: F32 | None = None) -> Grid:
        """The grid through float32 levels, the final one included."""
        exact = sigmas.astype(np.float64)
        return Grid(
            timesteps if given is None else given,
            1 - exact[:-1], exact[:-1], 1 - exact[1:], exact[1:], len(timesteps), sigmas,
        )  # fmt: skip

    def flow_table(self, grid: Grid, steps: Columns | list[Terms], **columns: Any) -> Table:
        """A table of steps in the raw output, D = out."""
        zeros, ones = np.zeros_like(grid.sigma), np.ones_like(grid.sigma)
        return self.table_of(grid, steps, estimate=(zeros, ones), clean=(ones, -grid.sigma), **columns)

    def scale_noise(self, sample: Array, timestep: Any, noise: Array) -> Array:
        """(1 - sigma) sample + sigma noise, under the name that flow pipelines use for `add_noise`."""
        return self.add_noise(sample, noise, timestep)


@register
class FlowMatchEulerDiscreteScheduler(Flow):
    """Euler's method on the flow (Esser et al. 2024, arXiv:2403.03206), with the shifts for large pictures.

    `use_dynamic_shifting` takes `mu`, which grows with the size of the picture; `stochastic_sampling` jumps to the
    clean sample and adds noise of the next level; `invert_sigmas` runs from 0 to 1 for models that count so.
    """

    SUMMARY: ClassVar = "the sampler of Stable Diffusion 3, Flux and their kin; 20 to 50 steps, distilled models fewer"
    DEFAULTS: ClassVar = {
        **SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    }
    TAKES: ClassVar = ("timesteps", "sigmas")
    OPTIONS: ClassVar = CHURN

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.shift = float(self.own["shift"])

    def set_shift(self, shift: float) -> None:
        """The shift of the runs to come, in place of the configuration's."""
        self.shift = float(shift)

    def plan(self, request: Request) -> Grid:
        """Levels, even or given, shifted, stretched to `shift_terminal`, or the family between their ends.

        Timesteps of one's own are told to the network as they are, while the levels that they stand for are shifted.
        """
        given = None
        if request.timesteps is not None:
            given = np.asarray(request.timesteps, np.float32)
            levels = given.astype(np.float64) / len(self)
        elif request.sigmas is not None:
            levels = np.asarray(request.sigmas, np.float32).astype(np.float64)
        else:
            levels = self.even(request.count)
        if not levels.size or not ((levels > 0) & (levels <= 1)).all() or (np.diff(levels) >= 0).any():
            raise InputError(f"levels must descend within 1..0, zero excluded, got {levels.tolist()!r}")
        if request.mu is not None:
            levels = shifted_for_size(levels, request.mu, self.own["time_shift_type"])
        else:
            levels = shifted(levels, self.shift)
        if self.own["shift_terminal"]:
            levels = stretched(levels, self.own["shift_terminal"])
        chosen = family(self.own)
        if chosen:
            levels = family_sigmas(chosen, self.config, levels, len(levels))
        if not self.own["invert_sigmas"]:
            return self.grid_of(levels, given)
        rising = np.float32(1) - levels.astype(np.float32)
        return self.through(np.append(rising, np.float32(1)), rising * np.float32(len(self)))

    def solve(self, grid: Grid, **options: float) -> Table:
        """x' = x + (sigma' - sigma) out, or with noise x' = (1 - sigma') (x - sigma out) + sigma' noise."""
        if options != CHURN:
            raise InputError(
                "FlowMatchEulerDiscreteScheduler adds no noise by s_churn: diffusers' class names it but does not use "
                "it; take FlowMatchHeunDiscreteScheduler or stochastic_sampling=True"
            )
        if not self.own["stochastic_sampling"]:
            return self.flow_table(grid, Columns(X=1.0, D=grid.sigma_next - grid.sigma))
        steps = Columns(X=grid.alpha_next, D=-grid.alpha_next * grid.sigma, Z=grid.sigma_next)
        return self.flow_table(grid, steps, draws=True)

    def step_tokens(
        self, model_output: Array, timestep: Any, sample: Array, each: Array | None, **options: Any
    ) -> StepOutput | tuple[Array, ...]:
        """With `per_token_timesteps` [N, T], `sample` [N, T, C] has a level in every token.

        Each token goes to the run's next lower level: x' = x + (s - s') out, in float32. The sign of the output is
        turned, as in diffusers, whose pipelines turn it before.
        """
        if each is None:
            return self.step(model_output, timestep, sample, **options)
        self._current(timestep, {})
        grid = self._levels()
        levels = each[..., None] / len(self)
        below, last = 0.0 * levels, 0.0
        for level in sorted([*grid.sigma.tolist(), float(grid.sigma_next[-1])]):
            below, last = below + (level - last) * (levels > level + 1e-6), level
        out, x = widen(model_output), widen(sample)
        if self.own["stochastic_sampling"]:
            x = (1.0 - below) * (x - levels * out) + below * draw(x, options["generator"])
        else:
            x = x + (levels - below) * out
        self._position.step = (self._position.step or 0) + 1
        return StepOutput(x) if options["return_dict"] else (x,)

    INPUTS: ClassVar = {"per_token_timesteps": step_tokens}


@register
class FlowMatchHeunDiscreteScheduler(Flow):
    """Heun's method on the flow: the mean of the outputs at both ends of a step (arXiv:2206.00364, alg. 1)."""

    SUMMARY: ClassVar = "second order on flow models at two calls per step; 10 to 25 steps"
    DEFAULTS: ClassVar = {"num_train_timesteps": 1000, "shift": 1.0}
    OPTIONS: ClassVar = CHURN
    order: ClassVar = 2

    def plan(self, request: Request) -> Grid:
        """Two calls per step, the second where the next step begins; one in the last step."""
        levels = shifted(self.even(request.count), self._shift).astype(np.float32)
        calls = np.append(levels[:1], np.repeat(levels[1:], 2))
        shown = np.concatenate([levels[:1], np.repeat(levels[1:], 2), np.zeros(1, np.float32)])
        exact = calls.astype(np.float64)
        after = np.append(exact[1:], 0.0)
        return Grid(calls * np.float32(len(self)), 1 - exact, exact, 1 - after, after, request.count, shown)

    def solve(self, grid: Grid, **options: float) -> Table:
        """x' = x + (sigma' - sigma_hat) (out sigma / sigma_hat + out') / 2, from the level that churning leads to.

        The output is read at the level before that, and noise is drawn in both calls, as in diffusers.
        """
        raised, churn = churned(grid, **options)
        dt, ratio = grid.sigma_next - raised.sigma, grid.sigma / raised.sigma
        draws = churn > 0
        steps = Columns(X=1.0, D=dt * ratio).terms(len(dt))
        for n in range(0, len(steps) - 1, 2):
            steps[n + 1] = {("X", n): 1.0, ("D", n): float(dt[n] * ratio[n]) / 2, ("D", n + 1): float(dt[n]) / 2}
            draws[n + 1], churn[n + 1] = draws[n], 0.0
        return self.flow_table(grid, steps, draws=draws, churn=churn)
