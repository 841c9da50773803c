"""Adapters on every engine beside diffusers with PEFT: hot, fused, several, weighed by blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ATTENTION, TEXT, WHOLE, drawn, factors, stored, theirs
from exported import FORMATS
from parity import IMAGE_BOUND

from anamorph import DiffusionPipeline, StableDiffusionImg2ImgPipeline

ENGINES = ["eager", *FORMATS]
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
