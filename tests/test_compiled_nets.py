"""Nets and adapters under torch.compile: beside eager, and compiled no oftener than shapes change.

What captures the whole step is at stake in every run; Inductor, which takes minutes over it, in `make compiled`.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ATTENTION, factors, stored, theirs
from checkpoints import noisy
from exported import COMPILED, once, shared_place
from parity import ENGINE_BOUND, Agrees, ours, relative, worst
from test_controlnet import CALL, picture
from test_ip_adapter import LOOK, NAMES, folder

import anamorph
from anamorph import T2IAdapter

SIZE = {"height": 16, "width": 24}


@pytest.fixture(params=["captured", *(["compiled"] if COMPILED in os.environ else [])], autouse=True)
def _compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "captured":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Callable[[], Counter[str]]:
    """How often each part was compiled until now."""
    caplog.set_level("INFO", logger="anamorph.backends.compile")
    return lambda: Counter(line.split()[1] for line in caplog.messages if line.startswith("compiling "))


def pair(kind: str, checkpoint: Path, *parts: str, **given: Any) -> list[Any]:
    """The same pipeline with these parts by torch.compile, and by eager."""
    wishes = [{"default": "eager"}, {"default": "eager", **dict.fromkeys(parts, "compile")}]
    pipes = [getattr(anamorph, kind).from_pretrained(checkpoint, backend=wish, **given) for wish in reversed(wishes)]
    assert {pipes[0].placement[part].engine for part in parts} == {"compile"}
    return pipes


def test_a_controlnet(sd2: Path, controlled_sd2: Path, compiled: Callable[[], Counter[str]], agrees: Agrees) -> None:
    kind, net = "StableDiffusionControlNetPipeline", str(controlled_sd2 / "controlnet")
    pipes = pair(kind, sd2, "unet", "controlnet", "controlnet_hint", controlnet=net)
    for more in ({"control_guidance_end": 0.5}, {"controlnet_conditioning_scale": 0.3, "control_guidance_start": 0.7}):
        found = [ours(pipe, 0, **CALL, **more, image=picture(0, 16, 24)) for pipe in pipes]
        agrees(kind, worst(*found), "compile")
    assert compiled() == {"unet": 2, "controlnet": 1, "controlnet_hint": 1}  # with residuals, and without
    assert relative(found[0].latents[-1], ours(pipes[1], 0, **CALL, image=picture(1, 16, 24)).latents[-1]) > 1e-3


def test_a_t2i_adapter(sd2: Path, compiled: Callable[[], Counter[str]], agrees: Agrees) -> None:
    def make(place: Path) -> None:
        noisy(T2IAdapter(channels=(32, 64), num_res_blocks=1, downscale_factor=2), 3).save_pretrained(place)

    kind, net = "StableDiffusionAdapterPipeline", str(once(shared_place() / "t2i-sd2", make))
    pipes = pair(kind, sd2, "unet", "adapter", adapter=net)
    for more in ({"adapter_conditioning_factor": 0.5}, {"adapter_conditioning_scale": 0.3}):
        agrees(kind, worst(*(ours(pipe, 0, **CALL, **more, image=picture(0, 16, 24)) for pipe in pipes)), "compile")
    assert compiled() == {"unet": 2, "adapter": 1}


def test_an_ip_adapter(sd2: Path, compiled: Callable[[], Counter[str]], agrees: Agrees) -> None:
    pipes, found = pair("StableDiffusionPipeline", sd2, "unet"), []
    for scale in (1.0, 0.4):
        for pipe in pipes:
            if pipe.image_encoder is None:
                pipe.load_ip_adapter(folder(sd2), subfolder="models", weight_name=NAMES["plus"])
            pipe.set_ip_adapter_scale(scale)
        found = [ours(pipe, 3, **CALL, **SIZE, ip_adapter_image=LOOK) for pipe in pipes]
        agrees("IP-Adapter plus, SD2", worst(*found), "compile")
    assert compiled() == {"unet": 1}


def test_loras_are_chosen_without_compiling_again(
    sd2: Path, tmp_path: Path, compiled: Callable[[], Counter[str]], agrees: Agrees
) -> None:
    original, pipes = theirs(sd2), pair("StableDiffusionPipeline", sd2, "unet")
    for name, seed in (("first", 0), ("second", 1)):
        file = stored(tmp_path / name, {"unet": factors(original, "unet", ATTENTION, seed=seed)})
        original.unet.delete_adapters("made_unet")
        for pipe in pipes:
            pipe.load_lora_weights(file, name)
    drawn = []
    for names, weights in ((["first"], [1.0]), (["second"], [0.7]), (["first", "second"], [0.5, -0.2])):
        for pipe in pipes:
            pipe.set_adapters(names, weights)
        found = [ours(pipe, 3, **CALL, **SIZE) for pipe in pipes]
        agrees("LoRA, SD2", worst(*found), "compile")
        drawn.append(found[0].latents[-1])
    assert compiled() == {"unet": 1}
    assert relative(drawn[0], drawn[1]) > 10 * ENGINE_BOUND
    assert relative(drawn[1], drawn[2]) > 10 * ENGINE_BOUND
