"""Adapters on every engine beside diffusers with PEFT: hot, fused, several, weighed by blocks."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from adapters import ATTENTION, TEXT, WHOLE, drawn, factors, stored, theirs
from exported import COMPILED, FORMATS, exported
from parity import ENGINE_BOUND, IMAGE_BOUND, ours, worst
from PIL import Image

import anamorph
from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from anamorph.cli import OK, USAGE, main
from anamorph.errors import BackendError, InputError
from anamorph.image import read_request

ENGINES = ["eager", *FORMATS]
STEPS: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2}
BLOCKS = {"unet": {"down": 0.4, "mid": 0.5, "up": {"block_1": [0.1, 0.2]}}}
STAGES: dict[str, Callable[[Any], None]] = {
    "plain": lambda _: None,
    "first": lambda pipe: pipe.load_lora_weights(pipe.files[0], adapter_name="first"),
    "second": lambda pipe: pipe.load_lora_weights(pipe.files[1], adapter_name="second"),
    "both": lambda pipe: pipe.set_adapters(["first", "second"], [0.7, BLOCKS]),
    "off": lambda pipe: pipe.disable_lora(),
    "on": lambda pipe: pipe.enable_lora(),
    "fused": lambda pipe: pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.8),
    "fused alone": lambda pipe: pipe.unload_lora_weights(),
}
"""What is done to a pipeline, one after another, each with a picture behind it."""


@pytest.fixture(scope="module")
def files(sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter of all kinds of layers of a UNet and of the text encoder, and a small one."""
    place, pipe = tmp_path_factory.mktemp("adapters"), theirs(sd1)
    small = {"unet": factors(pipe, "unet", ATTENTION, rank=2, seed=3)}
    whole = {"text_encoder": factors(pipe, "text_encoder", TEXT, seed=1)}
    pipe = theirs(sd1)
    whole["unet"] = factors(pipe, "unet", WHOLE)
    return [stored(place / "whole", whole), stored(place / "small", small)]


class Staged:
    """A pipeline that knows the files of the test."""

    def __init__(self, pipe: Any, files: list[Path]) -> None:
        self.pipe, self.files = pipe, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def staged(pipe: Any, files: list[Path]) -> dict[str, Any]:
    """The picture after each stage."""
    pictures = {}
    for name, stage in STAGES.items():
        stage(Staged(pipe, files))
        pictures[name] = drawn(pipe)
    return pictures


@pytest.fixture(scope="module")
def expected(sd1: Path, files: list[Path]) -> dict[str, Any]:
    """diffusers' pictures."""
    return staged(theirs(sd1), files)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_stage_draws_what_diffusers_draws(
    sd1: Path, files: list[Path], expected: dict[str, Any], engine: str
) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend=engine)
    for name, stage in STAGES.items():
        stage(Staged(pipe, files))
        assert np.abs(drawn(pipe) - expected[name]).max() <= IMAGE_BOUND, name
    assert pipe.fused_loras == {"first", "second"}
    pipe.unfuse_lora()
    assert np.abs(drawn(pipe) - expected["plain"]).max() <= IMAGE_BOUND
    assert pipe.num_fused_loras == 0


def test_the_stages_differ(expected: dict[str, Any]) -> None:
    for before, name in zip(list(STAGES), list(STAGES)[1:-1], strict=False):
        assert np.abs(expected[name] - expected[before]).max() > 100 * IMAGE_BOUND


def test_adapters_are_named_chosen_and_forgotten(sd1: Path, files: list[Path]) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    plain = drawn(pipe)
    pipe.load_lora_weights(files[0].parent)
    pipe.load_lora_weights(str(files[1]), "mine")
    assert pipe.get_active_adapters() == ["mine", "default_0"]  # the other changes the text encoder, too
    assert pipe.get_list_adapters() == {"unet": ["default_0", "mine"], "text_encoder": ["default_0"]}
    pipe.set_adapters("mine")
    alone = drawn(pipe)
    assert pipe.placement["unet"].details["adapters"] == "mine"
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.get_active_adapters() == ["mine"]
    pipe.delete_adapters("default_0")
    assert np.array_equal(drawn(pipe), alone)
    pipe.load_lora_weights(files[0], "mine", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    pipe.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    assert np.array_equal(drawn(pipe), plain)


@pytest.fixture(scope="module")
def wide(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """An adapter of SDXL's UNet and both text encoders, and diffusers' pictures with it at two scales."""
    place, pipe = tmp_path_factory.mktemp("wide"), theirs(sdxl)
    parts = {"unet": factors(pipe, "unet", ATTENTION)}
    parts |= {name: factors(pipe, name, TEXT, seed=2) for name in ("text_encoder", "text_encoder_2")}
    file, other = stored(place, parts), theirs(sdxl)
    other.load_lora_weights(file)
    return file, drawn(other), drawn(other, cross_attention_kwargs={"scale": 0.3})


@pytest.mark.parametrize("engine", ENGINES)
def test_sdxl_with_both_text_encoders_and_scales_of_a_call(
    sdxl: Path, wide: tuple[Path, Any, Any], engine: str
) -> None:
    file, whole, part = wide
    pipe: Any = DiffusionPipeline.from_pretrained(sdxl, backend=engine)
    pipe.load_lora_weights(file)
    assert np.abs(drawn(pipe) - whole).max() <= IMAGE_BOUND
    assert np.abs(drawn(pipe, cross_attention_kwargs={"scale": 0.3}) - part).max() <= IMAGE_BOUND
    assert np.abs(whole - part).max() > 10 * IMAGE_BOUND
    with pytest.raises(InputError, match=r"cross_attention_kwargs\['scale'\] is 'much', expected a finite number"):
        pipe("a cat", cross_attention_kwargs={"scale": "much"})
    pipe.fuse_lora()
    assert np.abs(drawn(pipe) - whole).max() <= IMAGE_BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_exported_folders_take_adapters_and_their_latents_are_those_of_eager(
    sd1: Path, files: list[Path], engine: str
) -> None:
    """A portable folder holds its own weights, and no inputs of ours; adapters need neither."""
    other: Any = DiffusionPipeline.from_pretrained(exported(sd1, engine), backend=engine)
    eager: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    for pipe in (other, eager):
        pipe.load_lora_weights(files[0])
    assert worst(ours(other, [1], **STEPS), ours(eager, [1], **STEPS))[0] <= ENGINE_BOUND
    hot = ours(other, [1], **STEPS)
    other.fuse_lora()
    assert worst(ours(other, [1], **STEPS), hot)[0] <= ENGINE_BOUND


@pytest.mark.parametrize("part", ["text_encoder", *(["unet"] if COMPILED in os.environ else [])])
def test_torch_compile_is_not_run_again_for_other_adapters(
    sd1: Path, files: list[Path], caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """A UNet takes the compiler a minute, so that it is left to `make compiled`."""
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend={part: "compile", "default": "eager"})
    eager: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    for one in (pipe, eager):
        one.load_lora_weights(files[0], "first")
        one.load_lora_weights(files[0], "second")
    with caplog.at_level("INFO", logger="anamorph.backends.compile"):
        first = drawn(pipe)
        assert np.abs(first - drawn(eager)).max() <= ENGINE_BOUND
        for one in (pipe, eager):
            one.set_adapters(["first", "second"], [0.5, -0.2])
        assert np.abs(drawn(pipe) - drawn(eager)).max() <= ENGINE_BOUND
        assert np.abs(drawn(pipe) - first).max() > 10 * ENGINE_BOUND
    assert len([one for one in caplog.messages if one.startswith(f"compiling {part}")]) == 1


def test_other_tools_folders_and_int8_say_that_they_take_none(sd1: Path, tmp_path: Path, files: list[Path]) -> None:
    place = tmp_path / "folder"
    shutil.copytree(exported(sd1, "onnxruntime"), place)
    manifest = json.loads((place / "anamorph.json").read_text())
    manifest["parts"]["unet"]["storage"] = "int8"
    (place / "anamorph.json").write_text(json.dumps(manifest))
    pipe: Any = DiffusionPipeline.from_pretrained(place)
    with pytest.raises(BackendError, match="unet multiplies whole numbers of eight bits, which no adapter can change"):
        pipe.load_lora_weights(files[1])
    (place / "anamorph.json").unlink()
    pipe = DiffusionPipeline.from_pretrained(place)
    with pytest.raises(BackendError, match="does not record where its weights come from"):
        pipe.load_lora_weights(files[1])


def test_what_is_saved_with_a_fused_adapter_draws_the_same(sd1: Path, tmp_path: Path, files: list[Path]) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe.load_lora_weights(files[0])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    assert np.abs(drawn(theirs(tmp_path / "fused")) - drawn(pipe)).max() <= IMAGE_BOUND
    # What DreamBooth leaves behind is a whole checkpoint, or a UNet for another one.
    trained = anamorph.UNet2DConditionModel.from_pretrained(tmp_path / "fused", subfolder="unet")
    other: Any = DiffusionPipeline.from_pretrained(sd1, unet=trained, backend="eager")
    reference = theirs(sd1)
    reference.unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "fused", subfolder="unet")
    assert np.abs(drawn(other) - drawn(reference)).max() <= IMAGE_BOUND


@pytest.mark.parametrize("mode", ["hot", "fused"])
def test_the_command_line_takes_adapters_and_replays_them(
    sd1: Path, tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    own = tmp_path / "own.safetensors"
    shutil.copy(files[0], own)
    out = tmp_path / "a.png"
    call = ["generate", "a red cat", "--model", str(sd1), "--backend", "eager", "--steps", "2", "--seed", "1",
            "--lora", f"{own}:0.5", "--lora", str(files[1]), "--lora-mode", mode, "--out", str(out)]  # fmt: skip
    assert main(call) == OK
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe.load_lora_weights(own, "a")
    pipe.load_lora_weights(files[1], "b")
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    expected = pipe("a red cat", num_inference_steps=2, seed=1).images[0]
    with Image.open(out) as picture:
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    assert read_request(out)["loras"][0]["weight"] == 0.5
    assert main(["replay", str(out), "--json"]) == OK
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["identical"]
    own.write_bytes(files[1].read_bytes())
    assert main(["replay", str(out)]) == USAGE
    assert "is not the adapter that" in capsys.readouterr().err
    assert main([*call[:-2], "--lora", f"{own}:much"]) == USAGE
    assert "is not of the form FILE or FILE:WEIGHT" in capsys.readouterr().err
