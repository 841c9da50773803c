"""Every scheduler on every engine: the bundled model, its latents after every step against eager."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import relative

from anamorph import StableDiffusionPipeline
from anamorph.checkpoint import BUNDLED
from anamorph.cli.common import scheduler_class
from anamorph.schedulers import SCHEDULERS

LATENTS = 1e-4
"""Largest relative L2 difference of the latents after any step."""
NAMES = sorted(set(SCHEDULERS) - {"RePaintScheduler"})  # its step takes a picture and a mask
EXTRA = {"PNDMScheduler": {"skip_prk_steps": True}, "FlowMatchEulerDiscreteScheduler": {"shift": 3.0}}
"""What three steps need beyond the checkpoint's own configuration."""


def latents(pipe: StableDiffusionPipeline, name: str) -> list[NDArray[Any]]:
    """After every step, from a checkpoint's configuration that each class takes over."""
    original = pipe.scheduler
    config = {"clip_sample": False, **original.config, **EXTRA.get(name, {})}
    pipe.scheduler = scheduler_class(name, config)
    try:
        call = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 64, "width": 64, "seed": 0}
        return [np.asarray(state.latents).copy() for state in pipe.steps("red apple", **call)]
    finally:
        pipe.scheduler = original


@pytest.fixture(scope="module")
def expected() -> dict[str, list[NDArray[Any]]]:
    pipe = StableDiffusionPipeline.from_pretrained(BUNDLED, backend="eager")
    return {name: latents(pipe, name) for name in NAMES}


@pytest.mark.parametrize("engine", [*FORMATS, "compile"])
def test_latents_of_all_schedulers_follow_eager(
    engine: str, expected: dict[str, list[NDArray[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One test per engine, because opening one takes longer than all of its steps. What schedulers do to a compiled step
    # does not hang on Inductor, which takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = exported(BUNDLED, engine) if engine in FORMATS else BUNDLED
    others = engine if engine in FORMATS else "eager"  # the steps need no compiled text encoder
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend={"unet": engine, "default": others})
    assert pipe.placement["unet"].engine == engine
    worst = {}
    for name, wanted in expected.items():
        found = latents(pipe, name)
        assert len(found) == len(wanted) >= 3
        worst[name] = max(relative(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(worst) == len(NAMES) >= 25
    assert {name: value for name, value in worst.items() if not value <= LATENTS} == {}
