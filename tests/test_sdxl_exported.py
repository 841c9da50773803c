"""SDXL, its refiner and its distilled kind from exported folders, compared with eager."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import ENGINES, FORMATS, exported
from parity import Agrees, relative
from pictures import beside_eager, mask, picture

import anamorph
from anamorph import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from anamorph.backends.openvino import OpenVino
from anamorph.interface import Interface
from anamorph.probes import probe

CALL: dict[str, Any] = {"prompt": ["a red cat", "a dog"], "negative_prompt": "blue", "num_inference_steps": 4,
                        "seed": 3, "guidance_rescale": 0.3, "clip_skip": 1}  # fmt: skip
SOURCE: dict[str, Any] = {"image": picture(16, 16), "strength": 0.7}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_task_equals_eager(agrees: Agrees, sdxl: Path, engine: str) -> None:
    sizes = {"original_size": (30, 20), "crops_coords_top_left": (3, 4), "prompt_2": "of a cat"}
    inpainting = {**SOURCE, "mask_image": mask(16, 16), "height": 16, "width": 16}
    for kind, changes in (
        (StableDiffusionXLPipeline, {**sizes, "height": 24, "width": 16}),
        (StableDiffusionXLImg2ImgPipeline, SOURCE),
        (StableDiffusionXLInpaintPipeline, inpainting),
    ):
        agrees(kind.__name__, beside_eager(sdxl, engine, kind, **CALL, **changes), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_refiner_equals_eager(agrees: Agrees, refiner: Path, engine: str) -> None:
    kind = StableDiffusionXLImg2ImgPipeline
    agrees(kind.__name__, beside_eager(refiner, engine, kind, **CALL, **SOURCE, aesthetic_score=7.0), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_distilled_model_equals_eager(agrees: Agrees, distilled: Path, engine: str) -> None:
    kind = StableDiffusionXLPipeline
    found = beside_eager(distilled, engine, kind, anamorph.LCMScheduler, **CALL, guidance_scale=8.5)
    agrees(kind.__name__, found, engine)


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_without_guidance_no_other_branch_is_computed(sdxl: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(
        sdxl if engine == "eager" else exported(sdxl, engine), backend=engine
    )
    check, seen = Interface.check, []

    def recording(interface: Interface, inputs: Any) -> dict[str, int]:
        if interface.component == "unet":
            seen.append(len(inputs["sample"]))
        return check(interface, inputs)

    monkeypatch.setattr(Interface, "check", recording)
    branches: Sequence[tuple[float, int]] = ((0.0, 1), (1.0, 1), (1.5, 2))
    for scale, count in branches:
        pipe(["a", "b"], num_inference_steps=1, guidance_scale=scale, output_type="latent")  # compiles for its size
        seen.clear()
        pipe(["a", "b"], num_inference_steps=2, guidance_scale=scale, output_type="latent")
        assert set(seen) == {2 * count}


def test_openvino_knows_a_late_timestep_and_large_sizes_in_bfloat16(sdxl: Path) -> None:
    """A timestep of 999 and a side of 1021 pixels have no bfloat16: rounded, their angles would be others."""
    if "bfloat16" not in OpenVino().precisions("cpu"):
        pytest.skip("the processor has no bfloat16")
    sizes = {"batch": 2, "latent_height": 8, "latent_width": 8, "sequence": 5}

    def predicted(engine: str, precision: str) -> np.ndarray:
        folder, wish = (sdxl, "none") if engine == "eager" else (exported(sdxl, engine), None)
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, backend=engine, torch_dtype=precision, rewrites=wish)
        program = pipe.program("unet")
        given = probe(program.interface.required, sizes)
        given |= {"timestep": np.full_like(given["timestep"], 999), "time_ids": np.full_like(given["time_ids"], 1021)}
        arrays = program.arrays
        found = program.session()({name: arrays.put(value) for name, value in given.items()})
        return arrays.get(next(iter(found.values())))

    exact = predicted("eager", "float32")
    eager, openvino = (relative(predicted(engine, "bfloat16"), exact) for engine in ("eager", "openvino"))
    assert openvino < 1.3 * eager
