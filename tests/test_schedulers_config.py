"""Configurations of schedulers: defaults, foreign keys, files, the registry, and what errors say."""

import inspect
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.config import Config
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
    load_scheduler,
    scheduler_from_folder,
)
from anamorph.schedulers.keys import FAMILY

SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
"""The file of Stable Diffusion 1.5: `clip_sample` is another class's key, and some of PNDM's own are missing."""

ALL = pytest.mark.parametrize("name", sorted(SCHEDULERS))


@ALL
def test_defaults_are_those_of_diffusers(name: str) -> None:
    signature = inspect.signature(getattr(diffusers, name).__init__)
    theirs = {
        key: value.default for key, value in signature.parameters.items() if key not in ("self", "args", "kwargs")
    }
    assert dict(SCHEDULERS[name].DEFAULTS) == theirs


def test_family_holds_the_keys_of_every_scheduler_of_diffusers() -> None:
    wanted: set[str] = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            signature = inspect.signature(getattr(diffusers, name).__init__)
            wanted |= {key for key in signature.parameters if key not in ("self", "args", "kwargs")}
    assert len(wanted) > 60
    assert wanted <= FAMILY


@ALL
def test_files_round_trip_with_foreign_keys(name: str, tmp_path: Path) -> None:
    SCHEDULERS[name].from_config(SD15).save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert stored["_class_name"] == name
    assert stored["clip_sample"] is False
    assert stored["skip_prk_steps"] is True
    assert list(stored) == sorted(stored)
    assert "_use_default_values" not in stored
    again = scheduler_from_folder(tmp_path)
    assert type(again) is SCHEDULERS[name]
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler_config.json").read_text(encoding="utf-8") == text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(diffusers, name).from_pretrained(str(tmp_path))
    theirs.set_timesteps(7)
    if name == "RePaintScheduler":  # it has no table
        again.set_timesteps(7)
        assert theirs.timesteps.tolist() == again.timesteps.tolist()
        return
    assert theirs.timesteps.tolist() == pytest.approx(again.table(7).timesteps.tolist(), rel=1e-6, abs=1e-3)


@ALL
def test_conversion_gives_what_diffusers_gives(name: str) -> None:
    # The file leaves out timestep_spacing: PNDM's "leading" must not reach classes that default to linspace.
    source = diffusers.PNDMScheduler.from_config(SD15)
    theirs = getattr(diffusers, name).from_config(source.config)
    ours = SCHEDULERS[name].from_config(PNDMScheduler.from_config(SD15).config)
    expected = Config({key: theirs.config[key] for key in ours.DEFAULTS})  # which makes tuples of lists
    assert ours.own == expected
    direct = SCHEDULERS[name].from_config(source.config)
    assert direct.own == ours.own


def test_there_and_back_keeps_the_solver_options() -> None:
    start = PNDMScheduler.from_config(SD15)
    back = PNDMScheduler.from_config(EulerDiscreteScheduler.from_config(start.config).config)
    assert dict(back.config) == dict(start.config)


def test_foreign_keys_change_nothing() -> None:
    foreign = {"clip_sample": True, "use_karras_sigmas": True, "rescale_betas_zero_snr": True, "thresholding": True}
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler):
        own = {key: value for key, value in foreign.items() if key not in kind.DEFAULTS}
        assert own
        assert kind(**own).table(8).rows == kind().table(8).rows
        assert kind(**own).table(8).clip is None


def test_functions_serve_but_are_not_saved(tmp_path: Path) -> None:
    steady = SASolverScheduler(tau_func=lambda _: 0.0)
    assert all(row.c == 0 for row in steady.table(5).rows)
    with pytest.raises(ConfigError, match="tau_func is a function"):
        steady.save_pretrained(tmp_path)


def test_vocabulary_of_other_classes_is_translated_by_from_config_only() -> None:
    unipc = diffusers.UniPCMultistepScheduler(solver_type="bh1")
    assert DPMSolverMultistepScheduler.from_config(unipc.config).config.solver_type == "midpoint"
    multistep = DPMSolverMultistepScheduler()
    assert (
        DDPMScheduler.from_config({**multistep.config, "_use_default_values": ()}).config.variance_type == "fixed_small"
    )
    assert SASolverScheduler.from_config({"algorithm_type": "dpmsolver"}).config.algorithm_type == "noise_prediction"
    ancestral = diffusers.DDPMScheduler(variance_type="fixed_large")
    assert DPMSolverMultistepScheduler.from_config(ancestral.config).config.variance_type is None
    with pytest.raises(ConfigError, match="solver_type='bh1'; it serves 'midpoint', 'heun'"):
        DPMSolverMultistepScheduler(solver_type="bh1")


def test_overrides_and_repr() -> None:
    scheduler = EulerDiscreteScheduler.from_config(SD15, timestep_spacing="trailing")
    assert scheduler.config.timestep_spacing == "trailing"
    assert "timestep_spacing='trailing'" in repr(scheduler)
    assert "final_sigmas_type" not in repr(scheduler)
    assert len(scheduler) == 1000


def test_compatibles_are_the_common_classes() -> None:
    theirs = {kind.__name__ for kind in diffusers.EulerDiscreteScheduler().compatibles}
    ours = {kind.__name__ for kind in EulerDiscreteScheduler().compatibles}
    assert ours == theirs & set(SCHEDULERS)
    assert "PNDMScheduler" in ours


foreign = st.dictionaries(
    st.sampled_from(sorted(FAMILY - set(DDIMScheduler.DEFAULTS))), st.integers() | st.text(), max_size=5
)


@given(foreign=foreign, start=st.floats(1e-5, 1e-3), offset=st.integers(0, 20), clip=st.booleans())
@settings(max_examples=30, deadline=None)
def test_configurations_round_trip(foreign: dict[str, Any], start: float, offset: int, clip: bool) -> None:
    given_keys = {**foreign, "beta_start": start, "steps_offset": offset, "clip_sample": clip}
    first = DDIMScheduler(**given_keys)
    second = load_scheduler(json.loads(first.config.to_json()))
    assert {key: second.config[key] for key in given_keys} == given_keys
    assert second.config == first.config
    assert second.table(10).rows == first.table(10).rows


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (DDIMScheduler, {"beta_strat": 0.1}, "key 'beta_strat'; did you mean 'beta_start'"),
        (DDIMScheduler, {"beta_schedule": "quadratic"}, "='quadratic'; it serves 'linear', 'scaled_linear'"),
        (DDIMScheduler, {"timestep_spacing": "even"}, "='even'; it serves 'linspace', 'leading', 'trailing'"),
        (DDIMScheduler, {"prediction_type": "flow"}, "prediction_type='flow'; it serves 'epsilon', 'sample'"),
        (DDIMScheduler, {"num_train_timesteps": 0}, "num_train_timesteps=0, expected a whole number from 1"),
        (DDIMScheduler, {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, expected num_train_timesteps=1000"),
        (DDPMScheduler, {"variance_type": "fixed_large_log"}, "='fixed_large_log'; it serves 'fixed_small'"),
        (PNDMScheduler, {"prediction_type": "sample"}, "prediction_type='sample'; it serves 'epsilon', 'v_prediction'"),
        (EulerDiscreteScheduler, {"interpolation_type": "cubic"}, "='cubic'; it serves 'linear', 'log_linear'"),
        (
            EulerDiscreteScheduler,
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas exclude each other",
        ),
        (DPMSolverMultistepScheduler, {"solver_order": 4}, "solver_order=4; it serves 1, 2, 3"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpm"}, "algorithm_type='dpm'; it serves 'dpmsolver[+][+]'"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}, "='dpmsolver' cannot go with final_sigmas"),
        (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
            "='v_prediction' cannot go with use_flow_sigmas=True; change",
        ),
        (DEISMultistepScheduler, {"prediction_type": "flow_prediction"}, "cannot go with use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler, {"use_dynamic_shifting": True}, "=True cannot go with use_flow_sigmas=False"),
        (DPMSolverMultistepInverseScheduler, {"algorithm_type": "sde-dpmsolver"}, "it serves 'dpmsolver[+][+]', 'dpm"),
        (UniPCMultistepScheduler, {"predict_x0": False}, "predict_x0=False cannot go with final_sigmas_type='zero'"),
        (UniPCMultistepScheduler, {"lower_order_final": False}, "=False cannot go with final_sigmas_type='zero'"),
        (UniPCMultistepScheduler, {"shift_terminal": 0.1}, "shift_terminal needs use_flow_sigmas=True"),
        (UniPCMultistepScheduler, {"solver_p": 3}, "solver_p=3; it serves None"),
        (SASolverScheduler, {"tau_func": 3}, "tau_func=3, expected a function or None"),
        (
            SASolverScheduler,
            {"thresholding": True, "algorithm_type": "noise_prediction"},
            "algorithm_type='noise_prediction' cannot go with thresholding=True",
        ),
        (
            EDMDPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "'sde-dpmsolver[+][+]' cannot go with solver_order=3",
        ),
        (TCDScheduler, {"clip_sample": True}, "clip_sample=True; it serves False"),
        (DPMSolverSDEScheduler, {"noise_sampler_seed": 3}, "noise_sampler_seed=3; it serves None"),
        (IPNDMScheduler, {"trained_betas": [2.0]}, "expected one from 1 to 0 per point"),
        (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            "'sde-dpmsolver' cannot go with solver_order=3",
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(kind: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**config)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (DDIMScheduler, {}, "needs exactly one of num_inference_steps"),
        (EulerDiscreteScheduler, {"num_inference_steps": 5, "timesteps": [9]}, "exactly one of .*, timesteps, sigmas"),
        (DDIMScheduler, {"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 or more"),
        (DDIMScheduler, {"num_inference_steps": 2.5}, "is 2.5, expected a whole number"),
        (DDIMScheduler, {"num_inference_steps": 1001}, "at most num_train_timesteps=1000"),
        (EulerDiscreteScheduler, {"num_inference_steps": 5, "eta": 0.5}, "EulerDiscreteScheduler has no eta, got 0.5"),
        (DDIMScheduler, {"num_inference_steps": 5, "eta": 1.5}, "eta is 1.5, expected 0 to 1"),
        (DDIMScheduler, {"timesteps": [9, 5]}, "takes no timesteps; give num_inference_steps"),
        (DDPMScheduler, {"sigmas": [9, 5]}, "takes no sigmas; give num_inference_steps"),
        (DDPMScheduler, {"timesteps": [5, 9]}, r"timesteps must descend within 999..0, got \[5, 9\]"),
        (DDPMScheduler, {"timesteps": [1000, 9]}, "timesteps must descend within 999..0"),
        (EulerDiscreteScheduler, {"sigmas": [1.0]}, "sigmas must be two or more"),
        (DDIMScheduler, {"num_inference_steps": 5, "begin": 5}, "begin is 5, expected 0 to 4"),
        (DDIMScheduler, {"num_inference_steps": 5, "begin": -1}, "begin is -1, expected 0 to 4"),
        (PNDMScheduler, {"num_inference_steps": 3}, "needs 4 steps or more, got 3"),
        (PNDMScheduler, {"num_inference_steps": 9, "begin": 2}, "cannot begin inside its Runge-Kutta warm-up"),
        (DPMSolverMultistepScheduler, {"num_inference_steps": 3000}, "share a noise level; ask for fewer steps"),
        (HeunDiscreteScheduler, {"num_inference_steps": 5, "begin": 3}, "lies inside a step of .*a multiple of 2"),
        (TCDScheduler, {"num_inference_steps": 60}, "expected at most original_inference_steps=50"),
        (DDIMScheduler, {"num_inference_steps": 5, "mu": 1.0}, "has no use for mu=1.0"),
        (FlowMatchEulerDiscreteScheduler, {"sigmas": [0.5, 0.6]}, r"must descend within 1..0, zero excluded"),
    ],
)
def test_requests_that_are_refused(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind().table(**arguments)


def test_timesteps_outside_training_are_refused() -> None:
    with pytest.raises(InputError, match=r"timestep 1001 lies outside 0..999"):
        DDIMScheduler(steps_offset=2).table(1000)


def test_noise_prediction_at_a_level_without_signal_is_refused() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ConfigError, match="use 'v_prediction' or 'sample'"):
        scheduler.table(5)


def test_own_timesteps_and_a_sigma_family_exclude_each_other() -> None:
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        with pytest.raises(InputError, match="cannot go with use_karras_sigmas=True"):
            kind(use_karras_sigmas=True).table(timesteps=[900, 100])


def test_steps_out_of_order_are_refused() -> None:
    x = np.ones((1, 4, 8, 8), np.float32)
    scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(InputError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="timestep 5 is none of this run's"):
        scheduler.step(x, 5, x)
    first, second = scheduler.timesteps
    scheduler.step(x, first, x)
    assert scheduler.step_index == 1
    with pytest.raises(InputError, match="step 1 belongs to timestep 500, got 999"):
        scheduler.step(x, first, x)
    scheduler.step(x, second, x)
    with pytest.raises(InputError, match="all 2 steps are done"):
        scheduler.step(x, second, x)
    with pytest.raises(InputError, match="both generator and variance_noise"):
        scheduler.step(x, second, x, generator=np.random.default_rng(), variance_noise=x)


def test_numpy_noise_is_seeded_and_foreign_generators_are_refused() -> None:
    x = np.ones((2, 4, 8, 8), np.float32)
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    once, again = (scheduler.step(x, t, x, generator=np.random.default_rng(3)).prev_sample for _ in range(2))
    np.testing.assert_array_equal(once, again)
    each = scheduler.step(x, t, x, generator=[np.random.default_rng(3), np.random.default_rng(4)]).prev_sample
    np.testing.assert_array_equal(each[0], once[0])
    assert once.dtype == np.float32
    assert not np.array_equal(scheduler.step(x, t, x).prev_sample, once)
    with pytest.raises(InputError, match=r"needs a numpy.random.Generator, got int"):
        scheduler.step(x, t, x, generator=3)
    with pytest.raises(InputError, match="got 1 generators for a batch of 2"):
        scheduler.step(x, t, x, generator=[np.random.default_rng()])


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(ConfigError, match=r"'NopeScheduler' is not known; there are .*DDIMScheduler"):
        load_scheduler({"_class_name": "NopeScheduler"})
    with pytest.raises(ConfigError, match="None is not known"):
        load_scheduler({})
    assert type(load_scheduler(SD15)) is PNDMScheduler


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is missing"):
        scheduler_from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder 'scheduler'"):
        EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")


def test_tables_leave_the_scheduler_alone_and_threads_may_share_it() -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(SD15)
    expected = {steps: scheduler.table(steps).rows for steps in (5, 20)}
    assert scheduler.num_inference_steps is None
    wrong: list[int] = []

    def work(steps: int) -> None:
        wrong.extend(steps for _ in range(20) if scheduler.table(steps).rows != expected[steps])

    threads = [threading.Thread(target=work, args=(steps,)) for steps in (5, 20, 5, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_schedulers_do_not_load_torch() -> None:
    code = (
        "import sys, numpy as np; from anamorph.schedulers import DDPMScheduler as S; s = S(); s.set_timesteps(3);"
        "x = np.ones((1, 4, 8, 8), np.float32); s.step(x, s.timesteps[0], x); s.add_noise(x, x, 5);"
        "print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
