"""Graphs that go on to the next sample: the same latents as with guidance and schedulers outside, on every engine."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from parity import IMAGE_BOUND, LATENT_BOUND, Trace, ours, reference, relative, worst

import anamorph
from anamorph import DiffusionPipeline
from anamorph.artifact import NATIVE
from anamorph.errors import InputError
from anamorph.models.stepping import stepped
from anamorph.native import CACHING
from anamorph.pipelines.sampling import Guidance
from anamorph.pipelines.stepping import check_table, guidance_weights, step_weights
from anamorph.rewrites import ALL, REWRITES, wanted
from anamorph.schedulers import SCHEDULERS, advance
from anamorph.stepping import GUIDANCE, HELD, HISTORY, NOISE, SCOPE, WEIGHTS

WISH = f"default,{SCOPE}"
PLAIN = {"clip_sample": False}
"""Of classes that would clamp their estimates otherwise."""
OTHERS = {
    "CMStochasticIterativeScheduler": None,  # always clamps
    "RePaintScheduler": None,  # needs a picture in each step
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"), PLAIN),
}
SERVED = {name: OTHERS.get(name, {}) for name in SCHEDULERS if OTHERS.get(name, {}) is not None}


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("name", SERVED)
def test_sums_are_the_rule_of_the_table(name: str) -> None:
    table = SCHEDULERS[name](**SERVED[name]).table(9)
    check_table(table)
    x, history = normal(0, 2, 3, 4, 5), ()
    mine, held = torch.from_numpy(x), None
    for n in range(len(table)):
        out, noise = normal(2 * n + 1, 2, 3, 4, 5), normal(2 * n + 2, 2, 3, 4, 5)
        x, history = advance(table, n, x, out, history, noise)
        told = {
            WEIGHTS: torch.from_numpy(step_weights(table, n)), GUIDANCE: torch.ones(1), NOISE: torch.from_numpy(noise),
            **({} if held is None else {HISTORY: held}),
        }  # fmt: skip
        mine, held = stepped(mine, torch.from_numpy(out)[None], told)
        assert held.shape == (HELD, 2, 3, 4, 5)
        assert relative(mine.numpy(), x) <= 1e-5
        assert all(relative(held[i].numpy(), kept) <= 1e-5 for i, kept in enumerate(history) if np.any(kept))


@given(scales=st.lists(st.floats(-20, 20), max_size=3), seed=st.integers(0, 9))
def test_weights_of_branches_are_guidance(scales: list[float], seed: int) -> None:
    guidance, out = Guidance(tuple(scales)), normal(seed, len(scales) + 1, 2, 3)
    summed = (guidance_weights(guidance.scales)[:, :, None] * out).sum(0)
    assert np.allclose(summed, guidance.combine(out.reshape(-1, 3)), rtol=1e-4, atol=1e-4)


CALL: dict[str, Any] = {
    "prompt": ["a red cat", "a photo of dogs"], "negative_prompt": ["", "blue"], "num_inference_steps": 5,
    "guidance_scale": 5.0, "height": 64, "width": 32,
}  # fmt: skip
SOLVERS: Mapping[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False}, "EulerAncestralDiscreteScheduler": {}, "PNDMScheduler": {},
    "UniPCMultistepScheduler": {}, "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}  # fmt: skip
"""One that needs nothing, one that scales and draws noise, and three that remember; one of these corrects itself."""


def draws_like_diffusers(
    pipe: Any, folder: Path, solver: str, kind: str = "StableDiffusionPipeline", **call: Any
) -> None:
    pipe.scheduler = getattr(anamorph, solver).from_config({**pipe.scheduler.config, **SOLVERS[solver]})
    exact = reference(folder, type(pipe.scheduler), (3, 4), kind, SOLVERS[solver], **call)
    latents, pixels = worst(ours(pipe, (3, 4), **call), exact)
    assert latents <= LATENT_BOUND
    assert pixels <= IMAGE_BOUND


@pytest.mark.parametrize("solver", SOLVERS)
def test_pictures_equal_diffusers(sd1: Path, solver: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites=WISH)
    assert SCOPE in pipe.placement["unet"].details["rewrites"].split()
    draws_like_diffusers(pipe, sd1, solver, **CALL)
    if solver == "DDIMScheduler":
        draws_like_diffusers(pipe, sd1, solver, **{**CALL, "guidance_scale": 1.0})
        other = ours(pipe, (3, 4), **{**CALL, "guidance_scale": 5.1})
        assert worst(other, ours(pipe, (3, 4), **CALL))[0] > 10 * LATENT_BOUND  # guidance is seen


def test_branches_may_share_nothing_before_the_step(sdxl: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sdxl, backend="eager", rewrites=WISH)
    call = {**CALL, "prompt": "a red cat", "negative_prompt": None, "num_images_per_prompt": 2}
    draws_like_diffusers(pipe, sdxl, "DDIMScheduler", "StableDiffusionXLPipeline", **call)


@pytest.mark.parametrize("engine", FORMATS)
def test_exported_graphs_go_on_to_the_next_sample(sd1: Path, engine: str) -> None:
    folder = exported(sd1, engine, NATIVE, rewrites=WISH)
    pipe = DiffusionPipeline.from_pretrained(folder, backend=engine)
    for solver in ("EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"):
        draws_like_diffusers(pipe, sd1, solver, **CALL)
    plain = DiffusionPipeline.from_pretrained(sd1, backend="eager", scheduler=pipe.scheduler)
    part = {**CALL, "guidance_interval": (0.2, 0.7)}
    assert max(worst(ours(pipe, (3, 4), **part), ours(plain, (3, 4), **part))) <= IMAGE_BOUND


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_samples_keep_their_precision_where_the_model_has_less(sd1: Path, engine: str) -> None:
    exact = ours(DiffusionPipeline.from_pretrained(sd1, backend="eager"), (3, 4), **CALL)

    def drawn(wish: str) -> Trace:
        folder = sd1 if engine == "eager" else exported(sd1, engine, NATIVE, rewrites=wish)
        pipe = DiffusionPipeline.from_pretrained(folder, backend=engine, torch_dtype="bfloat16")
        return ours(pipe, (3, 4), **CALL)

    found = drawn(WISH)
    assert worst(found, exact)[0] <= 1.5 * worst(drawn("default"), exact)[0]
    for latents in found.latents:
        rounded = torch.from_numpy(latents).bfloat16().float().numpy()
        assert np.mean(rounded == latents) < 0.05  # a step in bfloat16 would leave nothing to round


def test_steps_may_be_cached_in_such_a_graph(sd1: Path) -> None:
    call, found = {**CALL, "step_caching": 2}, []
    for wish in (f"default,{CACHING}", f"{WISH},{CACHING}"):
        found.append(ours(DiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites=wish), (3, 4), **call))
    assert max(worst(*found)) <= LATENT_BOUND


def test_what_is_no_sum_is_refused(sd1: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites=WISH)
    draw = {**CALL, "seed": [3, 4]}
    with pytest.raises(InputError, match="step-scope serves no guidance_rescale"):
        pipe(**draw, guidance_rescale=0.5)
    pipe.scheduler = anamorph.DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": True})
    with pytest.raises(InputError, match="clamps its estimates"):
        pipe(**draw)
    apart: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites=WISH, guidance_batch="apart")
    with pytest.raises(InputError, match="no branches that are called apart"):
        apart(**draw)
    with pytest.raises(InputError, match="computes the next samples itself"):
        pipe.denoiser().prepare([1.0], {}, 2)


def test_tables_that_remember_more_or_take_variances_are_refused() -> None:
    table = SCHEDULERS["EulerDiscreteScheduler"]().table(3)
    long = replace(table, rows=(table.rows[0]._replace(keep=(0,) * (HELD + 1)), *table.rows[1:]))
    with pytest.raises(InputError, match="remembers 7 states, step-scope 6"):
        check_table(long)
    with pytest.raises(InputError, match="takes variances"):
        check_table(replace(table, variance="learned"))


def test_preconditions_are_read_from_the_configuration() -> None:
    unmet = REWRITES[SCOPE].unmet
    config = {
        "in_channels": 9, "out_channels": 4, "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }  # fmt: skip
    assert "sees 9 channels and predicts 4" in str(unmet("unet", "UNet2DConditionModel", config))
    assert unmet("unet", "UNet2DConditionModel", {**config, "in_channels": 4}) is None
    assert unmet("controlnet", "ControlNetModel", config) == "it predicts no samples"
    assert unmet("unet_prepare", "UNet2DConditionModel", config) is not None
    assert SCOPE not in wanted(ALL, "onnx")
