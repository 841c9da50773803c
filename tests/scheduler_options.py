"""What the sweep draws from: for every class, the values of its options, and the combinations that are left out."""

import itertools
from typing import Any

from anamorph.schedulers import SCHEDULERS, Table

Config = dict[str, Any]
Options = dict[str, tuple[Any, ...]]

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = [0.0001 + (0.02 - 0.0001) * i / 999 for i in range(1000)]
ON_OFF = (False, True)

SCHEDULE: Options = {
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "beta_start": (0.00085, 0.0001),
    "trained_betas": (None, None, None, BETAS),
}
PREDICTION: Options = {"prediction_type": ("epsilon", "v_prediction", "sample")}
NO_SAMPLE: Options = {"prediction_type": ("epsilon", "v_prediction")}
SPACING: Options = {"timestep_spacing": ("linspace", "leading", "trailing"), "steps_offset": (0, 1)}
ZERO_SNR: Options = {"rescale_betas_zero_snr": (False, False, True)}
THRESHOLDS: Options = {
    "thresholding": (False, False, True),
    "dynamic_thresholding_ratio": (0.995, 0.7),
    "sample_max_value": (1.0, 2.0),
}
CLIPS: Options = {"clip_sample": ON_OFF, "clip_sample_range": (1.0, 2.5)}
FAMILY: Options = {
    "use_karras_sigmas": (False, False, True),
    "use_exponential_sigmas": (False, False, True),
    "use_beta_sigmas": (False, False, True),
}
FINAL: Options = {"final_sigmas_type": ("zero", "sigma_min")}
FLOW: Options = {"use_flow_sigmas": (False, False, True), "flow_shift": (1.0, 3.0)}
FLOW_PREDICTION: Options = {"prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction")}
LOG_SNR: Options = {**SCHEDULE, **FLOW_PREDICTION, **SPACING, **THRESHOLDS, **FAMILY, **FLOW}
CLIPPED: Options = {"lambda_min_clipped": (-float("inf"), -5.1)}
VARIANCE: Options = {"variance_type": (None, None, "learned_range")}
K_DIFFUSION: Options = {
    **SCHEDULE, **NO_SAMPLE, **SPACING, **FAMILY,
    "num_train_timesteps": (100,),  # diffusers plans as many steps when it is built, one by one
}  # fmt: skip
DISTILLED: Options = {
    **SCHEDULE, **PREDICTION, **ZERO_SNR, "original_inference_steps": (50, 100), "timestep_scaling": (10.0, 3.0),
}  # fmt: skip
PRECONDITIONED: Options = {
    "sigma_min": (0.002, 0.1), "sigma_max": (80.0, 10.0), "sigma_data": (0.5, 1.0), "rho": (7.0, 3.0),
    "sigma_schedule": ("karras", "exponential"), **NO_SAMPLE, **FINAL,
}  # fmt: skip

OPTIONS: dict[str, Options] = {
    "CMStochasticIterativeScheduler": {
        "sigma_max": (80.0, 20.0), "sigma_data": (0.5, 1.0), "s_noise": (1.0, 0.9), "rho": (7.0, 5.0),
        "clip_denoised": ON_OFF, "num_train_timesteps": (40, 201),
    },
    "DDIMInverseScheduler": {
        **SCHEDULE, **PREDICTION, **CLIPS, **ZERO_SNR, "set_alpha_to_one": ON_OFF, "steps_offset": (0, 1),
        "timestep_spacing": ("leading", "trailing"),
    },
    "DDIMScheduler": {
        **SCHEDULE, **PREDICTION, **CLIPS, **THRESHOLDS, **SPACING, **ZERO_SNR, "set_alpha_to_one": ON_OFF,
    },
    "DDPMScheduler": {
        **SCHEDULE, **PREDICTION, **CLIPS, **THRESHOLDS, **SPACING, **ZERO_SNR,
        "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"),
    },
    "DEISMultistepScheduler": {**LOG_SNR, "solver_order": (2, 1, 3), "lower_order_final": ON_OFF},
    "DPMSolverMultistepInverseScheduler": {
        **LOG_SNR, **CLIPPED, **VARIANCE, "solver_order": (2, 1, 3), "solver_type": ("midpoint", "heun"),
        "algorithm_type": ("dpmsolver++", "dpmsolver"), "lower_order_final": ON_OFF, "euler_at_final": ON_OFF,
        "use_flow_sigmas": (False,), "prediction_type": PREDICTION["prediction_type"],
    },
    "DPMSolverMultistepScheduler": {
        **LOG_SNR, **CLIPPED, **VARIANCE, **FINAL, **ZERO_SNR, "solver_order": (2, 1, 3),
        "solver_type": ("midpoint", "heun"), "lower_order_final": ON_OFF, "euler_at_final": ON_OFF,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "use_lu_lambdas": (False, False, True),
    },
    "DPMSolverSDEScheduler": K_DIFFUSION,
    "DPMSolverSinglestepScheduler": {
        **LOG_SNR, **CLIPPED, **VARIANCE, **FINAL, "solver_order": (2, 1, 3), "solver_type": ("midpoint", "heun"),
        "lower_order_final": ON_OFF, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
    },
    "EDMDPMSolverMultistepScheduler": {
        **PRECONDITIONED, **THRESHOLDS, "solver_order": (2, 1, 3), "solver_type": ("midpoint", "heun"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"), "lower_order_final": ON_OFF, "euler_at_final": ON_OFF,
    },
    "EDMEulerScheduler": PRECONDITIONED,
    "EulerAncestralDiscreteScheduler": {**SCHEDULE, **NO_SAMPLE, **SPACING, **ZERO_SNR},
    "EulerDiscreteScheduler": {
        **K_DIFFUSION, **PREDICTION, **ZERO_SNR, **FINAL, "interpolation_type": ("linear", "linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"), "sigma_min": (None, 0.05), "sigma_max": (None, 12.0),
    },
    "FlowMatchEulerDiscreteScheduler": {
        **FAMILY, "shift": (1.0, 3.0), "use_dynamic_shifting": ON_OFF, "time_shift_type": ("exponential", "linear"),
        "shift_terminal": (None, 0.02), "invert_sigmas": (False, False, True), "stochastic_sampling": ON_OFF,
    },
    "FlowMatchHeunDiscreteScheduler": {"shift": (1.0, 3.0), "num_train_timesteps": (1000, 100)},
    "HeunDiscreteScheduler": {
        **K_DIFFUSION, **PREDICTION, **CLIPS, "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2", "exp"),
    },
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": K_DIFFUSION,
    "KDPM2DiscreteScheduler": K_DIFFUSION,
    "LCMScheduler": {**DISTILLED, **CLIPS, **THRESHOLDS},
    "LMSDiscreteScheduler": {**K_DIFFUSION, **PREDICTION},
    "PNDMScheduler": {**SCHEDULE, **NO_SAMPLE, **SPACING, "skip_prk_steps": ON_OFF, "set_alpha_to_one": ON_OFF},
    "SASolverScheduler": {
        **LOG_SNR, **CLIPPED, **VARIANCE, "predictor_order": (2, 1, 3, 4), "corrector_order": (2, 1, 3, 4),
        "algorithm_type": ("data_prediction", "noise_prediction"), "lower_order_final": ON_OFF,
    },
    "TCDScheduler": DISTILLED,
    "UniPCMultistepScheduler": {
        **LOG_SNR, **FINAL, **ZERO_SNR, "solver_order": (2, 1, 3), "predict_x0": (True, True, False),
        "solver_type": ("bh2", "bh1"), "lower_order_final": ON_OFF, "disable_corrector": ((), (0, 2)),
        "shift_terminal": (None, 0.02), "sigma_min": (None, 0.05), "sigma_max": (None, 12.0),
    },
}  # fmt: skip

STATELESS = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler")
"""Classes of diffusers without `set_begin_index`: a run that starts late passes fewer timesteps."""

FAMILIES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


def mended(name: str, drawn: Config) -> Config:
    """A draw without the combinations that are refused: `test_schedulers_config` says what each of them answers."""
    keys = SCHEDULERS[name].DEFAULTS
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in drawn.items() if key in keys and v is not None}
    if config.get("num_train_timesteps", 1000) != 1000:
        config.pop("trained_betas", None)
    for extra in [key for key in FAMILIES if config.get(key)][1:]:
        config[extra] = False
    if "use_flow_sigmas" in config:
        kinds = ("epsilon", "sample", "flow_prediction") if config["use_flow_sigmas"] else PREDICTION["prediction_type"]
        if config["prediction_type"] not in kinds:
            config["prediction_type"] = kinds[-1]
    if config.get("variance_type") == "learned_range" and name != "DDPMScheduler":
        config |= {"prediction_type": "epsilon"}  # diffusers splits the output of no other kind
    algorithm = config.get("algorithm_type", "")
    if algorithm in ("dpmsolver", "sde-dpmsolver", "noise_prediction") or not config.get("predict_x0", True):
        if "final_sigmas_type" in config:
            config["final_sigmas_type"] = "sigma_min"
        if name != "DPMSolverMultistepScheduler":
            config["thresholding"] = False
        if config.get("prediction_type") == "flow_prediction":
            config["prediction_type"] = "epsilon"
    if (
        algorithm.startswith("sde-")
        and name != "DPMSolverSinglestepScheduler"
        and algorithm + name != ("sde-dpmsolver++DPMSolverMultistepScheduler")
    ):
        config["solver_order"] = min(config["solver_order"], 2)
    if name == "UniPCMultistepScheduler":
        if config["final_sigmas_type"] == "zero" or any(config[key] for key in FAMILIES if key in config):
            config["lower_order_final"] = True
        if config["solver_type"] == "bh1":
            config["final_sigmas_type"] = "sigma_min"  # diffusers multiplies 0 by infinity
        if not config["use_flow_sigmas"]:
            config["shift_terminal"] = None
    if config.get("final_sigmas_type") == "sigma_min" and "euler_at_final" in config:
        config["euler_at_final"] = True  # families end there already, and diffusers divides by a step of length zero
    if name == "DDIMInverseScheduler" and config["prediction_type"] == "sample":
        config["set_alpha_to_one"] = False  # its first level would have no noise
    if name == "SASolverScheduler":
        config.pop("variance_type", None)  # diffusers draws noise for the variance, too
    if name == "DPMSolverMultistepInverseScheduler":
        config["euler_at_final"] = True  # diffusers divides by the last step, whose length is often zero
    return config


def left_out(name: str, config: Config, steps: int, begin: int, table: Table) -> str | None:
    """Why a combination that both sides run is not compared; each is a fault of diffusers that is not copied."""
    if name == "LMSDiscreteScheduler" and begin:
        return "a run that starts late takes weights of a full history although it has none"
    told_sigma = config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction"
    if told_sigma and config["interpolation_type"] == "log_linear":
        return "there is one timestep more than steps"
    if name == "DPMSolverMultistepInverseScheduler" and len(set(table.timesteps.tolist())) < len(table):
        return "timesteps that occur twice are dropped, but not their levels"
    if name in ("KDPM2AncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        levels = table.sigmas[table.sigmas > 0]
        if len(levels) > 1 and min(b / a for a, b in itertools.pairwise(levels)) < 0.1:
            return "sigma_down is the root of a difference of nearly equal float32 numbers, sometimes a negative one"
    if config.get("shift_terminal") and steps == 1:
        return "a single level of 1 is divided by its distance to 1"
    return None
