"""Solvers against answers known in closed form: no other implementation is asked here."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.schedulers import (
    Clip,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    Row,
    Scheduler,
    Table,
    Threshold,
    advance,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, WIDTH = 0.7, 0.5
"""The data of these tests: a normal distribution, for which the best denoiser and the exact flow are known."""


def denoise(x: Any, row: Row) -> Any:
    """E[x_0 | x] for x_0 ~ N(MEAN, WIDTH^2) and x = alpha x_0 + sigma noise."""
    alpha, sigma = row.alpha, row.sigma
    return (WIDTH**2 * alpha * x + sigma**2 * MEAN) / (alpha**2 * WIDTH**2 + sigma**2)


def predict_noise(x: Any, row: Row) -> Any:
    return (x - row.alpha * denoise(x, row)) / row.sigma


def flow(x: Any, row: Row, alpha: float, sigma: float) -> Any:
    """The exact probability flow: x keeps its place in standard deviations of the marginal N(alpha m, ...)."""
    before = np.hypot(row.alpha * WIDTH, row.sigma)
    return alpha * MEAN + np.hypot(alpha * WIDTH, sigma) / before * (x - row.alpha * MEAN)


def run(table: Table, x: Any, model: Callable[[Any, Row], Any]) -> Any:
    history: tuple[Any, ...] = ()
    for n, row in enumerate(table.rows):
        x, history = advance(table, n, x, model(x, row), history, None)
    assert history == ()
    return x


def error(scheduler: Scheduler, steps: int, final: tuple[float, float]) -> float:
    table = scheduler.table(steps)
    first = table.rows[0]
    x = np.linspace(-2, 2, 9) * np.hypot(first.alpha, first.sigma)
    return float(np.abs(run(table, x, predict_noise) - flow(x, first, *final)).max())


def order(scheduler: Scheduler, steps: int, final: tuple[float, float] = (1.0, 0.0)) -> float:
    return error(scheduler, steps, final) / error(scheduler, 2 * steps, final)


def smallest(scheduler: Scheduler) -> tuple[float, float]:
    bar = float(scheduler.alphas_cumprod[0])
    return bar**0.5, (1 - bar) ** 0.5


def test_first_order_solvers_halve_their_error() -> None:
    plain = {**SD, "timestep_spacing": "linspace"}
    ddim = DDIMScheduler(**plain, clip_sample=False, set_alpha_to_one=False)
    # Levels at equal steps of the noise level itself, so that the solver's order is all that shows.
    euler = EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    assert 1.8 < order(euler, 50) < 2.2
    assert 1.7 < order(ddim, 50, smallest(ddim)) < 2.3
    low = {"solver_order": 1, "use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}
    assert 1.8 < _between(DPMSolverMultistepScheduler(**SD, **low), 40) < 2.2


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_second_order_multistep_quarters_its_error(solver_type: str) -> None:
    options = {"solver_type": solver_type, "use_lu_lambdas": True, "lower_order_final": False}
    scheduler = DPMSolverMultistepScheduler(**SD, **options, final_sigmas_type="sigma_min")
    assert 3.6 < _between(scheduler, 40) < 4.6


def test_third_order_multistep_beats_second_order() -> None:
    # Its first steps are of order 1 and 2, which bounds the order of the whole; the error is what shrinks.
    options = {"use_lu_lambdas": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    second, third = (DPMSolverMultistepScheduler(**SD, **options, solver_order=order) for order in (2, 3))
    assert _error_before_last(third, 40) < 0.5 * _error_before_last(second, 40)


def _between(scheduler: Scheduler, steps: int) -> float:
    """The ratio of errors when steps double."""
    return _error_before_last(scheduler, steps) / _error_before_last(scheduler, 2 * steps)


def _error_before_last(scheduler: Scheduler, steps: int) -> float:
    """The error at the level of the last network call, where the levels of this family end."""
    table = scheduler.table(steps)
    first, last = table.rows[0], table.rows[-1]
    start = x = np.linspace(-2, 2, 9)
    history: tuple[Any, ...] = ()
    for n, row in enumerate(table.rows[:-1]):
        x, history = advance(table, n, x, predict_noise(x, row), history, None)
    return float(np.abs(x - flow(start, first, last.alpha, last.sigma)).max())


def test_plms_is_far_more_exact_than_ddim() -> None:
    pndm = PNDMScheduler(**SD, skip_prk_steps=True)
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    assert error(pndm, 50, smallest(pndm)) < 0.2 * error(ddim, 50, smallest(ddim))


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_runge_kutta_warm_up_reaches_the_level_it_aims_at(steps: int) -> None:
    pndm = PNDMScheduler(**SD)
    x = np.linspace(-2, 2, 9)
    table = pndm.table(steps)
    noise, clean = np.full(9, 0.3), x
    first = table.rows[0]
    # With the true noise told at every call, each solver of the flow is exact.
    result = run(table, first.alpha * clean + first.sigma * noise, lambda _, __: noise)
    alpha, sigma = smallest(pndm)
    np.testing.assert_allclose(result, alpha * clean + sigma * noise, atol=1e-12)


@pytest.mark.parametrize("t", [100, 500, 999])
def test_one_ddim_step_with_the_true_noise_recovers_the_clean_sample(t: int) -> None:
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 1, 4, 8, 8))
    scheduler = DDIMScheduler(**SD, clip_sample=False, steps_offset=t)
    scheduler.set_timesteps(1)
    x = scheduler.add_noise(clean, noise, t)
    output = scheduler.step(noise, t, x)
    np.testing.assert_allclose(output.prev_sample, clean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(output.pred_original_sample, clean, rtol=0, atol=1e-12)


def test_ddpm_noise_keeps_the_marginal_variance() -> None:
    # Data of width zero at the origin: after each step the sample must again have the variance of its level.
    table = DDPMScheduler(**SD, clip_sample=False).table(50)
    for row, after in zip(table.rows[:-1], table.rows[1:], strict=True):
        assert (row.a * row.sigma) ** 2 + row.c**2 == pytest.approx(after.sigma**2, rel=1e-9)


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler(**SD, clip_sample=False, prediction_type="sample"),
    DDPMScheduler(**SD, clip_sample=False, prediction_type="sample"),
    EulerDiscreteScheduler(**SD, prediction_type="sample"),
    DPMSolverMultistepScheduler(**SD, prediction_type="sample"),
    DPMSolverMultistepScheduler(**SD, prediction_type="sample", solver_order=3, solver_type="heun"),
    DPMSolverMultistepScheduler(**SD, prediction_type="sample", algorithm_type="sde-dpmsolver++"),
], ids=repr)  # fmt: skip
@given(steps=st.integers(1, 60), value=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_a_clean_sample_without_noise_stays(scheduler: Scheduler, steps: int, value: float) -> None:
    table = scheduler.table(steps)
    clean, history = np.full((1, 1, 2, 2), value), ()
    x = table.rows[0].alpha * clean
    for n in range(len(table)):
        x, history = advance(table, n, x, clean, history, 0 * clean)
        level = table.rows[n + 1].alpha if n + 1 < len(table) else 1.0
        np.testing.assert_allclose(x, level * clean, atol=1e-9)


def test_ancestral_noise_adds_up() -> None:
    table = EulerAncestralDiscreteScheduler(**SD).table(20)
    for n, row in enumerate(table.rows):
        assert table.sigmas is not None
        down = row.a * row.sigma
        assert down**2 + row.c**2 == pytest.approx(float(table.sigmas[n + 1]) ** 2, rel=1e-6, abs=1e-12)
        assert row.draws


def test_clip_and_threshold() -> None:
    values = np.array([[-3.0, -1.0, 0.5, 2.0], [0.1, 0.2, -0.3, 0.4]])
    np.testing.assert_array_equal(Clip(1.5)(values), [[-1.5, -1.0, 0.5, 1.5], [0.1, 0.2, -0.3, 0.4]])
    # Quantile 2/3 of |3, 1, .5, 2| is 2; that of the second image is below 1 and counts as 1.
    expected = [[-1.0, -0.5, 0.25, 1.0], [0.1, 0.2, -0.3, 0.4]]
    np.testing.assert_allclose(Threshold(2 / 3, 5.0)(values), expected)
    np.testing.assert_allclose(Threshold(2 / 3, 1.0)(values)[0], [-1.0, -1.0, 0.5, 1.0])


@given(steps=st.integers(1, 200), begin=st.integers(0, 199))
@settings(max_examples=40, deadline=None)
def test_begin_is_a_shorter_table(steps: int, begin: int) -> None:
    begin %= steps
    whole = EulerDiscreteScheduler(**SD).table(steps)
    part = EulerDiscreteScheduler(**SD).table(steps, begin=begin)
    assert part.rows == whole.rows[begin:]
    assert part.timesteps.tolist() == whole.timesteps[begin:].tolist()


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler(solver_order=3), PNDMScheduler()], ids=repr)
def test_rows_hold_plain_floats(scheduler: Scheduler) -> None:
    for row in scheduler.table(20).rows:
        assert {type(v) for v in (row.alpha, row.sigma, row.p, row.q, row.a, *row.b, row.c, row.e, row.scale)} == {
            float
        }
        assert type(row.timestep) is int
