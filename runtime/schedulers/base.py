"""What all schedulers share: a checked configuration, the pure `table`, and diffusers' stateful face on top of it."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import numpy.typing as npt

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component
from anamorph.schedulers.arrays import Array, cast, coefficients, draw, numbers, widen
from anamorph.schedulers.configuration import Conflict, carried, clip_of, completed, stored
from anamorph.schedulers.grids import F64, Grid, Request
from anamorph.schedulers.keys import COMPATIBLE
from anamorph.schedulers.noise import F32, alphas_bar, finite_sigmas
from anamorph.schedulers.position import Places, Position
from anamorph.schedulers.registry import FILE, SCHEDULERS, read_config
from anamorph.schedulers.solvers import Columns, Terms, rows_of, to_clean
from anamorph.schedulers.table import Clip, StepOutput, Table, Threshold, advance

FURTHER = tuple(field.name for field in fields(Request))[4:]
"""What a run may be asked for, beside the arguments that `table` and `set_timesteps` spell out."""

INSTEAD = {
    "num_train_timesteps": "it belongs to the configuration, with which the noise schedule agrees",
    "strength": "give `begin` or call set_begin_index",
    "original_inference_steps": "only distilled models have such",
}
"""What to do instead, where a class does not take an argument of `Request`."""


class Scheduler:
    """A noise schedule and a solver, described by diffusers' configuration keys.

    A subclass states `DEFAULTS` (diffusers' keys and defaults), `ONLY` (key -> the values it serves), `CONFLICTS`
    (values that must not come together), what a run of it takes beside the number of steps (`TAKES`) and what its
    steps take (`OPTIONS`, with defaults), `STATELESS` (a step
    depends on its timestep alone), `TRANSLATE` (values of other classes' vocabulary that `from_config` replaces),
    `order` (model calls per step), `SUMMARY` (one line on when to use it), and writes `plan` and `solve`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    CONFLICTS: ClassVar[tuple[Conflict, ...]] = ()
    TRANSLATE: ClassVar[Mapping[tuple[str, Any], Any]] = {}
    SUMMARY: ClassVar[str]
    TAKES: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar[Mapping[str, float]] = {}
    INPUTS: ClassVar[Mapping[str, Callable[..., StepOutput | tuple[Array, ...]]]] = {}
    """Arrays that a step of this class may get besides, and the method that then takes its place."""
    STATELESS: ClassVar[bool] = False
    UNPREPARED: ClassVar[bool] = False
    """Whether steps may be taken before `set_timesteps`: those of training."""
    WIDE_NOISE: ClassVar[bool] = False
    """Noise is drawn in float32 also for half-precision samples, as diffusers does in one of its classes."""
    SCALES: ClassVar[bool] = False
    """Whether the model receives the sample at another scale."""
    OUTPUT: ClassVar[type[StepOutput]] = StepOutput
    SECOND: ClassVar[str | None] = "pred_original_sample"
    """What of it diffusers' class returns beside the sample."""
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
        return completed(cls.__name__, config, cls.DEFAULTS, cls.ONLY, cls.CONFLICTS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **overrides: Any) -> Self:
        """Build from a configuration, also another class's (see `carried`); `overrides` replace single keys.

        A folder or hub id stands for the configuration that lies there.
        """
        if isinstance(config, str | Path):
            config = read_config(find_component(config, None, (FILE,)))
        return cls(**carried(config, overrides, cls.TRANSLATE))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **hub: Unpack[HubOptions]
    ) -> Self:
        """Read `scheduler_config.json` of a folder or hub id, whichever class wrote it."""
        return cls.from_config(read_config(find_component(pretrained_model_name_or_path, subfolder, (FILE,), **hub)))

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

    @cached_property
    def training_sigmas(self) -> F32:
        """sigma of every training timestep, finite."""
        return finite_sigmas(self.alphas_cumprod)

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

    solve: Callable[..., Table]
    """The table of a grid, coefficients in float64; its further arguments are those of `OPTIONS`."""

    def estimate(self, grid: Grid) -> tuple[F64, F64]:
        """p, q of the clean estimate."""
        return to_clean(self.own.get("prediction_type", "epsilon"), grid.alpha, grid.sigma)

    def scale(self, grid: Grid) -> F64 | float:
        """What the model's input is multiplied by in every call."""
        del grid
        return 1.0

    @property
    def clip(self) -> Clip | Threshold | None:
        """What the configuration does to the clean estimate."""
        return clip_of(self.own)

    def table_of(
        self, grid: Grid, steps: Columns | Sequence[Terms], *, estimate: tuple[F64, F64] | None = None,
        variance: str | None = None, **columns: Any,
    ) -> Table:  # fmt: skip
        """The table of steps in the clean estimate, or in another `estimate`; for `columns` see `rows_of`."""
        rows = rows_of(grid, estimate or self.estimate(grid), steps, scale=self.scale(grid), **columns)
        return Table(rows, grid.timesteps, grid.sigmas, grid.init_noise_sigma, self.clip, variance)

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
        begin: int = 0,
        **options: Any,
    ) -> Table:
        """Everything that a run needs, as plain numbers; this object stays unchanged, so threads may share it.

        Give the number of steps, or your own `timesteps` or `sigmas` where the class takes them; `mu` is the shift of
        a flow for the size of the picture. `begin` leaves out the first rows (image-to-image); solvers with a history
        start afresh. `options` are what the class names in `TAKES` and `OPTIONS`, such as `eta`, which scales the
        noise of DDIM and TCD.
        Raises InputError: an argument out of range, missing, doubled, or unknown to this class.
        """
        request = {name: options.pop(name) for name in FURTHER if name in options}
        grid = self._grid(num_inference_steps, timesteps=timesteps, sigmas=sigmas, mu=mu, **request)
        return self._table(grid, options, begin)

    def _grid(self, steps: int | None, **given: Any) -> Grid:
        name, asked = type(self).__name__, {key: value for key, value in given.items() if value is not None}
        for key in asked:
            if key != "mu" and key not in self.TAKES:
                raise InputError(f"{name} takes no {key}; {INSTEAD.get(key, 'give num_inference_steps')}")
        if (steps is not None) + ("timesteps" in asked) + ("sigmas" in asked) != 1:
            choices = [key for key in ("timesteps", "sigmas") if key in self.TAKES]
            raise InputError(
                f"{name} needs exactly one of {', '.join(['num_inference_steps', *choices])}; "
                f"give one and leave out the others"
            )
        if steps is not None:
            try:
                steps = operator.index(steps)
            except TypeError:
                raise InputError(f"num_inference_steps is {steps!r}, expected a whole number from 1") from None
            if steps < 1:
                raise InputError(f"num_inference_steps is {steps}, expected 1 or more")
        dynamic = bool(self.own.get("use_dynamic_shifting"))
        if ("mu" in asked) != dynamic:
            unused = f"has no use for mu={given['mu']}"
            reason = "needs mu, because its use_dynamic_shifting is on" if dynamic else unused
            raise InputError(f"{name} {reason}; pass mu exactly where use_dynamic_shifting=True")
        return self.plan(Request(steps, **asked))

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a step, completed; eta = 0, which pipelines pass to all, is welcome everywhere."""
        options = dict(self.OPTIONS)
        for name, value in given.items():
            if name not in options and not (name == "eta" and not value):
                known = ", ".join(options) or "none"
                raise InputError(f"{type(self).__name__} has no {name}, got {value}; the options of its steps: {known}")
            if name in options and value is not None:
                options[name] = value
        if not 0 <= options.get("eta", 0) <= 1:
            raise InputError(f"eta is {options['eta']}, expected 0 to 1")
        return options

    def _table(self, grid: Grid, options: Mapping[str, Any], begin: int) -> Table:
        if not 0 <= begin < len(grid.timesteps):
            raise InputError(f"begin is {begin}, expected 0 to {len(grid.timesteps) - 1} for this number of steps")
        if self.order > 1 and begin % self.order:
            raise InputError(
                f"begin is {begin}, which lies inside a step of {type(self).__name__}; give a multiple of {self.order}"
            )
        table = self.solve(grid.begin(begin) if begin else grid, **self._options(options))
        table.fused  # noqa: B018  (made here, not in the first step)
        return table

    # ---- diffusers' face -----------------------------------------------------------------------------------------

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
