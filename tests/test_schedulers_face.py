"""What the methods of every class take, beside diffusers' signatures, and what those arguments do."""

import inspect
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scheduler_runs import TOLERANCE, first_sample, model_outputs, ours, quiet, run_face, run_table, run_theirs, worst
from scheduler_runs import theirs as reference

from anamorph.errors import InputError
from anamorph.schedulers import SCHEDULERS, FlowMatchEulerDiscreteScheduler, Scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
CHURN = {"s_churn": 6.0, "s_tmin": 0.3, "s_tmax": 12.0, "s_noise": 1.1}

REFUSED = {"num_train_timesteps": "it belongs to the configuration"}
"""Arguments of set_timesteps that are an error, and why."""

INNER = {
    "convert_model_output", "deis_first_order_update", "dpm_solver_first_order_update", "get_coefficients_fn",
    "get_coefficients_exponential_negative", "get_coefficients_exponential_positive", "get_lms_coefficient",
    "get_order_list", "get_scalings", "get_scalings_for_boundary_condition", "lagrange_polynomial_coefficient",
    "get_scalings_for_boundary_condition_discrete", "multistep_deis_second_order_update", "precondition_inputs",
    "multistep_deis_third_order_update", "multistep_dpm_solver_second_order_update", "precondition_noise",
    "multistep_dpm_solver_third_order_update", "multistep_uni_c_bh_update", "multistep_uni_p_bh_update",
    "precondition_outputs", "sigma_to_t", "singlestep_dpm_solver_second_order_update", "step_plms", "step_prk",
    "singlestep_dpm_solver_third_order_update", "singlestep_dpm_solver_update", "stochastic_adams_bashforth_update",
    "stochastic_adams_moulton_update", "stretch_shift_to_terminal", "time_shift",
}  # fmt: skip
"""Parts of diffusers' steps and grids: here they are numbers of a table, which `table` shows."""

CONFIGURATION = set(dir(diffusers.SchedulerMixin)) | set(dir(diffusers.ConfigMixin))


def parameters(method: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(method).parameters)
    return {name: value for name, value in found.items() if name not in ("self", "args", "kwargs")}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_argument_of_diffusers_is_taken(name: str) -> None:
    kind, their = SCHEDULERS[name], getattr(diffusers, name)
    own = parameters(Scheduler.step) | parameters(kind.step)
    for key, value in parameters(their.step).items():
        assert key in own or key in kind.OPTIONS or key in kind.INPUTS, key
        if key in kind.OPTIONS:
            assert kind.OPTIONS[key] == value.default, key
    own = parameters(kind.set_timesteps)
    for key in parameters(their.set_timesteps):
        if key in REFUSED:
            with pytest.raises(InputError, match=f"takes no {key}; {REFUSED[key]}"):
                kind().set_timesteps(5, **{key: 500})
        else:
            assert key in own or key in kind.TAKES, key
            assert key not in ("timesteps", "sigmas") or key in kind.TAKES, key


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_method_of_diffusers_is_there(name: str) -> None:
    wanted = {key for key in dir(getattr(diffusers, name)) if not key.startswith("_")} - CONFIGURATION - INNER
    assert {"set_timesteps", "step"} <= wanted
    assert sorted(key for key in wanted if not hasattr(SCHEDULERS[name](), key)) == []


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"RePaintScheduler", "DPMSolverSDEScheduler"}))
def test_tuples_are_as_long_as_those_of_diffusers(name: str) -> None:
    config = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    lengths = []
    for scheduler in (ours(name, config), reference(name, config)):
        scheduler.set_timesteps(5)
        x, (out,) = first_sample(1.0), model_outputs(1)
        with quiet():
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, scheduler.timesteps[0])
            lengths.append(len(scheduler.step(out, scheduler.timesteps[0], x, return_dict=False)))
    assert lengths[0] == lengths[1]


def check(name: str, config: dict[str, Any], steps: int = 6, request: Any = None, **options: Any) -> list[Any]:
    """Our face and our table against diffusers', with the same arguments; the samples."""
    their, own = reference(name, config), ours(name, config)
    request = {"num_inference_steps": steps} if request is None else request
    with quiet():
        their.set_timesteps(**request)
    own.set_timesteps(**{key: value.tolist() if torch.is_tensor(value) else value for key, value in request.items()})
    np.testing.assert_allclose(own.timesteps, their.timesteps.numpy(), rtol=3e-6, atol=1e-6)
    if hasattr(their, "set_begin_index"):
        their.set_begin_index(0)
    table = own.table(**{key: value.tolist() if torch.is_tensor(value) else value for key, value in request.items()},
                      **{key: value for key, value in options.items() if key in own.OPTIONS})  # fmt: skip
    x, outs = first_sample(float(own.init_noise_sigma)), model_outputs(len(own.timesteps))
    expected = run_theirs(their, their.timesteps, x, outs, table, **options)
    found = run_face(own, own.timesteps, x, outs, **options)
    assert worst(found, expected) <= TOLERANCE
    assert worst(run_table(table, x, outs), found) <= 1e-6
    return found


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", SD),
        ("EulerDiscreteScheduler", {**SD, **V}),
        ("EDMEulerScheduler", {}),
        ("EDMEulerScheduler", V),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_churn_matches_diffusers(name: str, config: dict[str, Any]) -> None:
    churn = {**CHURN, "s_tmax": 0.8} if name.startswith("Flow") else CHURN
    assert worst(check(name, config, **churn), check(name, config)) > 0.01


def test_clean_estimate_sees_the_churned_sample() -> None:
    their, own = reference("EulerDiscreteScheduler", SD), ours("EulerDiscreteScheduler", SD)
    found = []
    for scheduler in (their, own):
        scheduler.set_timesteps(6)
        x, (out,), t = first_sample(14.0), model_outputs(1), scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        step = scheduler.step(out, t, x, s_churn=2.0, generator=torch.Generator().manual_seed(7))
        found.append(step.pred_original_sample)
    assert worst(found[1:], found[:1]) <= TOLERANCE


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_lms_order_matches_diffusers(order: int) -> None:
    check("LMSDiscreteScheduler", SD, 8, order=order)


def test_ddim_with_the_noise_of_the_clipped_sample_matches_diffusers() -> None:
    clipped = check("DDIMScheduler", SD, eta=0.5, use_clipped_model_output=True)
    assert worst(clipped, check("DDIMScheduler", SD, eta=0.5)) > 0.01


def test_given_noise_matches_diffusers() -> None:
    found = []
    for scheduler in (ours("DDIMScheduler", SD), reference("DDIMScheduler", SD)):
        scheduler.set_timesteps(6)
        x, (out, noise) = first_sample(1.0), model_outputs(2)
        found.append(scheduler.step(out, scheduler.timesteps[2], x, eta=1.0, variance_noise=noise).prev_sample)
    assert worst(found[:1], found[1:]) <= TOLERANCE


def test_scaled_noise_of_the_stochastic_solver_matches_diffusers() -> None:
    # Both sides take the noise of the first call from the run's generator and that of the second from both.
    assert worst(check("DPMSolverSDEScheduler", SD, s_noise=0.7), check("DPMSolverSDEScheduler", SD)) > 0.01


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize(
    "request_",
    [
        {"num_inference_steps": 4, "strength": 0.6},
        {"num_inference_steps": 4, "original_inference_steps": 100},
        {"num_inference_steps": 5, "original_inference_steps": 20, "strength": 0.5},
    ],
)
def test_distilled_runs_match_diffusers(name: str, request_: dict[str, Any]) -> None:
    check(name, {}, request=request_)


@pytest.mark.parametrize(
    ("name", "config", "second", "options"),
    [
        ("LCMScheduler", {}, "denoised", {}),
        ("LCMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}, "denoised", {}),
        ("TCDScheduler", {}, "pred_noised_sample", {}),
        ("TCDScheduler", {"prediction_type": "v_prediction"}, "pred_noised_sample", {"eta": 0.0}),
        ("TCDScheduler", {}, "pred_noised_sample", {"eta": 1.0}),
    ],
)
def test_second_outputs_match_diffusers(
    name: str, config: dict[str, Any], second: str, options: dict[str, float]
) -> None:
    x, outs = first_sample(1.0), model_outputs(4)
    found: list[list[torch.Tensor]] = [[], []]
    for scheduler, values in zip((ours(name, config), reference(name, config)), found, strict=True):
        with quiet():
            scheduler.set_timesteps(4)
        for call in ({}, {"return_dict": False}):
            scheduler.set_begin_index(0)
            sample, generator = x, torch.Generator().manual_seed(7)
            for out, t in zip(outs, scheduler.timesteps, strict=True):
                step = scheduler.step(out, t, sample, generator=generator, **options, **call)
                assert call or type(step).__name__ == f"{name}Output"
                sample, beside = step if call else (step.prev_sample, getattr(step, second))
                values.append(beside)
            scheduler.set_timesteps(4)
    assert worst(*found) <= TOLERANCE


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_strength_shortens_own_timesteps_as_in_diffusers(name: str) -> None:
    # The steps are not compared: diffusers' LCM takes the last one for one among all four, and adds noise to it.
    request, (own, their) = {"timesteps": [999, 759, 499, 259], "strength": 0.5}, (ours(name, {}), reference(name, {}))
    with quiet():
        their.set_timesteps(**request)
    own.set_timesteps(**request)
    assert own.timesteps.tolist() == their.timesteps.tolist() == [499, 259]
    assert not own.table(**request).rows[-1].draws


def test_places_among_the_levels_match_diffusers() -> None:
    check("EDMEulerScheduler", {}, request={"sigmas": torch.tensor([0.0, 0.15, 0.5, 0.9, 1.0], dtype=torch.float64)})


def test_a_clean_sample_may_be_told() -> None:
    found = []
    for scheduler in (ours("EDMEulerScheduler", {}), reference("EDMEulerScheduler", {})):
        scheduler.set_timesteps(6)
        x, (out, clean), t = first_sample(80.0), model_outputs(2), scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        found.append(scheduler.step(out, t, x, pred_original_sample=clean).prev_sample)
    assert worst(found[:1], found[1:]) <= TOLERANCE


def test_a_shift_set_later_matches_diffusers() -> None:
    config = {"shift": 1.5}
    own, their = FlowMatchEulerDiscreteScheduler(**config), reference("FlowMatchEulerDiscreteScheduler", config)
    for scheduler in (own, their):
        scheduler.set_shift(4.0)
        assert scheduler.shift == 4.0
        scheduler.set_timesteps(7)
    np.testing.assert_allclose(own.sigmas, their.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize("stochastic", [False, True])
def test_levels_of_single_tokens_match_diffusers(stochastic: bool) -> None:
    config, found = {"shift": 3.0, "stochastic_sampling": stochastic}, []
    generator = torch.Generator().manual_seed(3)
    x, out = (torch.randn((2, 5, 8), generator=generator) for _ in range(2))
    for scheduler in (ours("FlowMatchEulerDiscreteScheduler", config),
                      reference("FlowMatchEulerDiscreteScheduler", config)):  # fmt: skip
        scheduler.set_timesteps(6)
        t = scheduler.timesteps
        each = torch.tensor([[float(t[0])] * 4 + [0.0], [float(t[0]), float(t[2]), 300.0, 0.0, float(t[0])]])
        step = scheduler.step(out, t[0], x, per_token_timesteps=each, generator=torch.Generator().manual_seed(7))
        assert scheduler.step_index == 1
        found.append(step.prev_sample)
    assert worst(found[:1], found[1:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler"])
def test_velocity_is_that_of_the_training_schedule(name: str) -> None:
    # diffusers' Euler looks its levels up by the place in a descending list, so that DDPM is the judge of all.
    x, noise = model_outputs(2)
    t = torch.tensor([0, 999])
    expected = reference("DDPMScheduler", SD).get_velocity(x, noise, t)
    torch.testing.assert_close(ours(name, SD).get_velocity(x, noise, t), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_previous_timesteps_match_diffusers(name: str) -> None:
    own, their = ours(name, {}), reference(name, {})
    assert own.previous_timestep(500) == int(their.previous_timestep(500)) == 499
    for scheduler in (own, their):
        scheduler.set_timesteps(5)
    assert [own.previous_timestep(t) for t in own.timesteps] == [
        int(their.previous_timestep(t)) for t in their.timesteps
    ]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_places_and_stages_match_diffusers(name: str) -> None:
    own, their = ours(name, SD), reference(name, SD)
    for scheduler in (own, their):
        scheduler.set_timesteps(6)
    assert own.index_for_timestep(own.timesteps[3]) == their.index_for_timestep(their.timesteps[3])
    assert own.index_for_timestep(5, [9, 7, 5]) == 2
    x, outs = first_sample(10.0), model_outputs(2)
    stages = []
    for scheduler in (own, their):
        scheduler.set_begin_index(0)
        for n, out in enumerate(outs):
            scheduler.scale_model_input(x, scheduler.timesteps[n])
            stages.append(getattr(scheduler, "state_in_first_order", True))
            scheduler.step(out, scheduler.timesteps[n], x)
    assert stages[:2] == stages[2:]


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("EulerDiscreteScheduler", {"s_churn": -1.0}, "s_churn is -1.0, expected 0 or more"),
        ("FlowMatchEulerDiscreteScheduler", {"s_churn": 1.0}, "names it but does not use it"),
        ("DDPMScheduler", {"s_noise": 0.0}, "has no s_noise, got 0.0; the options of its steps: none"),
        ("EulerDiscreteScheduler", {"order": 2}, "the options of its steps: s_churn, s_tmin, s_tmax, s_noise"),
        ("LMSDiscreteScheduler", {"order": 0}, "order is 0, expected 1 or more"),
        ("LCMScheduler", {"strength": 1.5}, "strength is 1.5, expected more than 0"),
        ("LCMScheduler", {"strength": 0.05}, "strength=0.05 leaves fewer than 4 timesteps"),
        ("DDIMScheduler", {"eta": math.inf}, "eta is inf, expected 0 to 1"),
    ],
)  # fmt: skip
def test_options_that_are_refused(name: str, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCHEDULERS[name]().table(4, **call)


def test_places_that_are_refused() -> None:
    for config, places in (({}, [0.5, 0.1]), ({}, [0.5, 1.5]), ({"sigma_schedule": "exponential"}, [0.0, 1.0])):
        with pytest.raises(InputError, match="places among Karras' levels"):
            SCHEDULERS["EDMEulerScheduler"](**config).table(sigmas=places)
