"""Pictures as prompts (IP-Adapter): every kind of adapter and call, beside diffusers."""

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import once, shared_place
from ip_adapters import adapters, image_encoder, state, write
from parity import Agrees, Trace, generator, original, ours, worst
from pictures import load, mask, picture
from PIL import Image

import anamorph
from anamorph import DiffusionPipeline
from anamorph.cli import OK, main
from anamorph.errors import AnamorphError, CheckpointError, InputError
from anamorph.image_processor import IPAdapterMaskProcessor
from anamorph.pipelines.image_prompts import small_mask

CALL: dict[str, Any] = {
    "prompt": "a red cat", "negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
SIZE = {"height": 64, "width": 32}
LOOK = picture(20, 24)
NAMES = {"base": "base.safetensors", "plus": "plus.safetensors", "full": "full.bin"}
Setup = Callable[[Any], None]


def folder(checkpoint: Path) -> Path:
    """The adapters for a checkpoint."""
    return once(shared_place() / f"{checkpoint.name}-ip", functools.partial(adapters, checkpoint=checkpoint))


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
    assert str(pipe.placement["image_encoder"]) == "image_encoder: eager on cpu in float32"
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


def narrow(weights: dict[str, Any]) -> None:
    weights["ip_adapter"] = {name: one[:, :16].contiguous() for name, one in weights["ip_adapter"].items()}


def face(weights: dict[str, Any]) -> None:
    weights["image_proj"] = {"proj.0.weight": torch.ones(8, 4), "proj.2.weight": torch.ones(8, 8),
                             "norm.weight": torch.ones(8)}  # fmt: skip


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "width": (narrow, r"to_k_ip.weight has shape \[32, 16\], expected \[32, 32\]; it was made for another UNet"),
    "fewer": (lambda w: w["ip_adapter"].pop("13.to_v_ip.weight"), "has no ip_adapter.13.to_v_ip.weight; it was"),
    "more": (lambda w: w["ip_adapter"].update({"15.to_k_ip.weight": torch.ones(32, 32)}), "more than 7 attentions"),
    "nan": (lambda w: w["image_proj"]["latents"].fill_(torch.nan), "holds NaN or infinity in image_proj.latents"),
    "lost": (lambda w: w["image_proj"].pop("norm_out.bias"), "has no image_proj.norm_out.bias; download it again"),
    "bent": (lambda w: w["image_proj"].update({"proj_out.weight": torch.ones(24, 64)}), "that do not fit each other"),
    "face": (face, "is a FaceID adapter, which looks at faces' identities"),
    "other": (lambda w: w.update(image_proj={"x": torch.ones(2)}), "is an IP-Adapter of an unknown kind"),
    "empty": (lambda w: w.pop("image_proj"), "holds no image_proj, which every IP-Adapter has"),
    "encoder": (
        lambda w: w["image_proj"].update({"proj_in.weight": torch.ones(64, 30)}),
        "takes pictures encoded as 30 numbers, and the image encoder's hidden_size is 40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_are_refused_in_one_sentence(sd1: Path, tmp_path: Path, name: str) -> None:
    change, words = BROKEN[name]
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    weights = state(diffusers.UNet2DConditionModel.from_pretrained(sd1, subfolder="unet"), "plus")
    change(weights)
    image_encoder(tmp_path / "image_encoder")
    file = write(tmp_path / "adapter.safetensors", weights)
    with pytest.raises(AnamorphError, match=words) as caught:
        pipe.load_ip_adapter(file)
    assert "\n" not in str(caught.value)
    assert pipe.image_encoder is None
    assert ours(pipe, 3, **CALL, **SIZE).images.shape == (1, 64, 32, 3)


def test_adapters_come_with_their_picture_encoder_or_none_is_asked_for(sd1: Path, tmp_path: Path) -> None:
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    shutil.copy(folder(sd1) / "models" / NAMES["base"], tmp_path)
    with pytest.raises(CheckpointError, match=r"without its image encoder .*image_encoder.*; name its folder"):
        pipe.load_ip_adapter(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    with pytest.raises(InputError, match="a mapping of weights has no image encoder beside it"):
        pipe.load_ip_adapter(state(unet, "base"))
    pipe.load_ip_adapter(state(unet, "base"), image_encoder_folder=None)
    with pytest.raises(InputError, match="needs the image encoder, which is not loaded"):
        pipe(**CALL, **SIZE, ip_adapter_image=LOOK)
    pipe.load_ip_adapter(tmp_path, image_encoder_folder=str(folder(sd1) / "models" / "image_encoder"))
    assert ours(pipe, 3, ip_adapter_image=LOOK, **CALL, **SIZE).images.shape == (1, 64, 32, 3)
    with pytest.raises(CheckpointError, match=r"has no x.bin; name the adapter's file with weight_name="):
        pipe.load_ip_adapter(tmp_path, weight_name="x.bin")
    with pytest.raises(CheckpointError, match=r"holds 4 files of weights \(base.bin, .*; name one with weight_name="):
        pipe.load_ip_adapter(folder(sd1), subfolder="models")
    with pytest.raises(InputError, match=r"there are 2 and 3 sources, folders or names"):
        pipe.load_ip_adapter([tmp_path] * 3, weight_name=["a", "b"])
    pipe.unload_ip_adapter()


def ones(*shape: int) -> Any:
    return torch.ones(shape)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "an IP-Adapter is loaded: give either ip_adapter_image or ip_adapter_image_embeds"),
    ({"ip_adapter_image": LOOK, "ip_adapter_image_embeds": [ones(2, 1, 24)]}, "give either ip_adapter_image or"),
    ({"ip_adapter_image": [LOOK, LOOK]}, "holds pictures for 2 IP-Adapters and 1 are loaded"),
    ({"ip_adapter_image": "cat.png"}, "ip_adapter_image holds a str, expected Pillow images"),
    ({"ip_adapter_image": ones(1, 3, 8, 8)}, r"has shape \[1, 3, 8, 8\], expected \[n, 3, 16, 16\]"),
    ({"ip_adapter_image_embeds": ones(2, 1, 24)}, "ip_adapter_image_embeds is Tensor, expected a list of 1"),
    ({"ip_adapter_image_embeds": [ones(2, 1, 20)]}, r"shape \[2, 1, 20\], expected \[1 or 2, pictures, 24\]"),
    ({"ip_adapter_image_embeds": [ones(1, 1, 24)]}, "holds 1 branches, expected 2: negative and positive"),
    ({"ip_adapter_image": LOOK, "cross_attention_kwargs": {"scal": 1}}, "no attention here takes .* 'scal'"),
    ({"ip_adapter_image": LOOK, "cross_attention_kwargs": {"ip_adapter_masks": [ones(1, 1, 8, 8)] * 2}},
     "holds masks for 2 IP-Adapters and 1 are loaded"),
    ({"ip_adapter_image": LOOK, "cross_attention_kwargs": {"ip_adapter_masks": [ones(1, 2, 8, 8)]}},
     r"shape \[1, 2, 8, 8\], expected \[1, 1, height, width\]: a mask for each picture"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_calls_that_do_not_fit_the_adapter_are_refused(sd1: Path, call: dict[str, Any], words: str) -> None:
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
    with pytest.raises(InputError, match=words) as caught:
        pipe(**{**CALL, **SIZE, **call})
    assert "\n" not in str(caught.value)
    pipe.unload_ip_adapter()


SCALES: list[tuple[Any, str]] = [
    ([0.5, 0.5], "there are 2 scales for 1 IP-Adapters; give one for each"),
    ("much", "the scale is 'much', expected a finite number"),
    ({"sideways": 1.0}, "scales name 'sideways', expected down, mid, up"),
    ({"down": {"block_2": 1.0}}, "scales name down 'block_2', expected block_0, block_1"),
    ({"up": {"block_1": [1.0, 0.5, 0.2]}}, "there are 3 scales for up block_1, which has 2 transformers; give as many"),
    ({"mid": float("nan")}, "is nan, expected a finite number"),
]


@pytest.mark.parametrize(("scale", "words"), SCALES, ids=[words[:30] for _, words in SCALES])
def test_scales_that_do_not_fit_are_refused(sd1: Path, scale: Any, words: str) -> None:
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
    with pytest.raises(InputError, match=words):
        pipe.set_ip_adapter_scale(scale)
    pipe.set_ip_adapter_scale([[0.5, 0.2]])
    with pytest.raises(InputError, match="has 2 scales for pictures and no masks; give as many"):
        pipe(**CALL, **SIZE, ip_adapter_image=LOOK)
    pipe.unload_ip_adapter()


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


def test_pictures_without_an_adapter_and_pipelines_without_a_place_are_refused(sd1: Path) -> None:
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    with pytest.raises(InputError, match="ip_adapter_image is given, but no IP-Adapter is loaded"):
        pipe(**CALL, **SIZE, ip_adapter_image=LOOK)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(InputError, match="the unet is a OptimizedModule, which takes no pictures as prompts"):
        pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
