"""The safety checker in pipelines, tiny autoencoders, and models of transformers and diffusers as components."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from checkpoints import noisy
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from exported import FORMATS, exported, once, shared_place
from parity import IMAGE_BOUND, generator, ours, reference, relative, worst
from pictures import picture
from test_models_autoencoders import TINY
from test_models_pictures import VISION

import anamorph
from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.errors import InputError

CALL: dict[str, Any] = {"prompt": ["a red cat", "a dog", "a photo", "red"], "num_inference_steps": 2}
SEEDS = (1, 2, 3, 4)


def screened(sd2: Path, folder: Path) -> None:
    """The checkpoint with a safety checker whose thresholds two of the call's four pictures pass."""
    shutil.copytree(sd2, folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    checker = noisy(StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=VISION, projection_dim=24)), 4)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**CALL, generator=generator(SEEDS)).images
    with torch.no_grad():
        inputs = processor(images, return_tensors="pt").pixel_values
        vectors = checker.visual_projection(checker.vision_model(inputs)[1])
        cosines = torch.cosine_similarity(vectors[:, None], checker.concept_embeds[None], dim=-1)
        checker.concept_embeds_weights.fill_(2)
        checker.special_care_embeds_weights.fill_(2)
        concept = int(cosines.std(0).argmax())
        checker.concept_embeds_weights[concept] = cosines[:, concept].median() + 0.01
    pipe.safety_checker, pipe.feature_extractor = checker, processor
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session")
def checked(sd2: Path) -> Path:
    return once(shared_place() / "checked", lambda folder: screened(sd2, folder))


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_pictures_that_are_held_back_are_those_of_diffusers_and_black(checked: Path, engine: str) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checked)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(**CALL, generator=generator(SEEDS), output_type="np")
    pipe: Any = DiffusionPipeline.from_pretrained(checked if engine == "eager" else exported(checked, engine))
    assert pipe.placement["safety_checker"].engine == engine
    found = pipe(**CALL, generator=generator(SEEDS), output_type="np")
    assert 0 < sum(expected.nsfw_content_detected) < len(SEEDS)
    assert found.nsfw_content_detected == expected.nsfw_content_detected
    assert np.abs(found.images - expected.images).max() <= IMAGE_BOUND
    held = np.array(found.nsfw_content_detected)
    assert not found.images[held].any()
    assert found.images[~held].std() > 0.01
    images, flags = pipe(**CALL, generator=generator(SEEDS), return_dict=False)
    assert flags == found.nsfw_content_detected
    assert [not np.any(image) for image in images] == flags
    assert pipe(**CALL, seed=1, output_type="latent").nsfw_content_detected is None


def test_the_checker_can_be_left_out_and_goes_with_its_processor(checked: Path, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(checked, safety_checker=None, backend="eager")
    assert pipe(**CALL, generator=generator(SEEDS)).nsfw_content_detected is None
    with pytest.raises(InputError, match="a safety_checker without a feature_extractor"):
        DiffusionPipeline.from_pretrained(checked, feature_extractor=None, backend="null")
    DiffusionPipeline.from_pretrained(checked, backend="eager").save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert again.safety_checker is not None
    assert again.feature_extractor.crop_size["height"] == 24


def test_a_tiny_autoencoder_takes_the_place_of_the_plain_one(sd2: Path) -> None:
    config = {**TINY, **{f"{half}_block_out_channels": (16, 16) for half in ("encoder", "decoder")},
              "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}  # fmt: skip
    vae = noisy(diffusers.AutoencoderTiny(**config), 5)
    for kind, call in (
        ("StableDiffusionPipeline", {}),
        ("StableDiffusionImg2ImgPipeline", {"image": picture(16, 16), "strength": 0.6}),
    ):
        theirs = getattr(diffusers, kind).from_pretrained(sd2, vae=vae, safety_checker=None)
        theirs.set_progress_bar_config(disable=True)
        call = {"prompt": ["a cat", "a dog"], "num_inference_steps": 5, **call}
        images = theirs(**call, generator=generator((1, 2)), output_type="np").images
        pipe = getattr(anamorph, kind).from_pretrained(sd2, vae=vae, backend="eager")
        assert np.abs(ours(pipe, (1, 2), **call).images - images).max() <= IMAGE_BOUND


def test_models_of_transformers_and_diffusers_are_taken_over_with_their_weights(sd2: Path) -> None:
    text = transformers.CLIPTextModel.from_pretrained(sd2, subfolder="text_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet")
    call = {"prompt": ["a red cat", "a dog"], "num_inference_steps": 3}
    expected = reference(sd2, None, (1, 2), **call)
    pipe = StableDiffusionPipeline.from_pretrained(sd2, text_encoder=text, unet=unet, backend="eager")
    latents, pixels = worst(ours(pipe, (1, 2), **call), expected)
    assert latents <= 1e-5
    assert pixels <= IMAGE_BOUND
    mine = pipe.components["unet"].component.module
    assert mine.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()
    with torch.no_grad():
        (bias,) = (value for name, value in text.named_parameters() if name.endswith("final_layer_norm.bias"))
        bias += 0.1
    changed = StableDiffusionPipeline.from_pretrained(sd2, text_encoder=text, backend="eager")
    assert relative(ours(changed, (1, 2), **call).latents[-1], expected.latents[-1]) > 1e-3


def test_a_strange_module_is_refused(sd2: Path) -> None:
    with pytest.raises(InputError, match="text_encoder is a Linear, expected a model of anamorph"):
        StableDiffusionPipeline.from_pretrained(sd2, text_encoder=torch.nn.Linear(2, 2))
    text = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(InputError, match="text_encoder is a CLIPVisionModel, expected"):
        StableDiffusionPipeline.from_pretrained(sd2, text_encoder=text)
