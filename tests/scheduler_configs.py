"""Configurations in which schedulers are compared with diffusers."""

from typing import Any

import numpy as np

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
ZERO = {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
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
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        {**SD, "use_lu_lambdas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        ZERO,
    ],
}


def label(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(str(v) for k, v in value.items() if k not in SD and k != "trained_betas") or "-"
    return None
