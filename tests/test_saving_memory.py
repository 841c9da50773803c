"""Switches that save memory, beside diffusers, where they apply; elsewhere they say that they do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported
from parity import IMAGE_BOUND, relative
from PIL import Image
from torch.nn import functional

from anamorph import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from anamorph.errors import InputError
from anamorph.models.attention import multi_head

CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 96, "width": 96, "output_type": "np"}
PICTURE = Image.fromarray((np.indices((96, 96)).sum(0)[..., None] * np.array([1, 0.5, 0.2])).astype(np.uint8))


def drawn(pipe: Any, **changes: Any) -> Any:
    call = {**CALL, **changes}
    return pipe(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **call).images


def test_tiles_are_those_of_diffusers_and_slices_change_nothing(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    whole = drawn(pipe)
    pipe.enable_vae_slicing()
    assert np.abs(drawn(pipe) - whole).max() <= 1e-5
    pipe.enable_vae_tiling()
    theirs.vae.enable_tiling()
    expected = drawn(theirs)
    assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    assert np.abs(whole - expected).max() > 10 * IMAGE_BOUND
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert np.array_equal(drawn(pipe), whole)


def test_pictures_are_encoded_in_tiles_too(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="eager")
    pipe.enable_vae_tiling()
    theirs.vae.enable_tiling()
    call: dict[str, Any] = {"image": PICTURE, "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
    images = [p("a cat", generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, theirs)]
    assert np.abs(images[0] - images[1]).max() <= IMAGE_BOUND


@pytest.mark.parametrize("engine", FORMATS)
def test_every_engine_draws_the_same_tiles(sd1: Path, engine: str) -> None:
    eager: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    pipe: Any = StableDiffusionPipeline.from_pretrained(exported(sd1, engine), backend=engine)
    for one in (eager, pipe):
        one.enable_vae_tiling()
        one.enable_vae_slicing()
    assert np.abs(drawn(pipe) - drawn(eager)).max() <= 10 * IMAGE_BOUND


def test_the_autoencoder_has_the_switches_of_diffusers(sd1: Path) -> None:
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    whole = drawn(pipe)
    for one in (pipe, theirs):
        one.set_progress_bar_config(disable=True)
        one.vae.enable_tiling()
        one.vae.enable_slicing()
    shared: Any = StableDiffusionPipeline(**pipe.components)
    assert np.abs(drawn(shared) - drawn(theirs)).max() <= IMAGE_BOUND
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert np.array_equal(drawn(pipe), whole)
    pipe.vae.enable_tiling()
    assert not np.array_equal(drawn(pipe.to("cpu")), whole)  # another place is no other wish
    with pytest.raises(InputError, match="unet is no autoencoder"):
        pipe.unet.enable_tiling()


@pytest.mark.parametrize("size", ["auto", "max", 2, None])
def test_attention_in_slices_gives_the_same_pictures(sd1: Path, size: str | int | None) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", unet=fresh(sd1))
    whole = drawn(pipe)
    with attention_calls() as sizes:
        pipe.enable_attention_slicing(size)
        drawn(pipe, output_type="latent")
        assert set(sizes) == {{"auto": 2, "max": 1, 2: 2, None: 4 * 2 * 2}[size]}  # heads, branches, prompts
    assert np.abs(drawn(pipe) - whole).max() <= 1e-5
    pipe.disable_attention_slicing()
    assert np.array_equal(drawn(pipe), whole)


def test_slices_of_attention_take_masks_and_any_number_of_heads() -> None:
    q, k, v, bias = (torch.randn(shape) for shape in ((3, 5, 12), (3, 7, 12), (3, 7, 12), (3, 1, 1, 7)))
    whole = multi_head(q, k, v, 6, bias=bias)
    for at_once in (1, 4, 6):
        assert torch.allclose(multi_head(q, k, v, 6, bias=bias, at_once=at_once), whole, atol=1e-6)
    assert not torch.allclose(multi_head(q, k, v, 6, at_once=4), whole, atol=1e-2)
    causal = multi_head(q, q, q, 3, causal=True)
    assert torch.allclose(multi_head(q, q, q, 3, causal=True, at_once=2), causal, atol=1e-6)


@pytest.mark.parametrize("size", [0, 5, "half", True, 1.5])
def test_a_wrong_size_of_a_slice_is_refused(sd1: Path, size: Any) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    with pytest.raises(InputError, match=r"slice_size is .*, expected auto, max, None or 1 to 4 heads"):
        pipe.enable_attention_slicing(size)


def test_the_layout_of_the_weights_is_the_callers_choice(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", unet=fresh(sd1))
    weight = pipe.unet.component.module.conv_in.weight
    plain = drawn(pipe)
    assert pipe.unet.to(memory_format=torch.channels_last) is pipe.unet
    assert weight.stride()[1] == 1
    assert np.abs(drawn(pipe) - plain).max() <= IMAGE_BOUND
    pipe.unet.to(memory_format=torch.contiguous_format)
    assert weight.stride()[1] == 9
    with pytest.raises(InputError, match=r"memory_format is torch.preserve_format, expected torch.channels_last or"):
        pipe.unet.to(memory_format=torch.preserve_format)


def test_the_autoencoder_keeps_the_channels_of_a_pixel_side_by_side_and_its_weights_as_they_are(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        sd1, backend="eager", vae=AutoencoderKL.from_pretrained(sd1, subfolder="vae")
    )
    module, formats = pipe.vae.component.module, []
    for layer in module.decoder.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.GroupNorm)):
            layer.register_forward_pre_hook(
                lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 8), dtype=np.float32)
    program = pipe.program("vae_decoder")
    found = program.session()({program.interface.inputs[0].name: program.arrays.put(latents)})["sample"]
    assert len(formats) > 20
    assert all(formats)
    assert all(weight.is_contiguous() for weight in module.parameters())
    with torch.no_grad():
        plain = module.pixels(torch.from_numpy(latents))[0]
    assert relative(program.arrays.get(found), plain.numpy()) <= 1e-5


def test_each_component_may_have_a_precision_of_its_own(sd1: Path) -> None:
    wish: dict[str, Any] = {"vae": torch.float32, "default": torch.bfloat16}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd1, torch_dtype=wish, safety_checker=None)
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", torch_dtype=wish)
    expected = {name: str(getattr(theirs, name).dtype) for name in ("unet", "text_encoder", "vae")}
    expected |= {"vae_decoder": expected.pop("vae"), "unet_prepare": expected["unet"]}
    assert {part: f"torch.{placed.precision}" for part, placed in pipe.placement.items()} == expected
    with pytest.raises(InputError, match="torch_dtype names vea"):
        StableDiffusionPipeline.from_pretrained(sd1, backend="eager", torch_dtype={"vea": torch.float32})


def test_what_does_not_apply_says_so(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    with pytest.warns(UserWarning, match="unet: attention slicing does not apply: null fuses attention"):
        pipe.enable_attention_slicing()
    with pytest.warns(UserWarning, match="xformers does not apply: every engine's own fused attention"):
        pipe.enable_xformers_memory_efficient_attention()
    with pytest.warns(UserWarning, match="unet: memory_format does not apply: null chooses"):
        pipe.unet.to(memory_format=torch.channels_last)
    for switch in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.warns(UserWarning, match=f"{switch} does not apply: no engine of this pipeline has an accelerator"):
            getattr(pipe, switch)()


def fresh(folder: Path) -> UNet2DConditionModel:
    """A denoiser that no other test has."""
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@contextmanager
def attention_calls() -> Iterator[list[int]]:
    """How many heads (times pictures) each attention of the denoiser computes at a time."""
    sizes: list[int] = []
    plain = functional.scaled_dot_product_attention

    def counting(q: Any, *others: Any, **named: Any) -> Any:
        if not named.get("is_causal"):  # that is the text encoder's
            sizes.append(q.shape[0] * q.shape[1])
        return plain(q, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", counting)
        yield sizes


def test_models_are_attributes_that_can_be_shared_and_replaced(sd1: Path) -> None:
    first: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", rewrites="none")
    second: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", vae=first.vae, unet=first.unet)
    assert second.unet is first.unet
    with pytest.raises(InputError, match="unet is a type, expected a model of anamorph"):
        second.unet = StableDiffusionPipeline
    second.unet = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    assert second.unet is not first.unet
    assert np.array_equal(drawn(second), drawn(first))
    with pytest.raises(AttributeError, match="has no attribute 'unet_2'"):
        first.unet_2  # noqa: B018
