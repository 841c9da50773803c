"""SDXL's settings, and what is refused: no model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sdxl_calls import IMAGE, TEXT, call

import anamorph
from anamorph import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from anamorph.backends.null import Null
from anamorph.errors import ConfigError, InputError


def test_a_refiner_is_no_base_and_a_base_no_refiner(sdxl: Path, refiner: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a refiner's, .* but a base is needed; open it with Stable"):
        StableDiffusionXLPipeline.from_pretrained(refiner, backend="null")
    with pytest.raises(ConfigError, match=r"is a refiner's, .* set requires_aesthetics_score"):
        StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, backend="null", requires_aesthetics_score=False)
    with pytest.raises(ConfigError, match=r"is a base's, .* says refiner"):
        StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl, backend="null", requires_aesthetics_score=True)
    with pytest.raises(ConfigError, match="states 40 wide, the unet takes 72"):
        StableDiffusionXLPipeline.from_pretrained(sdxl, backend="null", text_encoder=None, tokenizer=None)


def test_the_autoencoder_stays_out_of_float16_unless_it_is_named(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ("float32", "float16", "bfloat16")
    monkeypatch.setattr(Null, "places", {"cpu": every})
    monkeypatch.setattr(Null, "precisions", lambda *_: every)
    plain = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="null", torch_dtype="float16")
    assert {part: placed.precision for part, placed in plain.placement.items()} == {
        "vae_decoder": "float32", "text_encoder": "float16", "text_encoder_2": "float16", "unet": "float16",
    }  # fmt: skip
    assert str(plain.placement["vae_decoder"]).endswith("in float32, instead of float16")
    half = {"default": "float16", "vae": "float16"}
    named = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="null", torch_dtype=half)
    assert named.placement["vae_decoder"].precision == "float16"
    wide = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="null", torch_dtype="bfloat16")
    assert wide.placement["vae_decoder"].precision == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (TEXT, {"prompt_2": ["x"] * 3}, "2 prompts and 3 of prompt_2"),
        (TEXT, {"negative_prompt": None, "negative_prompt_2": "x"}, "negative_prompt_2 without negative_prompt"),
        (TEXT, {"original_size": (1,)}, r"original_size is \(1,\), expected two whole numbers"),
        (TEXT, {"negative_original_size": (1, 2)}, "counts only together with the other"),
        (TEXT, {"negative_crops_coords_top_left": (1, 2)}, "counts only with negative_original_size"),
        (IMAGE, {"negative_crops_coords_top_left": (1, 2)}, "counts only for a refiner"),
        (IMAGE, {"aesthetic_score": 7.0}, "no refiner and knows no scores"),
        (TEXT, {"denoising_end": 1.5}, "denoising_end is 1.5, expected a fraction"),
        (TEXT, {"denoising_end": 0.0001}, "denoising_end 0.0001 leaves none of 5 steps"),
        (IMAGE, {"denoising_start": 0.9999}, "denoising_start 0.9999 leaves none"),
        (IMAGE, {"denoising_start": 0.6, "denoising_end": 0.5}, "expected a start before the end"),
        (TEXT, {"prompt": None, "prompt_embeds": np.zeros((1, 77, 72))}, "prompt_embeds without pooled_prompt_embeds"),
        (TEXT, {"clip_skip": 2}, "clip_skip is 2, expected None or 0 to 1"),
    ],
)
def test_wrong_arguments_are_named(sdxl: Path, kind: str, changes: dict[str, Any], words: str) -> None:
    pipe = getattr(anamorph, kind).from_pretrained(sdxl, backend="null")
    with pytest.raises(InputError, match=words):
        pipe(**call(kind, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_size": (1, 2)}, "aesthetic_score instead of a target_size"),
        ({"prompt_2": "x"}, "this pipeline has one"),
        ({"aesthetic_score": "much"}, "aesthetic_score is 'much'"),
    ],
)
def test_wrong_arguments_of_a_refiner_are_named(refiner: Path, changes: dict[str, Any], words: str) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, backend="null")
    with pytest.raises(InputError, match=words):
        pipe(**call(IMAGE, **changes))  # type: ignore[operator]
