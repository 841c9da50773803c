"""Steps that compute the last layer alone: what diffusers' own model computes with an older state before that layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import LATENT_BOUND, relative
from test_guidance_interval import load, steps
from test_native import BOUND, conditions, model, normal, on_eager, on_graphs

from anamorph.arrays import to_numpy
from anamorph.artifact import NATIVE
from anamorph.cli import main
from anamorph.errors import InputError
from anamorph.image import read_request
from anamorph.native import CACHING, KEYS, PREFIX, TIMES

REWRITES = (KEYS, TIMES, PREFIX, CACHING)


class Caching:
    """diffusers' UNet whose last layer of the way up may see what entered it in an earlier call."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.kept, self.full = unet, None, True
        unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self._enter)

    def _enter(self, _module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        deep, skip = inputs[0].tensor_split([self.unet.config.block_out_channels[0]], dim=1)
        self.kept = deep if self.full else self.kept
        return (torch.cat((self.kept, skip), dim=1), *inputs[1:])

    def __call__(self, full: bool, *arguments: Any, **more: Any) -> NDArray[Any]:
        self.full = full
        with torch.inference_mode():
            predicted: NDArray[Any] = self.unet(*arguments, **more).sample.numpy()
        return predicted


def expected(theirs: Any, samples: Sequence[NDArray[Any]], told: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """A full call, and one that computes the last layer alone."""
    given = {name: torch.from_numpy(value) for name, value in told.items()}
    text = given.pop("encoder_hidden_states")
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    caching = Caching(theirs)
    return [
        caching(index == 0, torch.from_numpy(sample), t, text, added_cond_kwargs=added or None, **given)
        for index, (sample, t) in enumerate(zip(samples, (801.0, 3.5), strict=True))
    ]


@pytest.mark.parametrize("rewrites", [REWRITES, (TIMES, CACHING), (KEYS, CACHING), (CACHING,)], ids="-".join)
@pytest.mark.parametrize("name", ["sd1", "deep", "xl", "lcm"])
def test_a_shallow_step_takes_the_deep_state_of_the_full_one(name: str, rewrites: tuple[str, ...]) -> None:
    unet, theirs = model(name)
    if name in ("xl", "lcm"):
        rewrites = tuple(one for one in rewrites if one != PREFIX)
    compare(on_eager(unet, rewrites), theirs, conditions(unet, 6))


@pytest.mark.parametrize(("name", "engine"), [("sd1", "onnxruntime"), ("xl", "openvino")])
def test_graphs_compute_the_last_layer_alone(name: str, engine: str, tmp_path: Path) -> None:
    unet, theirs = model(name)
    rewrites = tuple(one for one in REWRITES if one != PREFIX or name == "sd1")
    compare(on_graphs(engine, unet, rewrites, tmp_path), theirs, conditions(unet, 6))


def compare(made: Any, theirs: Any, told: dict[str, NDArray[Any]]) -> None:
    samples = [normal(seed, 3, 4, 8, 12) for seed in (1, 2)]
    twice = [np.concatenate([sample] * 2) for sample in samples]
    exact = expected(theirs, twice, told)
    put, seen = made.arrays.put, samples if made.shares else twice
    given = {name: put(value) for name, value in told.items()}
    branches = 2 if made.shares else 1
    for refresh in (2, 0.9):  # the samples are independent: they differ by more than themselves
        predict = made.prepare([801.0, 3.5], given, branches, refresh)
        found = [made.arrays.get(predict(n, put(sample))) for n, sample in enumerate(seen)]
        assert relative(found[0], exact[0]) <= BOUND
        assert (relative(found[1], exact[1]) <= BOUND) == (refresh == 2)


def reference(folder: Path, start: NDArray[Any], every: int, count: int) -> list[NDArray[Any]]:
    """diffusers' models in a guided loop that computes every so many steps in full."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    told = torch.cat(pipe.encode_prompt("a cat", "cpu", 1, True)[::-1])
    pipe.scheduler.set_timesteps(count)
    caching, x, latents = Caching(pipe.unet), torch.from_numpy(start), []
    for step, t in enumerate(pipe.scheduler.timesteps):
        less, more = np.split(caching(step % every == 0, torch.cat([x] * 2), t, told), 2)
        x = pipe.scheduler.step(torch.from_numpy(less + 5.0 * (more - less)), t, x).prev_sample
        latents.append(x.numpy().copy())
    return latents


@pytest.mark.parametrize("every", [1, 2, 4])
def test_pictures_take_a_full_step_now_and_then(sd1: Path, every: int) -> None:
    pipe = load(sd1, backend="eager", rewrites=REWRITES)
    seen: list[int] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    start = pipe.plan(pipe.job(prompt="a cat", seed=3, num_inference_steps=6)).latents
    found = steps(pipe, step_caching=every)
    assert len(seen) == -(-6 // every)
    for mine, theirs in zip(found, reference(sd1, to_numpy(start), every, 6), strict=True):
        assert relative(mine, theirs) <= LATENT_BOUND
    assert (relative(found[-1], steps(pipe)[-1]) > 1e-3) == (every > 1)


def test_a_part_of_one_asks_for_full_steps_where_samples_have_changed(sd1: Path) -> None:
    pipe = load(sd1, backend="eager", rewrites=REWRITES)
    samples: list[NDArray[Any]] = []
    full: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda _module, inputs, _out: samples.append(to_numpy(inputs[0]).copy()))
    pipe.unet.mid_block.register_forward_hook(lambda *_: full.append(len(samples) - 1))
    steps(pipe, step_caching=0.3, num_inference_steps=20)
    due = [0]
    for step, sample in enumerate(samples):
        last = samples[due[-1]]
        if abs(sample - last).sum() > 0.3 * abs(last).sum():
            due.append(step)
    assert full == due
    assert 2 < len(full) < 20


@pytest.mark.parametrize("engine", FORMATS)
def test_engines_draw_what_eager_draws(sd2: Path, engine: str) -> None:
    place = exported(sd2, engine, NATIVE, rewrites=REWRITES)
    for interval in (None, (0.0, 0.5)):
        call = {"step_caching": 2, "guidance_interval": interval}
        exact = steps(load(sd2, backend="eager", rewrites=REWRITES), **call)
        for mine, theirs in zip(steps(load(place), **call), exact, strict=True):
            assert relative(mine, theirs) <= 1e-4


def test_a_denoiser_without_a_shallow_part_says_so(sd1: Path) -> None:
    with pytest.raises(InputError, match=r"unet cannot cache steps: .* rewrite step-caching; name it"):
        steps(load(sd1, backend="eager"), step_caching=2)


@pytest.mark.parametrize("value", [0, -1, 1.5, 1.0, 0.0, True, "2", float("nan")])
def test_numbers_that_say_nothing_are_refused(sd1: Path, value: Any) -> None:
    with pytest.raises(InputError, match=r"step_caching is .*expected a whole number of steps, or a part between"):
        steps(load(sd1, backend="eager"), step_caching=value)


def test_the_command_line_records_it(sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    given = ["generate", "a cat", "--model", str(sd1), "--backend", "eager", "--steps", "2", "--out", str(out)]
    assert main([*given, "--rewrites", ",".join(REWRITES), "--step-caching", "2"]) == 0
    assert read_request(out)["request"]["step_caching"] == 2
    again = ["replay", str(out), "--out", str(tmp_path / "again.png")]
    assert main([*again, "--min-psnr", "100"]) == 0
    assert main([*again, "--rewrites", "none"]) == main([*given, "--step-caching", "2"]) == 2
    assert capsys.readouterr().err.count("cannot cache steps") == 2
