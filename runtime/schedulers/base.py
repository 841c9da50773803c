"""What all schedulers share: a checked configuration, the pure `table`, and diffusers' stateful face on top of it."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.schedulers.arrays import Array, cast, coefficients, draw, numbers, widen
from anamorph.schedulers.configuration import carried, completed, stored
from anamorph.schedulers.grids import Grid, Request
from anamorph.schedulers.keys import COMPATIBLE
from anamorph.schedulers.noise import F32, alphas_bar
from anamorph.schedulers.position import Position
from anamorph.schedulers.registry import FILE, SCHEDULERS, read_config
from anamorph.schedulers.table import Table, advance, clean_estimate


@dataclass(frozen=True, eq=False)
class StepOutput:
    """The next sample, and the estimate of the clean one, which is computed when it is asked for."""

    prev_sample: Array
    _inputs: tuple[Table, int, Array, Array]

    @cached_property
    def pred_original_sample(self) -> Array:
        """D as the solver's own last call sees it, clipped as the configuration says."""
        table, n, x, out = self._inputs
        return cast(clean_estimate(table, n, x, out), self.prev_sample)


class Scheduler:
    """A noise schedule and a solver, described by diffusers' configuration keys.

    A subclass states `DEFAULTS` (diffusers' keys and defaults), `ONLY` (key -> the values it serves), what it takes
    (`ETA` with its default, `TIMESTEPS`, `SIGMAS`), `STATELESS` (a step depends on its timestep alone),
    `TRANSLATE` (values of other classes' vocabulary that `from_config` replaces), `order` (model calls per step),
    `SUMMARY` (one line on when to use it), and writes `plan` and `solve`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    TRANSLATE: ClassVar[Mapping[tuple[str, Any], Any]] = {}
    SUMMARY: ClassVar[str]
    ETA: ClassVar[float | None] = None
    TIMESTEPS: ClassVar[bool] = False
    SIGMAS: ClassVar[bool] = False
    STATELESS: ClassVar[bool] = False
    WIDE_NOISE: ClassVar[bool] = False
    """Noise is drawn in float32 also for half-precision samples, as diffusers does in one of its classes."""
    order: ClassVar[int] = 1

    def __init__(self, **config: Any) -> None:
        self.config = self.complete(config)
        self.own = Config({key: self.config[key] for key in self.DEFAULTS})  # without the foreign keys
        self.num_inference_steps: int | None = None
        self._position = Position(None)
        if "beta_schedule" in self.DEFAULTS:
            self.alphas_cumprod  # noqa: B018  (a schedule that does not fit is refused here and now)

    # ---- configuration -------------------------------------------------------------------------------------------

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """The full configuration; foreign keys of other scheduler classes are kept.

        Raises ConfigError: a key that no scheduler knows, a value that this class does not serve, or two at odds.
        """
        return completed(cls.__name__, config, cls.DEFAULTS, cls.ONLY)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a configuration, also another class's (see `carried`); `overrides` replace single keys."""
        return cls(**carried(config, overrides, cls.TRANSLATE))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> Self:
        """Read `scheduler_config.json` of a folder, whichever class wrote it."""
        return cls.from_config(read_config(folder, subfolder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` as diffusers does: sorted keys, `_class_name`, foreign keys kept."""
        text = stored(self.config)
        with replacing(Path(folder) / FILE) as draft:
            draft.write_text(text, encoding="utf-8")

    @property
    def compatibles(self) -> list[type["Scheduler"]]:
        """The classes that `from_config` may take this configuration to."""
        return [SCHEDULERS[name] for name in COMPATIBLE if name in SCHEDULERS]

    @cached_property
    def alphas_cumprod(self) -> F32:
        """alpha_bar of every training timestep."""
        bar = alphas_bar(self.own)
        bar.flags.writeable = False
        return bar

    def __len__(self) -> int:
        return int(self.own["num_train_timesteps"])

    def __repr__(self) -> str:
        plain = Config(self.DEFAULTS)
        changed = (f"{key}={value!r}" for key, value in self.own.items() if value != plain[key])
        return f"{type(self).__name__}({', '.join(changed)})"

    # ---- the pure core -------------------------------------------------------------------------------------------

    def plan(self, request: Request) -> Grid:
        """The grid for a checked request."""
        raise NotImplementedError

    def solve(self, grid: Grid, eta: float) -> Table:
        """The table of a grid; coefficients in float64."""
        raise NotImplementedError

    def at_most(self, steps: int, most: int, key: str) -> None:
        """Raises InputError: more steps than a configuration key allows."""
        if steps > most:
            raise InputError(f"num_inference_steps is {steps}, expected at most {key}={most}")

    def idle(self) -> Grid:
        """The grid of all training timesteps, which holds before `set_timesteps`."""
        raise NotImplementedError

    def table(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        eta: float | None = None,
        begin: int = 0,
    ) -> Table:
        """Everything that a run needs, as plain numbers; this object stays unchanged, so threads may share it.

        Give the number of steps, or your own `timesteps` or `sigmas` where the class takes them. `eta` in 0..1 scales
        the noise of DDIM and TCD; `mu` is the shift of a flow for the size of the picture. `begin` leaves out the
        first rows (image-to-image); solvers with a history start afresh.
        Raises InputError: an argument out of range, missing, doubled, or unknown to this class.
        """
        return self._table(self._grid(num_inference_steps, timesteps, sigmas, mu), eta, begin)

    def _grid(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
    ) -> Grid:
        name = type(self).__name__
        for given, taken, word in ((timesteps, self.TIMESTEPS, "timesteps"), (sigmas, self.SIGMAS, "sigmas")):
            if given is not None and not taken:
                raise InputError(f"{name} takes no {word} of your own; give num_inference_steps instead")
        if sum(given is not None for given in (steps, timesteps, sigmas)) != 1:
            choices = ["num_inference_steps"] + ["timesteps"] * self.TIMESTEPS + ["sigmas"] * self.SIGMAS
            raise InputError(f"{name} needs exactly one of {', '.join(choices)}; give one and leave out the others")
        if steps is not None:
            try:
                steps = operator.index(steps)
            except TypeError:
                raise InputError(f"num_inference_steps is {steps!r}, expected a whole number from 1") from None
            if steps < 1:
                raise InputError(f"num_inference_steps is {steps}, expected 1 or more")
        dynamic = bool(self.own.get("use_dynamic_shifting"))
        if (mu is not None) != dynamic:
            reason = "needs mu, because its use_dynamic_shifting is on" if dynamic else f"has no use for mu={mu}"
            raise InputError(f"{name} {reason}; pass mu exactly where use_dynamic_shifting=True")
        return self.plan(Request(steps, timesteps, sigmas, mu))

    def _table(self, grid: Grid, eta: float | None, begin: int) -> Table:
        if eta is not None and self.ETA is None and eta:
            raise InputError(f"{type(self).__name__} has no eta, got {eta}; leave it at 0 or use DDIMScheduler")
        scale = float((self.ETA or 0.0) if eta is None else eta)
        if not 0 <= scale <= 1:
            raise InputError(f"eta is {eta}, expected 0 to 1")
        if not 0 <= begin < len(grid.timesteps):
            raise InputError(f"begin is {begin}, expected 0 to {len(grid.timesteps) - 1} for this number of steps")
        if self.order > 1 and begin % self.order:
            raise InputError(
                f"begin is {begin}, which lies inside a step of {type(self).__name__}; give a multiple of {self.order}"
            )
        return self.solve(grid.begin(begin), scale)

    # ---- diffusers' face -----------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: object = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run; see `table` for the arguments and errors.

        `device` is accepted for diffusers' sake: timesteps are NumPy numbers, which serve every device alike.
        """
        del device
        grid = self._grid(num_inference_steps, timesteps, sigmas, mu)
        self.num_inference_steps = grid.steps
        self._position = Position(grid)

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

    def _current(self, timestep: Any, eta: float | None) -> tuple[Table, int]:
        """The table of this run, and the row that belongs to a timestep."""
        position = self._position
        if position.grid is None:
            raise InputError(f"{type(self).__name__} has no steps yet; call set_timesteps first")
        (value,) = numbers(timestep)
        index = position.locate(position.grid, value, self.STATELESS)
        key = -1.0 if eta is None else float(eta)
        if key not in position.tables:
            position.tables[key] = self._table(position.grid, eta, position.first)
        return position.tables[key], index - position.first

    def scale_model_input(self, sample: Array, timestep: Any) -> Array:
        """What the model receives for `sample`: scale x, of the same shape and type."""
        if self.STATELESS:
            return sample
        table, n = self._current(timestep, None)
        scale = table.rows[n].scale
        return sample if scale == 1.0 else cast(scale * widen(sample), sample)

    def step(
        self,
        model_output: Array,
        timestep: Any,
        sample: Array,
        *,
        eta: float | None = None,
        generator: Any = None,
        variance_noise: Array | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Array, Array | None]:
        """The sample of the next timestep, in the type of `model_output`; half precision is computed in float32.

        Noise is `variance_noise`, or drawn from `generator` (torch's or NumPy's, as the sample is), or fresh.
        Raises InputError: called out of order, before `set_timesteps`, or with both kinds of noise.
        """
        if variance_noise is not None and generator is not None:
            raise InputError("step got both generator and variance_noise; give one of them")
        table, n = self._current(timestep, eta)
        x, out = widen(sample), widen(model_output)
        noise = variance_noise
        if noise is None and table.rows[n].draws:
            like = model_output if table.variance is None else model_output[:, : sample.shape[1]]
            noise = draw(widen(like) if self.WIDE_NOISE else like, generator)
        noise = None if noise is None else widen(noise)
        result, self._position.history = advance(table, n, x, out, self._position.history, noise)
        self._position.step = self._position.first + n + 1
        output = StepOutput(cast(result, model_output), (table, n, x, out))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Any) -> Array:
        """alpha x_0 + sigma noise at the level of each image's timestep; timesteps has shape (batch,) or ()."""
        alpha, sigma = self._noise_levels(numbers(timesteps))
        return coefficients(alpha, original_samples) * original_samples + coefficients(sigma, noise) * noise

    def _noise_levels(self, timesteps: list[float]) -> tuple[list[float], list[float]]:
        """alpha and sigma of each timestep."""
        return self._position.levels(self._levels(), timesteps)
