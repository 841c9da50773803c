"""Diffusers' stateful face, which all schedulers show on top of their recipe."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from anamorph.errors import ConfigError, InputError
from anamorph.schedulers.arrays import Array, cast, coefficients, draw, numbers, widen
from anamorph.schedulers.grids import Grid
from anamorph.schedulers.position import Places, Position
from anamorph.schedulers.recipe import Recipe
from anamorph.schedulers.table import StepOutput, Table, advance


class Scheduler(Recipe):
    """A recipe that is run step by step; what its class states beside `Recipe`'s declarations stands below."""

    INPUTS: ClassVar[Mapping[str, Callable[..., StepOutput | tuple[Array, ...]]]] = {}
    """Arrays that a step of this class may get besides, and the method that then takes its place."""
    STATELESS: ClassVar[bool] = False
    """A step depends on its timestep alone."""
    UNPREPARED: ClassVar[bool] = False
    """Whether steps may be taken before `set_timesteps`: those of training."""
    WIDE_NOISE: ClassVar[bool] = False
    """Noise is drawn in float32 also for half-precision samples, as diffusers does in one of its classes."""
    SCALES: ClassVar[bool] = False
    """Whether the model receives the sample at another scale."""
    OUTPUT: ClassVar[type[StepOutput]] = StepOutput
    SECOND: ClassVar[str | None] = "pred_original_sample"
    """What of it diffusers' class returns beside the sample."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.num_inference_steps: int | None = None
        self._position = Position(None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: object = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **further: Any,
    ) -> None:
        """Prepare a run; see `table` for the arguments and errors.

        `device` is accepted for diffusers' sake: timesteps are NumPy numbers, which serve every device alike.
        """
        del device
        grid = self._grid(num_inference_steps, timesteps=timesteps, sigmas=sigmas, mu=mu, **further)
        self.num_inference_steps = grid.steps
        self._position = Position(grid)
        # The usual table is built here, not in a step; a run that starts later may do without an impossible first call.
        with suppress(ConfigError, InputError):
            self._position.tables[0, ()] = self._table(grid, {}, 0)

    def _levels(self) -> Grid:
        return self._position.grid or self.idle()

    @property
    def timesteps(self) -> npt.NDArray[Any]:
        """The run's timesteps; before `set_timesteps`, all of training, descending."""
        return self._levels().timesteps

    @property
    def sigmas(self) -> npt.NDArray[np.float32] | None:
        """The run's noise levels and the final one; None for classes that have none."""
        return self._levels().sigmas

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample of text-to-image."""
        return self._levels().init_noise_sigma

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next step; None before the first."""
        return self._position.step

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` was given."""
        return self._position.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this position in `timesteps` (image-to-image); call it before the first step."""
        self._position.begin = begin_index

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call begins a step, rather than being a further call of one."""
        return (self._position.step or 0) % self.order == 0

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The place of a timestep in this run's, or in `schedule_timesteps`; InputError: it is not there."""
        timesteps = self._levels().timesteps if schedule_timesteps is None else schedule_timesteps
        return Places(numbers(timesteps)).find(float(timestep))

    def _current(self, timestep: Any, options: Mapping[str, Any]) -> tuple[Table, int]:
        """The table of this run, and the row that belongs to a timestep."""
        position, grid = self._position, self._position.grid
        if grid is None:
            if not self.UNPREPARED:
                raise InputError(f"{type(self).__name__} has no steps yet; call set_timesteps first")
            grid = self.idle()
            position = self._position = Position(grid)
        index = position.locate(float(timestep), self.STATELESS)
        if position.table is None or options != position.options:
            key = position.first, tuple(options.items())
            table = position.tables.get(key) or self._table(grid, options, position.first)
            position.table, position.options, position.tables[key] = table, options, table
        return position.table, index - position.first

    def scale_model_input(self, sample: Array, timestep: Any = None) -> Array:
        """What the model receives for `sample`: scale x, of the same shape and type."""
        if not self.SCALES:
            return sample
        table, n = self._current(timestep, {})
        scale = table.rows[n].scale
        return sample if scale == 1.0 else cast(scale * widen(sample), sample)

    def step(
        self,
        model_output: Array,
        timestep: Any,
        sample: Array,
        *,
        generator: Any = None,
        variance_noise: Array | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> StepOutput | tuple[Array, ...]:
        """The sample of the next timestep, in the type of `model_output`; half precision is computed in float32.

        Noise is `variance_noise`, or drawn from `generator` (torch's or NumPy's, as the sample is), or fresh.
        `options` are those that the class names in `OPTIONS` and `INPUTS`. Without `return_dict`, a tuple comes back.
        Raises InputError: called out of order, before `set_timesteps`, with an unknown option or both kinds of noise.
        """
        for name in options and self.INPUTS.keys() & options.keys():
            options |= {"generator": generator, "variance_noise": variance_noise, "return_dict": return_dict}
            return self.INPUTS[name](self, model_output, timestep, sample, options.pop(name), **options)
        if variance_noise is not None and generator is not None:
            raise InputError("step got both generator and variance_noise; give one of them")
        table, n = self._current(timestep, options)
        position, x, out, noise = self._position, sample, model_output, variance_noise
        dtype = x.dtype
        plain = dtype == out.dtype and dtype.itemsize >= 4
        if not plain:
            x, out = widen(x), widen(out)
        if noise is None and table.rows[n].draws:
            like = model_output if table.variance is None else model_output[:, : sample.shape[1]]
            noise = draw(widen(like) if self.WIDE_NOISE else like, generator)
        if noise is not None:
            noise = cast(noise, x)
        result, position.history = advance(table, n, x, out, position.history, noise)
        position.step = position.first + n + 1
        output = self.OUTPUT(result if plain else cast(result, model_output), table, n, x, out, noise)
        if return_dict:
            return output
        return (output.prev_sample, getattr(output, self.SECOND)) if self.SECOND else (output.prev_sample,)

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Any) -> Array:
        """alpha x_0 + sigma noise at the level of each image's timestep; timesteps has shape (batch,) or ()."""
        alpha, sigma = self._noise_levels(numbers(timesteps))
        return coefficients(alpha, original_samples) * original_samples + coefficients(sigma, noise) * noise

    def _noise_levels(self, timesteps: list[float]) -> tuple[list[float], list[float]]:
        """alpha and sigma of each timestep: looked up, or those of the place where the run begins or stands."""
        grid, position = self._levels(), self._position
        if position.begin is None:
            places = Places(grid.timesteps.tolist())
            where = [places.find(timestep) for timestep in timesteps]
        else:
            where = [position.begin if position.step is None else position.step] * len(timesteps)
        return grid.alpha[where].tolist(), grid.sigma[where].tolist()
