"""The tasks of the first and second kind from exported folders, compared with eager."""

from pathlib import Path
from typing import Any

import pytest
from exported import ENGINES
from parity import Agrees
from pictures import beside_eager, mask, picture

import anamorph

CALL: dict[str, Any] = {"prompt": ["a red cat", "a dog"], "num_inference_steps": 5, "seed": 3}
GUIDED: dict[str, Any] = {**CALL, "guidance_scale": 5.0, "guidance_rescale": 0.3, "clip_skip": 1}
SOURCE: dict[str, Any] = {"image": picture(), "strength": 0.7}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sd1", "StableDiffusionImg2ImgPipeline", {**GUIDED, **SOURCE}),
    ("sd1", "StableDiffusionInpaintPipeline", {**GUIDED, **SOURCE, "mask_image": mask()}),
    ("inpaint", "StableDiffusionInpaintPipeline", {**GUIDED, **SOURCE, "mask_image": mask()}),
    ("lcm", "LatentConsistencyModelPipeline", CALL),
    ("lcm", "LatentConsistencyModelImg2ImgPipeline", {**CALL, **SOURCE}),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "kind", "call"), CASES, ids=[f"{name}-{kind}" for name, kind, _ in CASES])
def test_every_task_equals_eager(
    agrees: Agrees, name: str, kind: str, call: dict[str, Any], engine: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    agrees(kind, beside_eager(folder, engine, getattr(anamorph, kind), **call), engine)
