"""Engines that run exported folders, against PyTorch eager."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import Agrees, relative

from anamorph import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from anamorph.backends.openvino import OpenVino
from anamorph.errors import BackendError, InputError
from anamorph.image import psnr

LATENTS, DECIBEL = 1e-4, 60.0
"""Largest relative L2 difference of the latents after any step, and least PSNR of the picture (float32)."""
ENGINES = tuple(FORMATS)
TWO = ["a cat", "a photo of a red dog"]


@pytest.fixture(params=["sd1", "sd2"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def run(pipe: StableDiffusionPipeline, **call: Any) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """Latents after every step and the pictures."""
    latents = []
    for state in pipe.steps(**{"num_inference_steps": 4, "guidance_scale": 5.0, **call}):
        latents.append(np.asarray(state.latents).copy())
        last = state
    return latents, last.preview("np")


def distance(a: list[NDArray[Any]], b: list[NDArray[Any]]) -> float:
    assert len(a) == len(b)
    return max(relative(x, y) for x, y in zip(a, b, strict=True))


def load(folder: Path, **arguments: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, **arguments)  # type: ignore[return-value]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_picture_as_eager(agrees: Agrees, checkpoint: Path, engine: str) -> None:
    eager, pipe = load(checkpoint, backend="eager"), load(exported(checkpoint, engine))
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    for height, width, seeds in ((64, 64, [0, 1]), (96, 64, [5, 2])):
        call = {"prompt": TWO, "height": height, "width": width, "seed": seeds}
        reference, picture = run(eager, **call)
        latents, drawn = run(pipe, **call)
        difference = distance(latents, reference), float(np.abs(picture - drawn).max())
        agrees(type(pipe).__name__, difference, engine)
    call = {"prompt": "a cat", "num_images_per_prompt": 3, "seed": 4, "height": 64, "width": 64, "guidance_scale": 1.0}
    assert distance(run(pipe, **call)[0], run(eager, **call)[0]) <= LATENTS


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slightly_different_request_exceeds_the_bound(sd1: Path, engine: str) -> None:
    pipe = load(exported(sd1, engine))
    call = {"prompt": "a cat", "seed": 3}
    assert distance(run(pipe, **call)[0], run(pipe, **call, guidance_scale=5.01)[0]) > LATENTS


SCHEDULERS = {
    "DDIM": DDIMScheduler, "DDPM": DDPMScheduler, "PNDM": PNDMScheduler, "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler, "DPM-Solver++": DPMSolverMultistepScheduler,
}  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEDULERS, "Euler with Karras' sigmas"])
def test_every_scheduler_on_every_engine(sd1: Path, name: str) -> None:
    eager = load(sd1, backend="eager")
    config = dict(eager.scheduler.config)
    scheduler = SCHEDULERS.get(name, EulerDiscreteScheduler).from_config(
        {**config, "use_karras_sigmas": True} if name not in SCHEDULERS else config
    )
    eager.scheduler = scheduler
    reference = run(eager, prompt="a cat", seed=1)[0]
    for engine in ENGINES:
        pipe = load(exported(sd1, engine), scheduler=scheduler)
        assert distance(run(pipe, prompt="a cat", seed=1)[0], reference) <= LATENTS, engine


@pytest.mark.parametrize("engine", ENGINES)
def test_awkward_sizes_are_served_equally_or_refused(sd1: Path, engine: str) -> None:
    eager, pipe = load(sd1, backend="eager"), load(exported(sd1, engine))
    served = 0
    sizes = ((32, 32), (32, 96), (96, 32), (40, 64), (64, 72), (8, 8), (160, 32), (104, 40), (128, 64), (33, 32))
    for height, width in sizes:
        call = {"prompt": "a dog", "seed": 1, "height": height, "width": width, "num_inference_steps": 2}
        if height % 32 or width % 32:
            with pytest.raises(InputError, match=r"multiple of|expected 4 or more"):
                run(pipe, **call)
        else:
            assert distance(run(pipe, **call)[0], run(eager, **call)[0]) <= LATENTS
            served += 1
    assert served == 5


def test_openvino_in_bfloat16(sd1: Path) -> None:
    if "bfloat16" not in OpenVino().precisions("cpu"):
        pytest.skip("the processor has no bfloat16")
    pipe = load(exported(sd1, "openvino"), torch_dtype="bfloat16")
    assert {placed.precision for placed in pipe.placement.values()} == {"bfloat16"}
    exact = load(exported(sd1, "openvino"))
    assert {placed.precision for placed in exact.placement.values()} == {"float32"}
    call = {"prompt": "a cat", "seed": 3}
    close = psnr(run(exact, **call)[1], run(pipe, **call)[1])
    assert 30 <= close < DECIBEL  # bfloat16 was really used, and came near


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_cannot_do_is_refused(sd1: Path, engine: str) -> None:
    folder = exported(sd1, engine)
    with pytest.raises(BackendError, match="float16"):
        load(folder, torch_dtype="float16")
    with pytest.raises(BackendError, match="cuda"):
        load(folder, device="cuda")
    with pytest.raises(BackendError, match="eager opens checkpoint"):
        load(folder, backend="eager")
    with pytest.raises(InputError, match="copy it"):
        load(folder).save_pretrained(folder.parent / "never")
    with pytest.raises(InputError, match="variant"):
        load(folder, variant="fp16")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_threads_draw_what_one_does(sd1: Path, engine: str) -> None:
    pipe = load(exported(sd1, engine))
    expected = [run(pipe, prompt="a cat", seed=seed)[1] for seed in (1, 2)]
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: run(pipe, prompt="a cat", seed=seed)[1]}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.abs(results[1] - expected[0]).max() <= 1e-5
    assert np.abs(results[2] - expected[1]).max() <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_of_one_call_survive_the_next(sd1: Path, engine: str) -> None:
    session = load(exported(sd1, engine)).components["text_encoder"].programs["text_encoder"].session()
    first = session({"input_ids": np.full((1, 77), 5)})["last_hidden_state"]
    kept = first.copy()
    session({"input_ids": np.full((1, 77), 9)})
    assert np.array_equal(first, kept)


def test_a_checkpoint_is_exported_once_for_an_engine_that_needs_it(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path))
    caplog.set_level("INFO", logger="anamorph.exporting")
    pipe = load(sd1, backend={"unet": "onnxruntime", "default": "eager"})
    assert [placed.engine for placed in pipe.placement.values()] == ["eager", "eager", "onnxruntime", "onnxruntime"]
    assert "exporting to onnx once" in caplog.text
    folders = list((tmp_path / "exports").iterdir())
    assert len(folders) == 1
    written = (folders[0] / "unet" / "model.onnx").stat().st_mtime_ns
    caplog.clear()
    again = load(sd1, backend="onnxruntime")
    assert "taking the onnx export" in caplog.text
    assert (folders[0] / "unet" / "model.onnx").stat().st_mtime_ns == written
    call = {"prompt": "a cat", "seed": 3}
    assert distance(run(pipe, **call)[0], run(again, **call)[0]) <= LATENTS


def test_a_module_cannot_go_to_an_engine_that_needs_an_export(sd1: Path) -> None:
    from anamorph import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    with pytest.raises(BackendError, match="save_pretrained"):
        load(sd1, unet=unet, backend={"unet": "onnxruntime", "default": "eager"})
