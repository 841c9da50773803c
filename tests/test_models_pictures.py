"""Picture encoders, the safety checker and the text encoder of latent diffusion, compared with the references."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import noisy
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel as ReferenceBert
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as Reference
from model_parity import TOLERANCE, error, normal
from PIL import Image
from safetensors.torch import load_file, save_file

from anamorph.clip_image import CLIP, CLIPImageProcessor
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.models import (
    MODELS,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LDMBertModel,
    StableDiffusionSafetyChecker,
)
from anamorph.safety import flagged

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
BERT: dict[str, Any] = {
    "vocab_size": 50,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "head_dim": 4,
    "d_model": 32,
}


def vision(name: str, **changes: Any) -> Any:
    """transformers' picture encoder with random weights."""
    return noisy(getattr(transformers, name)(transformers.CLIPVisionConfig(**VISION, **changes)), 2)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-2}], ids=str)
@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_picture_encoder_equals_transformers(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = vision(name, **changes)
    theirs.save_pretrained(tmp_path)
    ours = MODELS[name].from_pretrained(tmp_path)
    pictures = normal(2, 3, 24, 24)
    with torch.no_grad():
        output, expected = ours(pictures, output_hidden_states=True), theirs(pictures, output_hidden_states=True)
        assert error(output[0], expected[0]) <= TOLERANCE
        assert error(output[1], expected[1]) <= TOLERANCE
        assert len(output.hidden_states) == len(expected.hidden_states) == 3
        for state, reference in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert error(state, reference) <= TOLERANCE
        assert error(ours(1.001 * pictures)[0], expected[0]) > 3 * TOLERANCE
    with pytest.raises(InputError, match="expected 24 x 24"):
        ours(normal(1, 3, 24, 32))


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_picture_encoder_reads_both_spellings_and_is_read(name: str, tmp_path: Path) -> None:
    theirs = vision(name)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    plain = {key.removeprefix("vision_model."): value for key, value in state.items()}
    prefixed = {key if key.startswith("visual") else f"vision_model.{key}": value for key, value in plain.items()}
    prefixed["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(prefixed, tmp_path / "model.safetensors")
    ours = MODELS[name].from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    pictures = normal(2, 3, 24, 24)
    with torch.no_grad():
        expected = theirs(pictures)[0]
        assert error(ours(pictures)[0], expected) <= TOLERANCE
        assert torch.equal(again(pictures)[0], expected)


def checker() -> Reference:
    """diffusers' checker with random weights and thresholds that some of the random pictures pass."""
    config = transformers.CLIPConfig(vision_config=VISION, projection_dim=24)
    theirs = noisy(Reference(config), 4)
    with torch.no_grad():
        pictures = theirs.visual_projection(theirs.vision_model(normal(64, 3, 24, 24))[1])
        for name, share in (("concept_embeds", 0.97), ("special_care_embeds", 0.8)):
            cosines = torch.cosine_similarity(pictures[:, None], getattr(theirs, name)[None], dim=-1)
            getattr(theirs, f"{name}_weights").copy_(cosines.quantile(share, dim=0))
    return theirs


@pytest.mark.parametrize("prefix", ["vision_model.", "vision_model.vision_model."])
def test_safety_checker_equals_diffusers(prefix: str, tmp_path: Path) -> None:
    theirs = checker()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in [key for key in state if key.startswith("vision_model.")]:
        plain = key.removeprefix("vision_model.").removeprefix("vision_model.")
        state[prefix + plain] = state.pop(key)
    save_file(state, tmp_path / "model.safetensors")
    ours = StableDiffusionSafetyChecker.from_pretrained(tmp_path)
    inputs, images = normal(64, 3, 24, 24), np.ones((64, 4, 4, 3), np.float32)
    checked, held = ours(inputs, images)
    expected, flags = theirs(inputs, images.copy())
    assert 10 < sum(flags) < 54
    assert held == flags
    assert np.array_equal(checked, expected)
    assert images.min() == 1
    assert torch.equal(ours(inputs, torch.from_numpy(images))[0], torch.from_numpy(expected))
    ours.save_pretrained(tmp_path / "ours")
    again = Reference.from_pretrained(tmp_path / "ours")
    assert again(inputs, images.copy())[1] == flags
    with pytest.raises(InputError, match="got 3 images for 64 inputs"):
        ours(inputs, images[:3])


def test_scores_are_what_the_flags_are_made_of() -> None:
    theirs = checker()
    ours = StableDiffusionSafetyChecker(projection_dim=24, vision_config=VISION).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs, images = normal(64, 3, 24, 24), np.ones((64, 1))
    with torch.no_grad():
        special, concepts = (value.numpy() for value in ours.scores(inputs))
    flags = theirs(inputs, images.copy())[1]
    assert flagged(special, concepts).tolist() == flags
    assert flagged(special, concepts - 0.02).tolist() != flags
    assert flagged(special - 1, concepts).tolist() != flags


def test_a_score_counts_from_half_a_thousandth_on_and_special_concepts_make_it_stricter() -> None:
    none, hit = np.float32([[-1, -1]]), np.float32([[-1, 0.001]])
    for scores, plain, careful in (
        (0.0004, False, True),
        (0.0006, True, True),
        (-0.0094, False, True),
        (-0.0096, False, False),
    ):
        assert flagged(none, np.float32([[scores, -1]])).tolist() == [plain]
        assert flagged(hit, np.float32([[scores, -1]])).tolist() == [careful]


def test_ldm_bert_equals_diffusers(tmp_path: Path) -> None:
    theirs = noisy(ReferenceBert(LDMBertConfig(**BERT)), 5)
    theirs.save_pretrained(tmp_path)
    ours = LDMBertModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids, return_dict=False, output_attentions=False, output_hidden_states=False)[0]
        assert error(ours(ids).last_hidden_state, expected) <= TOLERANCE
        assert error(ours(ids.roll(1, 1))[0], expected) > 1e-2
        assert torch.equal(ours(ids, return_dict=False)[0], ours(ids)[0])
    with pytest.raises(InputError, match="78 tokens, the model takes 77"):
        ours(torch.zeros(1, 78, dtype=torch.int64))


def test_ldm_bert_keys_and_defaults_are_those_of_diffusers() -> None:
    parameters = inspect.signature(LDMBertConfig.__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if key not in ("self", "kwargs")}
    assert dict(LDMBertModel.DEFAULTS) == defaults


@pytest.mark.parametrize("model", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_vision_keys_and_defaults_are_those_of_transformers(model: type[Any]) -> None:
    defaults = transformers.CLIPVisionConfig()
    assert {key: getattr(defaults, key) for key in model.DEFAULTS} == dict(model.DEFAULTS)
    assert model.complete(defaults.to_dict())["transformers_version"] == transformers.__version__


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random colours in blocks of 8 pixels."""
    noise = np.random.default_rng(width * height).integers(0, 256, ((height + 7) // 8, (width + 7) // 8, 3), np.uint8)
    return Image.fromarray(noise.repeat(8, 0).repeat(8, 1)[:height, :width]).convert(mode)


PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {},
    "numbers": {"size": 30, "crop_size": 25},
    "crop larger than the picture": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 24}},
    "stretched": {"size": {"height": 30, "width": 20}, "do_center_crop": False, "resample": 2},
    "no normalisation": {"do_normalize": False, "do_rescale": False, "size": {"shortest_edge": 31}},
}


@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize(("size", "mode"), [((61, 40), "RGB"), ((40, 61), "RGBA"), ((50, 50), "L"), ((301, 450), "P")])
def test_processor_equals_transformers(case: str, size: tuple[int, int], mode: str) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(**PROCESSORS[case])
    images = [picture(*size, mode), picture(*size, mode).rotate(180)]
    expected = np.stack(theirs(images)["pixel_values"])
    ours = CLIPImageProcessor(**PROCESSORS[case])(images)
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(CLIPImageProcessor(**PROCESSORS[case])(images[0]), ours[:1])


def test_processor_reads_and_writes_what_transformers_does(tmp_path: Path) -> None:
    transformers.CLIPImageProcessor(crop_size={"height": 40, "width": 30}).save_pretrained(tmp_path / "theirs")
    ours = CLIPImageProcessor.from_pretrained(tmp_path, subfolder="theirs")
    assert ours.config.crop_size == {"height": 40, "width": 30}
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    assert dict(again.crop_size) == {"height": 40, "width": 30}
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_processor_defaults_are_those_of_transformers() -> None:
    theirs = transformers.CLIPImageProcessor().to_dict()
    for key, value in CLIP.items():
        assert (tuple(theirs[key]) if isinstance(value, tuple) else theirs[key]) == value


@pytest.mark.parametrize(
    "change", [{"size": {"longest_edge": 5}}, {"crop_size": {"shortest_edge": 5}}, {"size": -1}, {"sise": 3}], ids=str
)
def test_processor_refuses_configurations(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        CLIPImageProcessor(**change)


def test_processor_refuses_pictures_that_do_not_come_out_alike() -> None:
    with pytest.raises(InputError, match="pictures of 2 sizes"):
        CLIPImageProcessor(do_center_crop=False)([picture(30, 40), picture(40, 40)])
    with pytest.raises(InputError, match="pictures of 0 sizes"):
        CLIPImageProcessor()([])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("CLIPVisionModel", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("CLIPVisionModel", {"image_size": (24, 32)}, r"image_size=\(24, 32\)"),
    ("CLIPVisionModelWithProjection", {"num_attention_heads": 5}, "num_attention_heads=5"),
    ("StableDiffusionSafetyChecker", {"vision_config": 3}, "vision_config is 3"),
    ("StableDiffusionSafetyChecker", {"vision_config": {"hidden_sice": 3}}, "'hidden_sice'"),
    ("LDMBertModel", {"scale_embedding": True}, "scale_embedding=True"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_configurations_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    bases = {"LDMBertModel": BERT, "StableDiffusionSafetyChecker": {"projection_dim": 24}}
    with pytest.raises(ConfigError, match=message):
        MODELS[name](**{**bases.get(name, VISION), **change})
