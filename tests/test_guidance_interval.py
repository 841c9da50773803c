"""Guidance in a part of the steps alone: what diffusers' own models compute when a loop leaves the other branch out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import LATENT_BOUND, relative

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.arrays import to_numpy
from anamorph.cli import main
from anamorph.errors import InputError
from anamorph.image import read_request
from anamorph.interface import Axis
from anamorph.pipelines.sampling import Guidance

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6, "guidance_scale": 5.0, "seed": 3}


def load(folder: Path, **arguments: Any) -> StableDiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, **arguments)
    assert isinstance(pipe, StableDiffusionPipeline)
    return pipe


def steps(pipe: StableDiffusionPipeline, **call: Any) -> list[NDArray[Any]]:
    return [to_numpy(state.latents).copy() for state in pipe.steps(**{**CALL, **call})]


def reference(folder: Path, start: NDArray[Any], begin: int, end: int) -> list[NDArray[Any]]:
    """diffusers' models in a loop that is guided from step `begin` to before `end`."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    told, untold = pipe.encode_prompt("a cat", "cpu", 1, True)
    pipe.scheduler.set_timesteps(CALL["num_inference_steps"])
    x, latents = torch.from_numpy(start), []
    for step, t in enumerate(pipe.scheduler.timesteps):
        with torch.no_grad():
            out = pipe.unet(x, t, told).sample
            if begin <= step < end:
                less = pipe.unet(x, t, untold).sample
                out = less + CALL["guidance_scale"] * (out - less)
        x = pipe.scheduler.step(out, t, x).prev_sample
        latents.append(x.numpy().copy())
    return latents


@pytest.mark.parametrize(("interval", "rows"), [((0.0, 0.5), (0, 3)), ((0.34, 0.9), (2, 5)), ((0.2, 1.0), (1, 6))])
def test_the_steps_inside_are_guided_and_no_others(
    sd1: Path, interval: tuple[float, float], rows: tuple[int, int]
) -> None:
    pipe = load(sd1, backend="eager")
    seen: list[int] = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    found = steps(pipe, guidance_interval=interval)
    hook.remove()
    assert seen == [2 if rows[0] <= step < rows[1] else 1 for step in range(6)]
    plan = pipe.plan(pipe.job(**CALL))
    expected = reference(sd1, to_numpy(plan.latents), *rows)
    difference = max(relative(*pair) for pair in zip(found, expected, strict=True))
    assert difference <= LATENT_BOUND
    whole = steps(pipe)
    assert relative(found[-1], whole[-1]) > 1e-3, "the interval changed nothing"


def test_the_whole_interval_is_guidance_as_ever(sd1: Path) -> None:
    pipe = load(sd1, backend="eager")
    assert np.array_equal(steps(pipe, guidance_interval=(0, 1))[-1], steps(pipe)[-1])


@pytest.mark.parametrize("engine", FORMATS)
def test_exported_graphs_take_it_too(sd1: Path, engine: str) -> None:
    call = {"guidance_interval": (0.3, 0.7), "prompt": ["a cat", "a photo of a red dog"]}
    found, expected = steps(load(exported(sd1, engine)), **call), steps(load(sd1, backend="eager"), **call)
    assert max(relative(*pair) for pair in zip(found, expected, strict=True)) <= 1e-5


def test_the_most_conditioned_of_several_branches_is_left(sd1: Path) -> None:
    guidance = Guidance((1.5, 7.0), 0.3).within((0.5, 1.0), 4)
    assert [guidance.at(row).branches for row in range(4)] == [1, 1, 3, 3]
    assert guidance.counts == (3, 1)
    assert Guidance((1.5,)).within(None, 4).counts == (2,)
    pipe = load(sd1, backend="eager")
    job = pipe.job(**{**CALL, "prompt": ["a cat", "a dog"]}, guidance_interval=(0.5, 1.0))
    conditions = pipe.plan(job).conditions["encoder_hidden_states"]
    alone = pipe.plan(pipe.job(**{**CALL, "prompt": ["a cat", "a dog"], "guidance_scale": 1.0})).conditions
    assert torch.equal(conditions[-2:], alone["encoder_hidden_states"])


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.0, 1.1), 0.5, ("a", "b"), (0, 0.5, 1)])
def test_intervals_that_are_none_are_refused(sd1: Path, interval: Any) -> None:
    with pytest.raises(InputError, match=r"guidance_interval is .*0 <= start < end <= 1"):
        load(sd1, backend="null").job(**CALL, guidance_interval=interval)


def test_an_interval_without_effect_is_refused(sd1: Path) -> None:
    pipe = load(sd1, backend="null")
    with pytest.raises(InputError, match="not guided"):
        pipe.plan(pipe.job(**{**CALL, "guidance_scale": 1.0}, guidance_interval=(0.2, 0.8)))
    with pytest.raises(InputError, match="none of 6 steps"):
        pipe.plan(pipe.job(**CALL, guidance_interval=(0.51, 0.6)))


def test_a_denoiser_for_one_batch_says_that_it_cannot(sd1: Path) -> None:
    pipe = load(sd1, backend="null")
    whole: Any = pipe.program("unet")
    limited = whole.interface.limited({"batch": Axis("batch", 1, 2, 2)})
    fixed = replace(whole, program=replace(whole.program, interface=limited))
    pipe.program = lambda part: fixed if part == "unet" else whole  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"cannot draw .*1 branches.*batch is 1, expected 2"):
        pipe.plan(pipe.job(**CALL, guidance_interval=(0.2, 0.8)))


def test_a_recorded_interval_is_replayed(sd1: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    call = ["generate", "a cat", "--model", str(sd1), "--steps", "4", "--seed", "1", "--backend", "eager"]
    assert main([*call, "--guidance-interval", "0.2", "0.8", "--out", str(out)]) == 0
    assert read_request(out)["request"]["guidance_interval"] == [0.2, 0.8]
    assert main(["replay", str(out), "--out", str(again), "--min-psnr", "100"]) == 0
    assert read_request(again)["request"] == read_request(out)["request"]
