"""Configurations of schedulers: completed, checked, and carried from one class to another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anamorph.config import Config, complete
from anamorph.errors import ConfigError
from anamorph.schedulers.grids import FAMILIES
from anamorph.schedulers.keys import FAMILY
from anamorph.schedulers.table import Clip, Threshold

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
"""Defaults of the keys that describe the training schedule."""

K_NOISE = {**NOISE, "beta_start": 0.00085, "beta_end": 0.012}
"""The same for the classes that came from k-diffusion."""

THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
"""Defaults of dynamic thresholding."""

LEADING = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {**LEADING, "timestep_spacing": "linspace"}
"""Defaults of the prediction and of the way that timesteps are placed."""

SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
"""Defaults of the switches between families of noise levels."""

CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
NO_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
"""What classes serve that cannot work on a prediction of the clean sample."""

CHOICES = {
    "beta_schedule": CURVES,
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "noise_sampler_seed": (None,),
    "prediction_type": PREDICTIONS,
    "sigma_schedule": ("karras", "exponential"),
    "solver_order": (1, 2, 3),
    "solver_p": (None,),
    "solver_type": ("midpoint", "heun"),
    "time_shift_type": ("exponential", "linear"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "variance_type": (None, "learned", "learned_range"),
}
"""The values that a key may have in every class that does not say otherwise."""


Conflict = Mapping[str, tuple[Any, ...]]
"""Keys whose values must not come together."""


def completed(
    name: str,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    only: Mapping[str, tuple[Any, ...]],
    conflicts: Sequence[Conflict],
) -> Config:
    """The full configuration of class `name`; foreign keys of other scheduler classes are kept.

    Raises ConfigError: a key that no scheduler knows, a value outside `only` or else CHOICES, two families of
    noise levels, or one of `conflicts`.
    """
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in given.items()}
    if plain.get("predict_epsilon") is False:  # how files from before diffusers 0.9 say it
        plain.setdefault("prediction_type", "sample")
    defaulted = sorted(key for key in defaults if key not in plain)
    full = complete(name, {**plain, "_use_default_values": defaulted}, defaults, FAMILY)
    for key, allowed in {**CHOICES, **only}.items():
        if key in defaults and full[key] not in allowed:
            raise ConfigError(f"{name} does not serve {key}={full[key]!r}; it serves {', '.join(map(repr, allowed))}")
    steps = full["num_train_timesteps"]
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{name}: num_train_timesteps={steps!r}, expected a whole number from 1")
    chosen = [key for key in FAMILIES if key in defaults and full[key]]
    if len(chosen) > 1:
        raise ConfigError(f"{name}: {' and '.join(chosen)} exclude each other; turn on at most one of them")
    for conflict in conflicts:
        if all(key in defaults and full[key] in values for key, values in conflict.items()):
            culprits = " cannot go with ".join(f"{key}={full[key]!r}" for key in conflict)
            raise ConfigError(f"{name}: {culprits}; change one of them")
    return full


def carried(
    config: Mapping[str, Any], overrides: Mapping[str, Any], translate: Mapping[tuple[str, Any], Any]
) -> dict[str, Any]:
    """What one class takes over from another's configuration.

    Keys that the other class had merely filled in with its defaults (`_use_default_values`) are left out. Values in
    `translate`, which only other classes know, become the nearest of this class, as in diffusers.
    """
    defaulted = config.get("_use_default_values", ())
    given = {key: value for key, value in config.items() if key not in defaulted and key != "_use_default_values"}
    for (key, foreign), own in translate.items():
        if key in given and given[key] == foreign:
            given[key] = own
    return {**given, **overrides}


def stored(config: Config) -> str:
    """The text of `scheduler_config.json`.

    Raises ConfigError: a value is a function, which no file can hold.
    """
    for key, value in config.items():
        if callable(value):
            raise ConfigError(f"{key} is a function, which no file can hold; save the scheduler with {key}=None")
    return Config({key: value for key, value in config.items() if key != "_use_default_values"}).to_json()


def clip_of(config: Config) -> Clip | Threshold | None:
    """What the configuration does to the estimate of the clean sample."""
    if config.get("thresholding"):
        return Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return Clip(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
