"""What all schedulers share: a checked configuration, the pure `table`, and diffusers' stateful face on top of it."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from anamorph.config import Config, complete
from anamorph.errors import ConfigError, InputError
from anamorph.files import replacing
from anamorph.schedulers.arrays import Array, cast, coefficients, draw, numbers, widen
from anamorph.schedulers.grids import FAMILIES, Grid
from anamorph.schedulers.keys import COMPATIBLE, FAMILY
from anamorph.schedulers.noise import alphas_bar
from anamorph.schedulers.registry import FILE, SCHEDULERS, read_config
from anamorph.schedulers.table import History, Table, advance, estimate

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
"""Defaults of the keys that describe the training schedule."""

SPACINGS = ("linspace", "leading", "trailing")
CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class StepOutput:
    """The next sample, and the estimate of the clean one (None for solvers that never form it)."""

    prev_sample: Array
    pred_original_sample: Array | None


class Scheduler:
    """A noise schedule and a solver, described by diffusers' configuration keys.

    A subclass states `DEFAULTS` (diffusers' keys and defaults), `ONLY` (key -> the values it serves), which calls it
    takes (`ETA`, `TIMESTEPS`, `SIGMAS`), `STATELESS` (a step depends on its timestep alone), `TRANSLATE` (values of
    other classes' vocabulary that `from_config` replaces), and writes `plan` and `solve`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    TRANSLATE: ClassVar[Mapping[tuple[str, str], str]] = {}
    ETA: ClassVar[bool] = False
    TIMESTEPS: ClassVar[bool] = False
    SIGMAS: ClassVar[bool] = False
    STATELESS: ClassVar[bool] = False
    order: ClassVar[int] = 1

    def __init__(self, **config: Any) -> None:
        self.config = self.complete(config)
        self.alphas_cumprod = alphas_bar(self.config)
        self.alphas_cumprod.flags.writeable = False
        self.num_inference_steps: int | None = None
        self._reset(None)

    # ---- configuration -------------------------------------------------------------------------------------------

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        """The full configuration; foreign keys of other scheduler classes are kept.

        Raises ConfigError: a key that no scheduler knows, a value that this class does not serve, or two at odds.
        """
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in config.items()}
        defaulted = sorted(key for key in cls.DEFAULTS if key not in plain)
        full = complete(cls.__name__, {**plain, "_use_default_values": defaulted}, cls.DEFAULTS, FAMILY)
        for key, allowed in cls.ONLY.items():
            if full[key] not in allowed:
                raise ConfigError(
                    f"{cls.__name__} does not serve {key}={full[key]!r}; it serves {', '.join(map(repr, allowed))}"
                )
        steps = full["num_train_timesteps"]
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"{cls.__name__}: num_train_timesteps={steps!r}, expected a whole number from 1")
        chosen = [key for key in FAMILIES if key in cls.DEFAULTS and full[key]]
        if len(chosen) > 1:
            raise ConfigError(f"{cls.__name__}: {' and '.join(chosen)} exclude each other; turn on at most one of them")
        return full

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a configuration, also another class's; `overrides` replace single keys.

        Keys that the other class had merely filled in with its defaults (`_use_default_values`) take this class's.
        Values in `TRANSLATE`, which only other classes know, become the nearest of this class, as in diffusers.
        """
        defaulted = config.get("_use_default_values", ())
        given = {key: value for key, value in config.items() if key not in defaulted and key != "_use_default_values"}
        for (key, foreign), own in cls.TRANSLATE.items():
            if given.get(key) == foreign:
                given[key] = own
        return cls(**{**given, **overrides})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> Self:
        """Read `scheduler_config.json` of a folder, whichever class wrote it."""
        return cls.from_config(read_config(folder, subfolder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` as diffusers does: sorted keys, `_class_name`, foreign keys kept."""
        stored = Config({key: value for key, value in self.config.items() if key != "_use_default_values"})
        with replacing(Path(folder) / FILE) as draft:
            draft.write_text(stored.to_json(), encoding="utf-8")

    @property
    def compatibles(self) -> list[type["Scheduler"]]:
        """The classes that `from_config` may take this configuration to."""
        return [SCHEDULERS[name] for name in COMPATIBLE if name in SCHEDULERS]

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def __repr__(self) -> str:
        changed = (f"{key}={self.config[key]!r}" for key, value in self.DEFAULTS.items() if self.config[key] != value)
        return f"{type(self).__name__}({', '.join(changed)})"

    # ---- the pure core -------------------------------------------------------------------------------------------

    def plan(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
        """The grid for a checked request: exactly one argument is not None."""
        raise NotImplementedError

    def solve(self, grid: Grid, eta: float) -> Table:
        """The table of a grid; coefficients in float64."""
        raise NotImplementedError

    def table(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        begin: int = 0,
    ) -> Table:
        """Everything that a run needs, as plain numbers; this object stays unchanged, so threads may share it.

        Give the number of steps, or your own `timesteps` or `sigmas` where the class takes them. `eta` in 0..1 scales
        the noise of DDIM. `begin` leaves out the first steps (image-to-image); solvers with a history start afresh.
        Raises InputError: an argument out of range, missing, doubled, or unknown to this class.
        """
        return self._table(self._grid(num_inference_steps, timesteps, sigmas), eta, begin)

    def _grid(self, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Grid:
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
        return self.plan(steps, timesteps, sigmas)

    def _table(self, grid: Grid, eta: float, begin: int) -> Table:
        if eta and not self.ETA:
            raise InputError(f"{type(self).__name__} has no eta, got {eta}; leave it at 0 or use DDIMScheduler")
        if not 0 <= eta <= 1:
            raise InputError(f"eta is {eta}, expected 0 to 1")
        if not 0 <= begin < len(grid.timesteps):
            raise InputError(f"begin is {begin}, expected 0 to {len(grid.timesteps) - 1} for this number of steps")
        return self.solve(grid.begin(begin), float(eta))

    # ---- diffusers' face -----------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: object = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Prepare a run; see `table` for the arguments and errors.

        `device` is accepted for diffusers' sake: timesteps are NumPy numbers, which serve every device alike.
        """
        del device
        grid = self._grid(num_inference_steps, timesteps, sigmas)
        self._table(grid, 0.0, 0)
        self.num_inference_steps = grid.steps
        self._reset(grid)

    def _reset(self, grid: Grid | None) -> None:
        self._planned = grid
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._first = 0
        self._history: History = ()
        self._tables: dict[float, Table] = {}

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

    def _levels(self) -> Grid:
        return self.idle() if self._planned is None else self._planned

    def idle(self) -> Grid:
        """The grid of all training timesteps, which holds before `set_timesteps`."""
        raise NotImplementedError

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` was given."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this position in `timesteps` (image-to-image); call it before the first step."""
        self._begin_index = begin_index

    def _position(self, timestep: float) -> int:
        found = np.flatnonzero(self._levels().timesteps == timestep)
        if not found.size:
            raise InputError(f"timestep {timestep:g} is none of this run's; pass one of `scheduler.timesteps`")
        # Where a timestep occurs twice, image-to-image means its second call; a run from the start means its first.
        return int(found[1] if found.size > 1 and found[0] else found[0])

    def _locate(self, timestep: float) -> int:
        """Position of the call at hand; fixes where the run begins when this is its first."""
        grid = self._levels()
        index = self._step_index
        if self.STATELESS:
            index = self._position(timestep)
        elif index is None:
            index = self._position(timestep) if self._begin_index is None else self._begin_index
            self._first, self._history, self._tables = index, (), {}
        if index >= len(grid.timesteps):
            raise InputError(f"all {len(grid.timesteps)} steps are done; call set_timesteps before the next run")
        expected = float(grid.timesteps[index])
        if timestep != expected:
            raise InputError(
                f"step {index} belongs to timestep {expected:g}, got {timestep:g}; go through "
                f"`scheduler.timesteps` in order, after set_begin_index when the run starts later"
            )
        self._step_index = index
        return index

    def _current(self, eta: float) -> Table:
        grid = self._require_steps()
        if eta not in self._tables:
            self._tables[eta] = self._table(grid, eta, self._first)
        return self._tables[eta]

    def _require_steps(self) -> Grid:
        if self._planned is None:
            raise InputError(f"{type(self).__name__} has no steps yet; call set_timesteps first")
        return self._planned

    def scale_model_input(self, sample: Array, timestep: Any) -> Array:
        """What the model receives for `sample`: scale x, of the same shape and type."""
        if self.STATELESS:
            return sample
        self._require_steps()
        (value,) = numbers(timestep)
        index = self._locate(value)
        scale = self._current(0.0).rows[index - self._first].scale
        return sample if scale == 1.0 else cast(scale * widen(sample), sample)

    def step(
        self,
        model_output: Array,
        timestep: Any,
        sample: Array,
        *,
        eta: float = 0.0,
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
        (value,) = numbers(timestep)
        self._require_steps()
        index = self._locate(value)
        table = self._current(float(eta))
        n = index - self._first
        noise = variance_noise
        if noise is None and table.rows[n].draws:
            noise = draw(model_output, generator)
        x, out = widen(sample), widen(model_output)
        result, self._history = advance(table, n, x, out, self._history, None if noise is None else widen(noise))
        self._step_index = index + 1
        clean = None
        if table.estimates_clean:
            raw = estimate(table, n, x, out)
            clean = cast(raw if table.clip is None else table.clip(raw), model_output)
        output = StepOutput(cast(result, model_output), clean)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Any) -> Array:
        """alpha x_0 + sigma noise at the level of each image's timestep; timesteps has shape (batch,) or ()."""
        alpha, sigma = self._noise_levels(numbers(timesteps))
        return coefficients(alpha, original_samples) * original_samples + coefficients(sigma, noise) * noise

    def _noise_levels(self, timesteps: Sequence[float]) -> tuple[list[float], list[float]]:
        """alpha and sigma of each timestep, looked up in the run's grid."""
        grid = self._levels()
        if self._begin_index is None:
            where = [self._position(timestep) for timestep in timesteps]
        else:
            where = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        return grid.alpha[where].tolist(), grid.sigma[where].tolist()
