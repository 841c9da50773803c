"""Pictures as prompts (IP-Adapter): every kind of adapter and call, beside diffusers."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from ip_adapters import CALL, LOOK, NAMES, SIZE, folder
from parity import Agrees, Trace, generator, original, ours, worst
from pictures import load, mask, picture
from PIL import Image

import anamorph
from anamorph import DiffusionPipeline
from anamorph.cli import OK, main
from anamorph.image_processor import IPAdapterMaskProcessor
from anamorph.machine import is_zen
from anamorph.pipelines.image_prompts import small_mask

Setup = Callable[[Any], None]


def nothing(pipe: Any) -> None:
    """Leave the adapters as they were loaded."""


def scaled(scale: Any) -> Setup:
    """Set a scale."""
    return lambda pipe: pipe.set_ip_adapter_scale(scale)


def theirs(kind: str, checkpoint: Path, names: Any, setup: Setup, **call: Any) -> Trace:
    """diffusers' pictures with these adapters."""
    pipe = original(kind, checkpoint)
    pipe.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=names)
    setup(pipe)
    latents: list[Any] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {}

    images = pipe(generator=generator(3), output_type="np", callback_on_step_end=keep, **call).images
    pipe.unload_ip_adapter()
    return Trace(latents, images)


def mine(kind: str, checkpoint: Path, names: Any, setup: Setup, **call: Any) -> Trace:
    """Ours."""
    pipe = load(getattr(anamorph, kind), checkpoint)
    pipe.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=names)
    setup(pipe)
    found = ours(pipe, 3, **call)
    pipe.unload_ip_adapter()
    return found


def compare(
    checkpoint: Path, names: Any, setup: Setup = nothing, kind: str = "StableDiffusionPipeline", **call: Any
) -> tuple[float, float]:
    return worst(*(one(kind, checkpoint, names, setup, **{**CALL, **call}) for one in (mine, theirs)))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_adapter_draws_as_diffusers_does(sd1: Path, name: str, agrees: Agrees) -> None:
    found = compare(sd1, NAMES[name], ip_adapter_image=LOOK, num_images_per_prompt=2, **SIZE)
    agrees(f"IP-Adapter {name}, SD1", found)


@pytest.mark.parametrize("name", NAMES)
def test_sdxl_draws_as_diffusers_does(sdxl: Path, name: str, agrees: Agrees) -> None:
    size = {"height": 16, "width": 32}
    found = compare(sdxl, NAMES[name], kind="StableDiffusionXLPipeline", ip_adapter_image=LOOK, **size)
    agrees(f"IP-Adapter {name}, SDXL", found)


def test_several_adapters_with_several_pictures_each(sd1: Path, agrees: Agrees) -> None:
    names = ["plus.safetensors", "base.bin", "full.bin"]
    looks = [[LOOK, picture(30, 16, 1)], picture(40, 40, 2), LOOK]
    agrees("IP-Adapters, several", compare(sd1, names, scaled([0.7, 0.4, 0.5]), ip_adapter_image=looks, **SIZE))


BLOCKS = {"down": {"block_1": [0.8]}, "mid": 0.3, "up": {"block_1": [0.0, 1.0], "block_2": 0.6}}


@pytest.mark.parametrize("scale", [0.35, BLOCKS, {"up": 0.9}, [{"down": 1.0}]])
def test_blocks_have_scales_of_their_own(sd1: Path, scale: Any, agrees: Agrees) -> None:
    agrees("IP-Adapter, scales of blocks", compare(sd1, NAMES["plus"], scaled(scale), ip_adapter_image=LOOK, **SIZE))


def halves(height: int = 64, width: int = 32) -> Any:
    """Two masks as a user makes them, [2, 1, H, W]."""
    left = Image.fromarray((np.indices((height, width))[1] < width // 3).astype(np.uint8) * 255)
    return diffusers.image_processor.IPAdapterMaskProcessor().preprocess([left, mask(height, width)], height, width)


def test_masks_say_where_pictures_count(sd1: Path, agrees: Agrees) -> None:
    two = halves()
    pictures = [[LOOK, picture(30, 16, 1)]]
    for name, scale in (("base", [[0.7, 0.4]]), ("plus", 0.5)):
        told = {"ip_adapter_masks": [two.reshape(1, 2, 64, 32)]}
        found = compare(sd1, NAMES[name], scaled(scale), ip_adapter_image=pictures, cross_attention_kwargs=told, **SIZE)
        agrees("IP-Adapter, masks", found)


def test_some_of_several_adapters_are_masked(sd1: Path, agrees: Agrees) -> None:
    told = {"ip_adapter_masks": [halves()[1:], None]}
    call = {"ip_adapter_image": [LOOK, picture(30, 16, 1)], "cross_attention_kwargs": told, "guidance_scale": 1.0}
    names = [NAMES["plus"], NAMES["base"]]
    agrees("IP-Adapter, masks", compare(sd1, names, scaled([0.5, {"down": 0.7}]), **call, **SIZE))


@pytest.mark.parametrize("size", [(64, 32), (40, 56), (24, 8)])
def test_masks_of_other_proportions_are_filled_up_or_cut(size: tuple[int, int]) -> None:
    height, width = size
    drawn = halves(height, width)[1:, 0]
    downsample = diffusers.image_processor.IPAdapterMaskProcessor.downsample
    for rows, columns in ((8, 4), (7, 5), (3, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact = downsample(drawn, 1, rows * columns, 1)[0, :, 0].numpy()
            found = small_mask(drawn[0].numpy(), rows, columns)
        assert np.abs(found.reshape(-1) - exact).max() <= 1e-5


def test_masks_are_made_as_diffusers_makes_them() -> None:
    theirs, own = diffusers.image_processor.IPAdapterMaskProcessor(), IPAdapterMaskProcessor()
    pictures = [mask(50, 70), mask(50, 70, 5)]
    for call in ({}, {"height": 64, "width": 40}):
        assert np.array_equal(own.preprocess(pictures, **call), theirs.preprocess(pictures, **call).numpy())


def prepared(checkpoint: Path, name: str, guided: bool) -> tuple[Any, Any]:
    """Encoded pictures of diffusers and of ours."""
    pipe = original("StableDiffusionPipeline", checkpoint)
    own = load(anamorph.StableDiffusionPipeline, checkpoint)
    found = []
    for one in (pipe, own):
        one.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=NAMES[name])
        found.append(one.prepare_ip_adapter_image_embeds([[LOOK, LOOK.rotate(90)]], None, "cpu", 1, guided))
        one.unload_ip_adapter()
    return found[0], found[1]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", ["base", "full"])
def test_pictures_may_be_encoded_before(sd1: Path, name: str, guided: bool, agrees: Agrees) -> None:
    exact, own = prepared(sd1, name, guided)
    assert [tuple(one.shape) for one in own] == [tuple(one.shape) for one in exact]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, exact, strict=True))
    scale = 5.0 if guided else 1.0
    agrees(f"IP-Adapter {name}, SD1", compare(sd1, NAMES[name], ip_adapter_image_embeds=exact, guidance_scale=scale))


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionImg2ImgPipeline": ("sd1", {"image": picture(64, 32), "strength": 0.7}),
    "StableDiffusionInpaintPipeline": ("inpaint", {"image": picture(), "mask_image": mask()}),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", {"image": picture(16, 32), "strength": 0.7}),
    "StableDiffusionXLInpaintPipeline": ("sdxl", {
        "image": picture(16, 32), "mask_image": mask(16, 32), "height": 16, "width": 32, "strength": 0.8,
    }),
    "LatentConsistencyModelPipeline": ("lcm", {"height": 16, "width": 32}),
    "LatentConsistencyModelImg2ImgPipeline": ("lcm", {"image": picture(16, 32), "strength": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_other_tasks_draw_as_diffusers_does(kind: str, request: pytest.FixtureRequest, agrees: Agrees) -> None:
    name, call = TASKS[kind]
    if name == "lcm":
        call = {**call, "prompt": "a red cat", "num_inference_steps": 3, "guidance_scale": 5.0}
        both = (one(kind, request.getfixturevalue(name), NAMES["base"], nothing, ip_adapter_image=LOOK, **call)
                for one in (mine, theirs))  # fmt: skip
        agrees("IP-Adapter base, LCM", worst(*both))
        return
    found = compare(request.getfixturevalue(name), NAMES["plus"], kind=kind, ip_adapter_image=LOOK, **call)
    agrees(f"IP-Adapter plus, {'SDXL' if name == 'sdxl' else 'SD1'}", found)


def test_the_comparison_notices_another_scale_and_another_picture(sd1: Path) -> None:
    kind = "StableDiffusionPipeline"
    call = {**CALL, **SIZE, "ip_adapter_image": LOOK}
    exact = mine(kind, sd1, NAMES["plus"], nothing, **call)
    for setup, look in ((scaled(0.99), LOOK), (nothing, LOOK.rotate(90))):
        other = mine(kind, sd1, NAMES["plus"], setup, **{**call, "ip_adapter_image": look})
        assert worst(other, exact)[0] > 1e-3


def test_without_adapters_pictures_are_what_they_were(sd1: Path) -> None:
    pipe: Any = load(anamorph.StableDiffusionPipeline, sd1)
    before = ours(pipe, 3, **CALL, **SIZE)
    pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
    products = ", rewrites onednn-linear" if is_zen() else ""
    assert str(pipe.placement["image_encoder"]) == f"image_encoder: eager on cpu in float32{products}"
    with_adapter = ours(pipe, 3, ip_adapter_image=LOOK, **CALL, **SIZE)
    pipe.set_ip_adapter_scale(0.0)
    unseen = ours(pipe, 3, ip_adapter_image=LOOK, **CALL, **SIZE)
    pipe.unload_ip_adapter()
    assert pipe.image_encoder is None
    assert worst(unseen, before) == worst(ours(pipe, 3, **CALL, **SIZE), before) == (0, 0)
    assert worst(with_adapter, before)[0] > 1e-2


def test_adapters_are_shared_and_stay(sd1: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
    pipe.set_ip_adapter_scale(0.6)
    call = {**CALL, **SIZE, "ip_adapter_image": LOOK}
    exact = ours(pipe, 3, **call)
    assert worst(ours(anamorph.StableDiffusionPipeline.from_pipe(pipe), 3, **call), exact) == (0, 0)
    pipe.to("cpu")
    assert worst(ours(pipe, 3, **call), exact) == (0, 0)


def test_the_command_line_names_adapters_and_replays(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LOOK.save(tmp_path / "look.png")
    file, out = folder(sd1) / "models" / NAMES["base"], tmp_path / "out.png"
    common = ["--model", str(sd1), "--backend", "eager", "--ip-adapter-image", str(tmp_path / "look.png")]
    options = ["--steps", "3", "--size", "64x32", "--seed", "3", "--guidance", "5", "--negative", "blue"]
    assert main(["generate", "a red cat", *common, "--ip-adapter", f"{file}:0.6", *options, "--out", str(out)]) == OK
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    pipe.load_ip_adapter(file)
    pipe.set_ip_adapter_scale(0.6)
    expected = pipe(**CALL, **SIZE, seed=3, ip_adapter_image=LOOK).images[0]
    pipe.unload_ip_adapter()
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    again = ["--out", str(tmp_path / "again.png"), "--json"]
    capsys.readouterr()
    assert main(["replay", str(out), *common, "--ip-adapter", f"{file}:0.6", *again]) == OK
    assert json.loads(capsys.readouterr().out)["identical"]
    for given, words in (
        (
            [*common, "--ip-adapter", f"{file}:0.5"],
            "was made with --ip-adapter base.safetensors:0.6; name the same files",
        ),
        (common[:4], "was made with --ip-adapter base.safetensors:0.6; name the same files"),
        (common, "--ip-adapter is given 0 times and --ip-adapter-image 1 times; name a picture for each"),
        ([*common, "--ip-adapter", str(tmp_path / "x.bin")], "there is no folder"),
    ):
        assert main(["replay", str(out), *given, *again]) != OK
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
