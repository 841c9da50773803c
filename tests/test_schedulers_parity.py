"""Every scheduler against diffusers: the same timesteps, and the same sample after every step."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scheduler_configs import CONFIGS, SD, ZERO, label
from scheduler_runs import (
    SHAPE,
    TOLERANCE,
    Samples,
    first_sample,
    model_outputs,
    run_face,
    run_table,
    run_theirs,
    worst,
)
from scheduler_runs import theirs as reference

from anamorph.errors import InputError
from anamorph.schedulers import SCHEDULERS, Table, add_noise, advance

STEPS = (2, 5)
CASES = [(name, config, steps) for name, configs in CONFIGS.items() for config in configs for steps in STEPS]


def served(name: str, config: dict[str, Any], steps: int) -> bool:
    """Whether diffusers itself runs this combination."""
    if name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        return steps >= 4  # its Runge-Kutta warm-up takes three whole steps
    return True


def tolerance(name: str, config: dict[str, Any]) -> float:
    """1e-5; where samples begin at sigma = 4096, the rounding of their last bit in the reference, 4096 x 2^-23."""
    return 4096 * 2**-23 if config is ZERO and name.startswith("Euler") else TOLERANCE


def run_reference(theirs: Any, timesteps: Any, x: torch.Tensor, **options: Any) -> Samples:
    return run_theirs(theirs, timesteps, x, model_outputs(len(timesteps)), **options)


def run_ours(scheduler: Any, timesteps: Any, x: torch.Tensor, **options: Any) -> Samples:
    return run_face(scheduler, timesteps, x, model_outputs(len(timesteps)), **options)


def run_rows(table: Table, x: torch.Tensor) -> Samples:
    return run_table(table, x, model_outputs(len(table)))


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
    x = first_sample(float(theirs.init_noise_sigma))
    assert table.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    expected = run_reference(theirs, theirs.timesteps, x)
    assert worst(run_ours(ours, ours.timesteps, x), expected) <= tolerance(name, config)
    assert worst(run_rows(table, x), expected) <= tolerance(name, config)


@pytest.mark.parametrize(
    ("config", "eta"),
    # Without any signal and with eta = 1, diffusers takes the root of 1 - alpha_bar - c^2 = 0 after rounding: NaN.
    [(config, eta) for config in CONFIGS["DDIMScheduler"] for eta in (0.0, 0.5, 1.0)
     if eta < 1 or not config.get("rescale_betas_zero_snr")],
    ids=label,
)  # fmt: skip
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_eta_matches_diffusers(config: dict[str, Any], steps: int, eta: float) -> None:
    theirs, ours = reference("DDIMScheduler", config), SCHEDULERS["DDIMScheduler"](**config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    x = first_sample(float(theirs.init_noise_sigma))
    expected = run_reference(theirs, theirs.timesteps, x, eta=eta)
    assert worst(run_ours(ours, ours.timesteps, x, eta=eta), expected) <= TOLERANCE
    assert worst(run_rows(ours.table(steps, eta=eta), x), expected) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, 7, 19])
@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name, configs in CONFIGS.items() for config in configs if served(name, config, 1)],
    ids=label,
)
def test_image_to_image_starts_as_diffusers_does(name: str, config: dict[str, Any], begin: int) -> None:
    theirs, ours = reference(name, config), SCHEDULERS[name](**config)
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    ours.set_begin_index(begin)
    if name not in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        theirs.set_begin_index(begin)
    x, timesteps = first_sample(1.0), theirs.timesteps[begin:]
    table = ours.table(20, begin=begin)
    assert len(table) == len(timesteps)
    expected = run_reference(theirs, timesteps, x)
    assert worst(run_ours(ours, ours.timesteps[begin:], x), expected) <= TOLERANCE
    assert worst(run_rows(table, x), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_own_timesteps_match_diffusers(name: str) -> None:
    chosen = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    theirs, ours = reference(name, SD), SCHEDULERS[name](**SD)
    theirs.set_timesteps(timesteps=chosen)
    ours.set_timesteps(timesteps=chosen)
    x = first_sample(float(theirs.init_noise_sigma))
    expected = run_reference(theirs, theirs.timesteps, x)
    assert ours.timesteps.tolist() == chosen
    assert worst(run_ours(ours, ours.timesteps, x), expected) <= TOLERANCE
    assert worst(run_rows(ours.table(timesteps=chosen), x), expected) <= TOLERANCE


def test_own_sigmas_match_diffusers() -> None:
    chosen = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    theirs, ours = reference("EulerDiscreteScheduler", SD), SCHEDULERS["EulerDiscreteScheduler"](**SD)
    theirs.set_timesteps(sigmas=chosen)
    table = ours.table(sigmas=chosen)
    np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    x = first_sample(float(theirs.init_noise_sigma))
    assert worst(run_rows(table, x), run_reference(theirs, theirs.timesteps, x)) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parity_notices_a_coefficient_off_by_a_thousandth(name: str) -> None:
    config = {**SD, "skip_prk_steps": True} if name == "PNDMScheduler" else SD
    theirs, ours = reference(name, config), SCHEDULERS[name](**config)
    theirs.set_timesteps(20)
    x, table = first_sample(float(theirs.init_noise_sigma)), ours.table(20)
    expected = run_reference(theirs, theirs.timesteps, x)
    assert worst(run_rows(table, x), expected) <= TOLERANCE
    row = table.rows[10]
    wrong = row._replace(b=(row.b[0] + 1e-3, *row.b[1:]))
    changed = dataclasses.replace(table, rows=(*table.rows[:10], wrong, *table.rows[11:]))
    assert worst(run_rows(changed, x), expected) > TOLERANCE


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name, configs in CONFIGS.items() for config in configs], ids=label
)
def test_numpy_and_torch_give_the_same_numbers(name: str, config: dict[str, Any]) -> None:
    table = SCHEDULERS[name](**config).table(12)
    x = first_sample(1.0)
    outs = model_outputs(len(table))
    tensors = run_table(table, x, outs)
    arrays = run_table(table, x.numpy(), outs.numpy(), lambda tensor: tensor.numpy())
    assert all(array.dtype == np.float32 for array in arrays)
    assert worst([torch.from_numpy(array) for array in arrays], tensors) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_types_are_kept(name: str, dtype: torch.dtype) -> None:
    ours = SCHEDULERS[name](**SD)
    ours.set_timesteps(5)
    table, x = ours.table(5), torch.ones(SHAPE, dtype=dtype)
    result, history = advance(table, 0, x, x, (), x)
    assert {result.dtype, *(past.dtype for past in history)} == {dtype}
    assert ours.scale_model_input(x, ours.timesteps[0]).dtype == dtype
    output = ours.step(x, ours.timesteps[0], x)
    assert output.prev_sample.dtype == dtype
    assert output.pred_original_sample is None or output.pred_original_sample.dtype == dtype


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_half_precision_steps_match_diffusers(name: str) -> None:
    theirs, ours = reference(name, SD), SCHEDULERS[name](**SD)
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    x = first_sample(float(theirs.init_noise_sigma)).half()
    out = model_outputs(1)[0].half()
    expected = theirs.step(out, theirs.timesteps[0], x).prev_sample
    got = ours.step(out, ours.timesteps[0], x).prev_sample
    assert float((got.float() - expected.float()).abs().max()) <= 2**-10 * float(expected.abs().max())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_input_scale_and_added_noise_match_diffusers(name: str) -> None:
    theirs, ours = reference(name, SD), SCHEDULERS[name](**SD)
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    x, noise = model_outputs(2)
    t = theirs.timesteps[[3, 15]] if name != "PNDMScheduler" else theirs.timesteps[[1, 20]]
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=2e-6, atol=2e-6)
    arrays = ours.add_noise(x.numpy(), noise.numpy(), t.numpy())
    assert arrays.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(arrays), theirs.add_noise(x, noise, t), rtol=2e-6, atol=2e-6)
    first = theirs.timesteps[0]
    scaled = theirs.scale_model_input(x, first)
    torch.testing.assert_close(ours.scale_model_input(x, ours.timesteps[0]), scaled, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours.table(20).rows[0].scale * x, scaled, rtol=2e-6, atol=0)


def test_table_noise_is_that_of_the_face() -> None:
    ours = SCHEDULERS["EulerDiscreteScheduler"](**SD)
    ours.set_timesteps(20)
    x, noise = model_outputs(2)
    at = ours.add_noise(x, noise, ours.timesteps[8:9])
    torch.testing.assert_close(add_noise(ours.table(20, begin=8), 0, x, noise), at)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_velocity_matches_diffusers(name: str) -> None:
    theirs, ours = reference(name, SD), SCHEDULERS[name](**SD)
    x, noise = model_outputs(2)
    t = torch.tensor([0, 999])
    torch.testing.assert_close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_clean_estimate_matches_diffusers(name: str) -> None:
    theirs, ours = reference(name, {}), SCHEDULERS[name]()
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    x, out = model_outputs(2)
    expected = theirs.step(out, theirs.timesteps[0], x).pred_original_sample
    torch.testing.assert_close(ours.step(out, ours.timesteps[0], x).pred_original_sample, expected)
    assert ours.step(out, ours.timesteps[0 if ours.STATELESS else 1], x, return_dict=False)[1].shape == SHAPE


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("curve", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_training_schedule_matches_diffusers(curve: str, zero: bool) -> None:
    config = {"beta_schedule": curve, "rescale_betas_zero_snr": zero}
    theirs, ours = reference("DDPMScheduler", config), SCHEDULERS["DDPMScheduler"](**config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6 if zero else 0)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_trailing_has_no_timestep_below_zero(name: str) -> None:
    # Rounding gives diffusers a timestep of -1 after the 61 that were asked for.
    config = {"timestep_spacing": "trailing"}
    theirs, ours = reference(name, config), SCHEDULERS[name](**config)
    theirs.set_timesteps(61)
    calls = ours.table(61).timesteps.tolist()
    assert theirs.timesteps.tolist()[-1] == -1
    assert calls[-1] == 15
    if name != "PNDMScheduler":
        assert calls == theirs.timesteps.tolist()[:-1]


@pytest.mark.parametrize("config", [{}, {**SD, "eta": 1.0, "clip_sample": False}], ids=label)
def test_repaint_matches_diffusers(config: dict[str, Any]) -> None:
    theirs, ours = reference("RePaintScheduler", config), SCHEDULERS["RePaintScheduler"](**config)
    theirs.set_timesteps(12, jump_length=3, jump_n_sample=2)
    ours.set_timesteps(12, jump_length=3, jump_n_sample=2)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert len(ours.timesteps) > 12
    picture, out = model_outputs(2)
    mask = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    mine = yours = first_sample(float(theirs.init_noise_sigma))
    before = theirs.timesteps[0] + 1
    for t in theirs.timesteps:
        if t > before:
            mine = ours.undo_step(mine, before, generators[0])
            yours = theirs.undo_step(yours, before, generators[1])
        else:
            mine = ours.step(out, t, mine, picture, mask, generators[0]).prev_sample
            yours = theirs.step(out, t, yours, picture, mask, generators[1]).prev_sample
        before = t
        assert worst([mine], [yours]) <= TOLERANCE
    with pytest.raises(InputError, match="needs a picture and a mask"):
        ours.table(5)
