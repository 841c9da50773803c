"""Engines against PyTorch eager at awkward sizes, on the bundled model, and in bfloat16."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import relative
from test_engines import DECIBEL, LATENTS, distance, load, run

from anamorph.backends.openvino import OpenVino
from anamorph.checkpoint import BUNDLED, Source, open_checkpoint
from anamorph.engine import Target
from anamorph.errors import InputError
from anamorph.exporters.references import load as load_model
from anamorph.exporters.settling import read_components
from anamorph.image import psnr

BFLOAT16 = 30.0
"""Least PSNR of a picture in bfloat16."""
ENGINES = tuple(FORMATS)
SIZES = ((4, 4), (4, 64), (64, 4), (6, 10), (2, 2), (20, 12), (7, 8), (28, 44), (12, 1), (0, 8))
"""Height x width in pixels, of a checkpoint that takes multiples of 4: smallest, elongated, uneven, and none."""
SERVED = {(height, width) for height, width in SIZES if height and not height % 4 and not width % 4}
PROMPTS = ("a red apple", "a rocket")


@pytest.mark.parametrize("engine", ENGINES)
def test_ten_sizes_are_served_as_eager_does_or_refused(sd2: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pipeline for all, beginning with the smallest: neither a served nor a refused size may disturb the next."""
    module = importlib.import_module(f"anamorph.backends.{engine}")
    prepared, ran = module.prepared, []
    monkeypatch.setattr(module, "prepared", lambda interface, *one: ran.append(interface) or prepared(interface, *one))
    eager, pipe = load(sd2, backend="eager"), load(exported(sd2, engine))
    assert len(SIZES) == 10
    assert len(SERVED) == 5
    for height, width in SIZES:
        call: dict[str, Any] = {"prompt": "a dog", "seed": 1, "height": height, "width": width}
        ran.clear()
        if (height, width) not in SERVED:
            with pytest.raises(InputError, match=r"height|width"):
                pipe(**call)
            assert ran == [], "something ran before the size was refused"
            continue
        latents, picture = run(pipe, **call)
        expected, reference = run(eager, **call)
        assert distance(latents, expected) <= LATENTS, (height, width)
        assert psnr(reference, picture) >= DECIBEL
        assert picture.shape[1:3] == (height, width)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lengths", [(1, 77, 16), (16, 1, 33)])
def test_a_first_text_of_one_token_does_not_spoil_the_next(sd2: Path, engine: str, lengths: tuple[int, ...]) -> None:
    """OpenVINO's fused attention would return wrong values from 16 keys on."""
    components = read_components(open_checkpoint(Source(str(sd2))))
    model = load_model(next(component for component in components if component.name == "text_encoder"))
    session = load(exported(sd2, engine)).components["text_encoder"].programs["text_encoder"].session()
    for length in lengths:
        ids = np.random.default_rng(length).integers(0, 500, (2, length))
        with torch.inference_mode():
            expected = getattr(model, model.PARTS["text_encoder"])(torch.from_numpy(ids))[0].numpy()
        value = np.asarray(session({"input_ids": ids})["last_hidden_state"])
        assert relative(value, expected) <= LATENTS, length


@pytest.mark.parametrize("engine", ENGINES)
def test_a_session_called_outside_its_sizes_runs_nothing(sd2: Path, engine: str) -> None:
    """An engine may answer a wrong size with its last result: the call must not reach it."""
    session = load(exported(sd2, engine)).components["unet"].programs["unet"].session()

    def call(height: int, width: int, channels: int = 4, batch: int = 2) -> dict[str, Any]:
        random = np.random.default_rng(0)
        sample = random.standard_normal((batch, channels, height, width), np.float32)
        text = random.standard_normal((2, 7, 32), np.float32)
        return {"sample": sample, "timestep": np.float32(500.5), "encoder_hidden_states": text}

    first = session(call(4, 6))["out_sample"].copy()
    for wrong in (call(3, 6), call(4, 7), call(0, 6), call(4, 6, channels=5), call(4, 6, batch=3)):
        with pytest.raises(InputError):
            session(wrong)
    np.testing.assert_array_equal(session(call(4, 6))["out_sample"], first)
    assert session(call(6, 4))["out_sample"].shape == (2, 4, 6, 4)


@pytest.fixture(scope="module")
def bundled() -> dict[tuple[int, int], tuple[list[NDArray[Any]], NDArray[Any]]]:
    """What eager draws with the bundled model: two prompts at 64 x 64 and 96 x 64."""
    eager = load(BUNDLED, backend="eager")
    return {size: run(eager, **_two(size)) for size in ((64, 64), (96, 64))}


def _two(size: tuple[int, int]) -> dict[str, Any]:
    return {"prompt": list(PROMPTS), "seed": [4, 9], "height": size[0], "width": size[1], "num_inference_steps": 4}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bundled_model_draws_what_eager_draws(
    bundled: dict[tuple[int, int], tuple[list[NDArray[Any]], NDArray[Any]]], engine: str
) -> None:
    pipe = load(exported(BUNDLED, engine))
    for size, (expected, reference) in bundled.items():
        latents, picture = run(pipe, **_two(size))
        assert distance(latents, expected) <= LATENTS, size
        assert psnr(reference, picture) >= DECIBEL
    # Sensitive enough to notice another guidance in the third digit.
    other, _ = run(pipe, **{**_two((64, 64)), "guidance_scale": 5.01})
    assert distance(other, bundled[64, 64][0]) > LATENTS


@pytest.mark.parametrize("engine", ENGINES)
def test_an_odd_batch_of_the_bundled_model(engine: str) -> None:
    call: dict[str, Any] = {"prompt": "a rocket", "num_images_per_prompt": 3, "seed": 6, "height": 64, "width": 64}
    latents, picture = run(load(exported(BUNDLED, engine)), **call)
    expected, reference = run(load(BUNDLED, backend="eager"), **call)
    assert len(picture) == 3
    assert distance(latents, expected) <= LATENTS
    assert psnr(reference, picture) >= DECIBEL


def test_the_bundled_model_in_bfloat16(
    bundled: dict[tuple[int, int], tuple[list[NDArray[Any]], NDArray[Any]]],
) -> None:
    if "bfloat16" not in OpenVino().precisions(Target().device):
        pytest.skip("the processor has no bfloat16")
    pipe = load(exported(BUNDLED, "openvino"), torch_dtype="bfloat16")
    assert {placed.precision for placed in pipe.placement.values()} == {"bfloat16"}
    for size, (_, reference) in bundled.items():
        assert BFLOAT16 <= psnr(reference, run(pipe, **_two(size))[1]) < DECIBEL, size
