"""Latent consistency models compared with diffusers step by step in float32."""

import functools
from pathlib import Path
from typing import Any

import pytest
from parity import LATENT_BOUND, Agrees, ours, reference, worst
from pictures import picture

import anamorph
from anamorph import LatentConsistencyModelPipeline, StableDiffusionPipeline
from anamorph.errors import ConfigError, InputError

TEXT, IMAGE = "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"
CALL: dict[str, Any] = {"prompt": ["a red cat", "a photo of dogs"], "num_inference_steps": 3, "guidance_scale": 6.0}


@functools.cache
def opened(folder: Path, kind: str) -> Any:
    return getattr(anamorph, kind).from_pretrained(folder, backend="eager")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (TEXT, {}),
        (TEXT, {"original_inference_steps": 20}),
        (TEXT, {"guidance_scale": 0.5, "num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)}),
        (TEXT, {"timesteps": [900, 500, 100], "num_inference_steps": None}),
        (IMAGE, {}),
        (IMAGE, {"strength": 0.5, "original_inference_steps": 25}),
        ("StableDiffusionPipeline", {}),
    ],
)
def test_every_step_equals_diffusers(agrees: Agrees, lcm: Path, kind: str, changes: dict[str, Any]) -> None:
    seeds, changes = changes.get("seeds", (3, 4)), {k: v for k, v in changes.items() if k != "seeds"}
    call = {**CALL, **({"image": picture(16, 16)} if kind == IMAGE else {}), **changes}
    expected = reference(lcm, None, seeds, kind, **call)
    agrees(kind, worst(ours(opened(lcm, kind), seeds, **call), expected))
    other = {**call, "guidance_scale": call["guidance_scale"] + 0.05}
    assert worst(ours(opened(lcm, kind), seeds, **other), expected)[0] > LATENT_BOUND


def test_another_kind_of_model_is_refused(sd1: Path, lcm: Path) -> None:
    with pytest.raises(ConfigError, match="takes no guidance as an input"):
        LatentConsistencyModelPipeline.from_pretrained(sd1, backend="null")
    with pytest.raises(InputError, match="original_inference_steps is 0"):
        opened(lcm, TEXT).job("x", original_inference_steps=0)
    with pytest.raises(TypeError, match="negative_prompt"):
        opened(lcm, TEXT).job("x", negative_prompt="y")
    assert StableDiffusionPipeline.from_pretrained(lcm, backend="null") is not None
