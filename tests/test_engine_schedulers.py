"""Every scheduler on every engine: the bundled model, its latents after every step against eager."""

from typing import Any

import numpy as np
import pytest
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

pipes: dict[str, StableDiffusionPipeline] = {}
references: dict[str, list[NDArray[Any]]] = {}


def pipeline(engine: str) -> StableDiffusionPipeline:
    if engine not in pipes:
        folder = BUNDLED if engine == "eager" else exported(BUNDLED, engine)
        pipes[engine] = StableDiffusionPipeline.from_pretrained(folder, backend=engine)  # type: ignore[assignment]
    return pipes[engine]


def latents(engine: str, name: str) -> list[NDArray[Any]]:
    """After every step, from a checkpoint's configuration that each class takes over."""
    pipe = pipeline(engine)
    original = pipe.scheduler
    config = {"clip_sample": False, **original.config, **EXTRA.get(name, {})}
    pipe.scheduler = scheduler_class(name, config)
    try:
        call = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 0}
        return [np.asarray(state.latents).copy() for state in pipe.steps("red apple", **call)]
    finally:
        pipe.scheduler = original


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", FORMATS)
def test_latents_follow_eager(engine: str, name: str) -> None:
    if name not in references:
        references[name] = latents("eager", name)
    found = latents(engine, name)
    assert len(found) == len(references[name]) >= 3
    assert np.isfinite(found[-1]).all()
    worst = max(relative(a, b) for a, b in zip(found, references[name], strict=True))
    assert worst <= LATENTS
