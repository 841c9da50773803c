"""What schedulers are made of: a checked configuration and the pure `table` that follows from it."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.hub import HubOptions, find_component
from anamorph.schedulers.configuration import Conflict, carried, clip_of, completed, stored
from anamorph.schedulers.grids import F64, Grid, Request
from anamorph.schedulers.keys import COMPATIBLE
from anamorph.schedulers.noise import F32, alphas_bar, finite_sigmas
from anamorph.schedulers.registry import FILE, SCHEDULERS, read_config
from anamorph.schedulers.solvers import Columns, Terms, rows_of, to_clean
from anamorph.schedulers.table import Clip, Table, Threshold

FURTHER = tuple(field.name for field in fields(Request))[4:]
"""What a run may be asked for, beside the arguments that `table` and `set_timesteps` spell out."""

INSTEAD = {
    "num_train_timesteps": "it belongs to the configuration, with which the noise schedule agrees",
    "strength": "give `begin` or call set_begin_index",
    "original_inference_steps": "only distilled models have such",
}
"""What to do instead, where a class does not take an argument of `Request`."""


class Recipe:
    """A noise schedule and a solver, described by diffusers' configuration keys.

    A subclass states `DEFAULTS` (diffusers' keys and defaults), `ONLY` (key -> the values it serves), `CONFLICTS`
    (values that must not come together), what a run of it takes beside the number of steps (`TAKES`) and what its
    steps take (`OPTIONS`, with defaults), `TRANSLATE` (values of other classes' vocabulary that `from_config`
    replaces), `order` (model calls per step), `SUMMARY` (when to use it), and writes `plan` and `solve`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    CONFLICTS: ClassVar[tuple[Conflict, ...]] = ()
    TRANSLATE: ClassVar[Mapping[tuple[str, Any], Any]] = {}
    SUMMARY: ClassVar[str]
    TAKES: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar[Mapping[str, float]] = {}
    order: ClassVar[int] = 1

    def __init__(self, **config: Any) -> None:
        self.config = self.complete(config)
        self.own = Config({key: self.config[key] for key in self.DEFAULTS})  # without the foreign keys
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
    def compatibles(self) -> list[type["Recipe"]]:
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
