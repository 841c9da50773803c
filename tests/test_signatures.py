"""Every pipeline's arguments: names, order and defaults are diffusers', and are shown to help and editors."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from anamorph.pipelines.sampling import Guidance
from anamorph.pipelines.signature import OUTPUT, Signature

KINDS = [name for name in DiffusionPipeline.registry if hasattr(diffusers, name)]
ABSENT = {"kwargs", "callback", "callback_steps"}
"""What diffusers takes and no pipeline here does; the callbacks are those of before `callback_on_step_end`."""


def described(function: Any) -> dict[str, Any]:
    """Names that have a position -> defaults; what must be given counts as None."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: tuple(p.default) if isinstance(p.default, list) else None if p.default is p.empty else p.default
            for p in parameters if p.name not in ABSENT and p.kind is p.POSITIONAL_OR_KEYWORD}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_names_order_and_defaults_are_those_of_diffusers(name: str) -> None:
    ours = described(DiffusionPipeline.registry[name].__call__)  # type: ignore[operator]
    theirs = described(getattr(diffusers, name).__call__)
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("name", KINDS)
def test_components_are_those_of_diffusers_in_its_order(name: str) -> None:
    taken = list(inspect.signature(getattr(diffusers, name).__init__).parameters)[1:]
    kind = DiffusionPipeline.registry[name]
    for names in (kind.SLOTS, kind.OPTIONS):  # settings are given by name: where diffusers mixes both, it may differ
        assert list(names) == sorted(names, key=taken.index)


def test_help_shows_every_argument_with_its_meaning() -> None:
    text = StableDiffusionImg2ImgPipeline.__call__.__doc__ or ""
    assert all(f"\n    {name}: " in text for name in StableDiffusionImg2ImgPipeline.TAKES.all)
    assert not set(OUTPUT) & set(inspect.signature(StableDiffusionImg2ImgPipeline.job).parameters)


def test_a_subclass_shows_its_own_arguments_alone() -> None:
    class Narrow(StableDiffusionPipeline, public=False):
        TAKES = Signature.of("prompt * seed")

    assert list(inspect.signature(Narrow.__call__).parameters) == ["self", "prompt", "seed"]
    assert (Narrow.__call__.__doc__ or "").count("Arguments:") == 1


def test_arguments_have_the_positions_of_diffusers(sd1: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    assert isinstance(pipe, StableDiffusionPipeline)
    request = pipe.job("a cat", 40, 48, 7).request
    assert (request.height, request.width, request.num_inference_steps) == (40, 48, 7)
    with pytest.raises(TypeError, match="'height' by position and by name"):
        pipe.job("a cat", 40, height=40)
    with pytest.raises(TypeError, match="arguments by position"):
        pipe.job(*[None] * 30)


def test_steps_count_only_without_timesteps_of_the_callers_own() -> None:
    signature = Signature.of("num_inference_steps timesteps * seed", num_inference_steps=12)
    assert signature.bind("x", (), {})["num_inference_steps"] == 12
    assert signature.bind("x", (), {"timesteps": [5, 3]})["num_inference_steps"] is None
    assert signature.bind("x", (7,), {})["num_inference_steps"] == 7


def test_guidance_weighs_any_number_of_branches() -> None:
    u, i, c = np.random.default_rng(0).standard_normal((3, 2, 4, 3, 3))
    out = np.concatenate([u, i, c])
    assert np.array_equal(Guidance().combine(out), out)
    # Classifier-free guidance, and InstructPix2Pix (Brooks et al. 2023, eq. 3).
    assert np.allclose(Guidance((7.5,)).combine(out[:4]), u + 7.5 * (i - u), rtol=1e-12)
    assert np.allclose(Guidance((1.5, 7.0)).combine(out), u + 1.5 * (i - u) + 7.0 * (c - i), rtol=1e-12)
