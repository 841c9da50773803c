"""Every scheduler against diffusers: the same timesteps, and the same sample after every step."""

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from anamorph.schedulers import SCHEDULERS, Table, advance

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
ZERO = {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SHAPE = (2, 4, 8, 8)
TOLERANCE = 1e-5

PIXEL = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": [
        {},
        {**SD, "clip_sample": False},
        {**SD, **V, "clip_sample": False, "timestep_spacing": "trailing"},
        {**SD, "prediction_type": "sample", "clip_sample_range": 2.0, "timestep_spacing": "linspace"},
        {**SD, "variance_type": "fixed_large", "steps_offset": 1, "clip_sample": False},
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "clip_sample": False},
        {"beta_schedule": "laplace", "clip_sample": False},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist(), **PIXEL},
        {**ZERO, "clip_sample": False},
    ],
    "DDIMScheduler": [
        {},
        {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {**SD, **V, "clip_sample": False, "timestep_spacing": "trailing"},
        {**SD, **V, "clip_sample_range": 1.5, "timestep_spacing": "linspace"},
        {**SD, "prediction_type": "sample", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2", **PIXEL},
        {**ZERO, "clip_sample": False},
        {"num_train_timesteps": 100, "beta_end": 0.1, "clip_sample": False},
    ],
    "PNDMScheduler": [
        {**SD, "skip_prk_steps": True, "steps_offset": 1},
        {**SD, **V, "skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
        {**SD, "skip_prk_steps": True, "timestep_spacing": "linspace"},
        {**SD},
        {**SD, **V, "set_alpha_to_one": True},
        {"timestep_spacing": "trailing"},
    ],
    "EulerDiscreteScheduler": [
        {},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, **V, "timestep_spacing": "trailing"},
        {**SD, "prediction_type": "sample"},
        {**SD, "use_karras_sigmas": True},
        {**SD, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
        {**SD, "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
        {**SD, "use_beta_sigmas": True},
        {**SD, **V, "timestep_type": "continuous", "use_karras_sigmas": True},
        ZERO,
    ],
    "EulerAncestralDiscreteScheduler": [
        {},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, **V, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2"},
        ZERO,
    ],
    "DPMSolverMultistepScheduler": [
        {},
        SD,
        {**SD, "solver_order": 1},
        {**SD, "solver_type": "heun"},
        {**SD, "solver_order": 3},
        {**SD, **V, "timestep_spacing": "trailing", "euler_at_final": True},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, "use_karras_sigmas": True, "lower_order_final": False},
        {**SD, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {**SD, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {**SD, "use_exponential_sigmas": True},
        {**SD, "use_beta_sigmas": True},
        {**SD, "use_lu_lambdas": True},
        {**SD, "prediction_type": "sample", **PIXEL},
        {"beta_schedule": "squaredcos_cap_v2", **V, "lambda_min_clipped": -5.1, "use_karras_sigmas": True},
        {**SD, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {**SD, **V, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {**SD, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        ZERO,
    ],
}
STEPS = (1, 2, 3, 5, 20, 50)


def label(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(str(v) for k, v in value.items() if k not in SD and k != "trained_betas") or "-"
    return None


CASES = [(name, config, steps) for name, configs in CONFIGS.items() for config in configs for steps in STEPS]


def served(name: str, config: dict[str, Any], steps: int) -> bool:
    """Whether diffusers itself runs this combination."""
    if name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        return steps >= 4  # its Runge-Kutta warm-up takes three whole steps
    return True


def tolerance(name: str, config: dict[str, Any]) -> float:
    """1e-5; where samples begin at sigma = 4096, the rounding of their last bit in the reference, 4096 x 2^-23."""
    return 4096 * 2**-23 if config is ZERO and name.startswith("Euler") else TOLERANCE


def reference(name: str, config: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**config)


def model_outputs(count: int) -> torch.Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(1))


def start(scheduler: Any) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * float(scheduler.init_noise_sigma)


def run_reference(theirs: Any, timesteps: Any, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    takes = theirs.step.__code__.co_varnames
    if "generator" in takes:
        options["generator"] = generator
    samples = []
    for out, t in zip(model_outputs(len(timesteps)), timesteps, strict=True):
        theirs.scale_model_input(x, t)  # it finds its place there
        x = theirs.step(out, t, x, **options).prev_sample
        samples.append(x)
    return samples


def run_face(ours: Any, timesteps: Any, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    samples = []
    for out, t in zip(model_outputs(len(timesteps)), timesteps, strict=True):
        x = ours.step(out, t, x, generator=generator, **options).prev_sample
        samples.append(x)
    return samples


def run_table(table: Table, x: Any, convert: Any = lambda tensor: tensor) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    history: tuple[Any, ...] = ()
    samples = []
    for n, out in enumerate(model_outputs(len(table))):
        noise = convert(torch.randn(SHAPE, generator=generator)) if table.rows[n].draws else None
        x, history = advance(table, n, x, convert(out), history, noise)
        samples.append(x)
    return samples


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "config", "steps"), [case for case in CASES if served(*case)], ids=label)
def test_matches_diffusers_after_every_step(name: str, config: dict[str, Any], steps: int) -> None:
    theirs, ours = reference(name, config), SCHEDULERS[name](**config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    table = ours.table(steps)
    # Fractional timesteps may differ in the last bit: torch.sqrt is not correctly rounded on every machine.
    whole = table.timesteps.dtype == np.int64
    np.testing.assert_allclose(
        table.timesteps, theirs.timesteps.numpy(), rtol=0 if whole else 1e-6, atol=0 if whole else 1e-7
    )
    assert table.timesteps.dtype == theirs.timesteps.numpy().dtype
    if name not in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        theirs.set_begin_index(0)  # it would start at the second call where rounding makes the first two equal
    x = start(theirs)
    assert table.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    expected = run_reference(theirs, theirs.timesteps, x)
    assert worst(run_face(ours, ours.timesteps, x), expected) <= tolerance(name, config)
    assert worst(run_table(table, x), expected) <= tolerance(name, config)
