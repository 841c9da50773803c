"""Every scheduler against diffusers over classes, options, numbers of steps and starts, drawn at random.

The criterion, after every step: relative L2 difference at most 1e-5; where rounding in diffusers' own float32 run is
larger than that, our error against diffusers' code in double precision is no larger than its own float32 error.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scheduler_options import OPTIONS, STATELESS, Config, left_out, mended
from scheduler_runs import (
    TOLERANCE,
    first_sample,
    model_outputs,
    ours,
    quiet,
    run_double,
    run_face,
    run_table,
    run_theirs,
    theirs,
    worst,
)

from anamorph.errors import ConfigError, InputError
from anamorph.schedulers import SCHEDULERS, Table

STEPS = (1, 2, 3, 5, 10, 20, 50)
LUCK = 1.25
"""Two float32 runs of equal quality differ in their errors by about a quarter."""
ETAS = {"DDIMScheduler": (0.0, 0.5, 1.0), "TCDScheduler": (0.0, 0.3, 1.0)}
"""Values of eta."""


class Case:
    """One draw, ready to run on both sides."""

    def __init__(self, name: str, config: Config, steps: int, begin: int) -> None:
        self.name, self.config, self.steps = name, config, steps
        scheduler = SCHEDULERS[name]
        self.begin = begin // scheduler.order * scheduler.order if begin < steps else 0
        self.call: dict[str, Any] = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}

    def ours(self) -> Any:
        scheduler = ours(self.name, self.config)
        scheduler.set_timesteps(self.steps, **self.call)
        scheduler.set_begin_index(self.begin)
        return scheduler

    def theirs(self, exact: bool = False) -> Any:
        """With our alpha_bar where it was rescaled: torch.sqrt, which is not correctly rounded, decides its last bits.

        `exact` computes levels in double precision where diffusers does not insist on less.
        """
        torch.set_default_dtype(torch.float64 if exact else torch.float32)
        try:
            return self._theirs()
        finally:
            torch.set_default_dtype(torch.float32)

    def _theirs(self) -> Any:
        scheduler = theirs(self.name, self.config)
        if self.config.get("rescale_betas_zero_snr"):
            bar = torch.from_numpy(ours(self.name, self.config).alphas_cumprod.copy())
            np.testing.assert_allclose(bar[:-1], scheduler.alphas_cumprod[:-1], rtol=0, atol=1e-6)
            bar[-1] = scheduler.alphas_cumprod[-1]
            scheduler.alphas_cumprod = bar
            for key in ("final_alpha_cumprod", "initial_alpha_cumprod"):
                if hasattr(scheduler, key) and not self.config.get("set_alpha_to_one", True):
                    setattr(scheduler, key, bar[0])
        with quiet():
            scheduler.set_timesteps(self.steps, **self.call)
        if self.name not in STATELESS and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        return scheduler

    def table(self, **options: Any) -> Table:
        return ours(self.name, self.config).table(self.steps, begin=self.begin, **self.call, **options)

    def inputs(self, table: Table, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        learned = self.config.get("variance_type") in ("learned", "learned_range")
        scale = 1.0 if self.begin else table.init_noise_sigma
        return first_sample(scale, dtype), model_outputs(len(table), 6 if learned else 3, dtype)


@st.composite
def cases(draw: Any, name: str) -> Case:
    config = {key: draw(st.sampled_from(values), key) for key, values in OPTIONS[name].items()}
    limit = 40 if name == "CMStochasticIterativeScheduler" else 50
    steps = draw(st.sampled_from([steps for steps in STEPS if steps <= limit]))
    return Case(name, mended(name, config), steps, draw(st.sampled_from((0, 0, 1, 2, 6))))


def compared(case: Case, table: Table, **options: Any) -> bool:
    """Compare one case; False where diffusers itself returns NaN."""
    reference = case.theirs()
    timesteps = reference.timesteps[case.begin :]
    whole = table.timesteps.dtype == np.int64
    # Fractional timesteps are logarithms of float32 levels; torch's and NumPy's differ in the last bits.
    np.testing.assert_allclose(table.timesteps, timesteps.numpy(), rtol=0 if whole else 3e-6, atol=0 if whole else 5e-4)
    assert table.timesteps.dtype == timesteps.numpy().dtype
    assert table.init_noise_sigma == pytest.approx(float(getattr(reference, "init_noise_sigma", 1.0)), rel=1e-6)
    x, outs = case.inputs(table)
    expected = run_theirs(reference, timesteps, x, outs, table, **options)
    found = run_table(table, x, outs)
    assert all(bool(sample.isfinite().all()) for sample in found)
    if not all(bool(sample.isfinite().all()) for sample in expected):
        return False
    error = worst(found, expected)
    if error > TOLERANCE:
        exact = run_double(case.theirs(exact=True), timesteps, x, outs, table, **options)
        assert worst(found, exact) <= LUCK * worst(expected, exact), error
    scheduler = case.ours()
    assert worst(run_face(scheduler, scheduler.timesteps[case.begin :], x, outs, **options), found) <= 1e-6
    return True


REFUSED = (
    "no clean sample at the first timestep",  # epsilon without any signal
    "no noise at a level of zero",  # a sample prediction whose noise is asked for
    "cannot begin inside its Runge-Kutta warm-up",
    "needs 4 steps or more",
    "share a noise level",
    "cannot move a single level",
)
"""Requests of the sweep that are errors here; diffusers answers them with NaN, infinity or a run gone wrong."""


def served(case: Case, **options: Any) -> Table | None:
    """The table of a case that is to be compared."""
    try:
        table = case.table(**options)
    except (ConfigError, InputError) as error:
        if any(reason in str(error) for reason in REFUSED):
            return None
        raise
    return None if left_out(case.name, case.config, case.steps, case.begin, table) else table


@pytest.mark.parametrize("name", sorted(OPTIONS))
@given(data=st.data())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_sweep_matches_diffusers(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    options = {"eta": data.draw(st.sampled_from(ETAS[name]))} if name in ETAS else {}
    table = served(case, **options)
    assume(table is not None and compared(case, table, **options))  # hypothesis fails where too few are left


def test_sweep_covers_every_class() -> None:
    assert set(OPTIONS) == set(SCHEDULERS) - {"RePaintScheduler"}  # its step takes a picture and a mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(OPTIONS))
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_half_precision_is_no_worse_than_that_of_diffusers(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    table = served(case)
    assume(table is not None)
    assert table is not None
    x, outs = case.inputs(table, dtype)
    reference, scheduler = case.theirs(), case.ours()
    timesteps = reference.timesteps[case.begin :]
    expected = run_theirs(reference, timesteps, x, outs, table)
    assume(all(bool(sample.isfinite().all()) for sample in expected))
    exact = run_double(case.theirs(exact=True), timesteps, x, outs, table)
    assume(all(bool(sample.isfinite().all()) for sample in exact))
    found = run_face(scheduler, scheduler.timesteps[case.begin :], x, outs)
    assert {sample.dtype for sample in found} == {dtype}
    assert worst(found, exact) <= max(LUCK * worst(expected, exact), torch.finfo(dtype).eps)
