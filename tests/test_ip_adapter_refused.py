"""What IP-Adapters refuse: files, calls and scales that do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from ip_adapters import CALL, LOOK, NAMES, SIZE, folder, image_encoder, state, write
from parity import ours
from pictures import load

import anamorph
from anamorph.errors import AnamorphError, CheckpointError, InputError


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


def test_pictures_without_an_adapter_and_pipelines_without_a_place_are_refused(sd1: Path) -> None:
    pipe = load(anamorph.StableDiffusionPipeline, sd1)
    with pytest.raises(InputError, match="ip_adapter_image is given, but no IP-Adapter is loaded"):
        pipe(**CALL, **SIZE, ip_adapter_image=LOOK)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(InputError, match="the unet is a OptimizedModule, which takes no pictures as prompts"):
        pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
