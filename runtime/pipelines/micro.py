"""SDXL's micro-conditioning: the sizes, crops and scores that its denoisers are told, and a second prompt.

Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.config import Config
from anamorph.errors import ConfigError, InputError
from anamorph.pipelines.prompts import Asking
from anamorph.pipelines.request import Request, as_texts, negatives_for
from anamorph.pipelines.signature import DEFAULTS, Arguments

AESTHETIC = "requires_aesthetics_score"
"""Setting of pipelines that start from a picture: their model is a refiner, told a score instead of a target size."""
SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crops_coords_top_left", "negative_crops_coords_top_left")
SCORES = ("aesthetic_score", "negative_aesthetic_score")


def fields(call: Arguments, prompts: int, *, options: Mapping[str, Any], encoders: int) -> dict[str, Any]:
    """What a request of SDXL holds beside the usual.

    Raises InputError: a value is of a wrong kind, or would not count for this pipeline.
    """
    given: Mapping[str, Any] = call
    found = {name: _pair(name, given[name]) for name in (*SIZES, *CROPS)}
    refining = bool(options.get(AESTHETIC))
    _check_negatives(given, AESTHETIC in options, refining)
    scores = {name: _score(name, given[name], refining) for name in SCORES}
    if found["negative_original_size"] is None and AESTHETIC not in options:
        found["negative_crops_coords_top_left"] = None
    return {**found, **(scores if refining else {}), **_texts(given, prompts, encoders), **_denoising(given)}


def _check_negatives(given: Mapping[str, Any], from_picture: bool, refining: bool) -> None:
    """Raise InputError where a size, crop or score would not count, as it would in silence in diffusers."""
    negatives = [name for name in SIZES if name.startswith("negative_") and given[name] is not None]
    moved = tuple(given[CROPS[1]] or (0, 0)) != (0, 0)
    if not from_picture and len(negatives) == 1:
        raise InputError(f"{negatives[0]} counts only together with the other negative size; give both")
    if not from_picture and moved and not negatives:
        raise InputError(f"{CROPS[1]} counts only with negative_original_size and negative_target_size; give both")
    if from_picture and not refining and moved:
        raise InputError(f"{CROPS[1]} counts only for a refiner; here both branches have crops_coords_top_left")
    if refining and (given["target_size"] is not None or given["negative_target_size"] is not None):
        raise InputError("a refiner is told an aesthetic_score instead of a target_size; leave the size out")


def _pair(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in pair):
        raise InputError(f"{name} is {value!r}, expected two whole numbers of pixels")
    return pair[0], pair[1]


def _score(name: str, value: Any, refining: bool) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}, expected a number")
    if not refining and value != DEFAULTS[name]:
        raise InputError(f"{name} is {value}, but this model is no refiner and knows no scores; leave it out")
    return float(value)


def _texts(given: Mapping[str, Any], prompts: int, encoders: int) -> dict[str, Any]:
    """`prompt_2` and `negative_prompt_2`, one for each prompt."""
    result: dict[str, Any] = {}
    for name in ("prompt_2", "negative_prompt_2"):
        first, value = name.removesuffix("_2"), given[name]
        if value is None:
            continue
        if given[first] is None:
            raise InputError(f"{name} without {first}; give both")
        if encoders < 2:
            raise InputError(f"{name} is for a second text encoder, but this pipeline has one; leave it out")
        if name == "negative_prompt_2":
            result[name] = negatives_for(prompts, value)
            continue
        texts = as_texts(value, name)
        if len(texts) not in (1, prompts):
            raise InputError(f"there are {prompts} prompts and {len(texts)} of prompt_2; give as many, or one text")
        result[name] = texts * (prompts // len(texts))
    return result


def _denoising(given: Mapping[str, Any]) -> dict[str, Any]:
    begin, end = given["denoising_start"], given["denoising_end"]
    for name, value in (("denoising_start", begin), ("denoising_end", end)):
        if value is not None and (not isinstance(value, float) or not 0 < value < 1):
            raise InputError(f"{name} is {value!r}, expected a fraction between 0 and 1")
    if begin is not None and end is not None and begin >= end:
        raise InputError(f"denoising_start is {begin} and denoising_end {end}; expected a start before the end")
    if begin is not None and given["latents"] is not None:
        raise InputError("denoising_start goes on from image, but latents are given; pass them as image")
    return {"denoising_start": begin, "denoising_end": end}


def check_models(owner: str, configs: Mapping[str, Config], options: Mapping[str, Any]) -> None:
    """Raise ConfigError where the denoiser is told other things than this pipeline tells, as a refiner is."""
    unet, expected = configs["unet"], 5 if options.get(AESTHETIC) else 6
    if unet.get("addition_embed_type") != "text_time":
        raise ConfigError(f"the unet is told no sizes, which {owner} tells it; open it with Stable Diffusion's class")
    pooled, width = configs["text_encoder_2"]["projection_dim"], unet["addition_time_embed_dim"]
    numbers, rest = divmod(unet["projection_class_embeddings_input_dim"] - pooled, width)
    if numbers == 5 and expected == 6:
        advice = f"set {AESTHETIC}" if AESTHETIC in options else "open it with StableDiffusionXLImg2ImgPipeline"
        raise ConfigError(f"this unet is a refiner's, which is told an aesthetic score, but a base is needed; {advice}")
    if numbers == 6 and expected == 5:
        raise ConfigError(f"this unet is a base's, which is told a target size, but {AESTHETIC} says refiner; unset it")
    if numbers != expected or rest:
        raise ConfigError(
            f"the unet takes {numbers} numbers beside {pooled} of text_encoder_2's projection_dim, expected {expected}"
        )
    states = sum(config["hidden_size"] for name, config in configs.items() if name.startswith("text_encoder"))
    if states != unet["cross_attention_dim"]:
        raise ConfigError(
            f"the text encoders give states {states} wide, the unet takes {unet['cross_attention_dim']}; take the "
            "encoders that belong to it"
        )


def told_numbers(asking: Asking) -> dict[str, NDArray[Any]]:
    """`time_ids` [branches * N, 6]: original size, crop, target size; a refiner's last is a score, [.., 5]."""
    positive, negative = _numbers(asking.job.request, AESTHETIC in asking.options)
    rows = [*[negative] * (asking.guidance.branches - 1), positive]
    return {"time_ids": np.repeat(np.array(rows, np.float32), asking.job.request.images, axis=0)}


def _numbers(request: Request, from_picture: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the prompt's branch is told, and what the others are."""
    size, crops = (request.height, request.width), request.crops_coords_top_left or (0, 0)
    original, target = request.original_size or size, request.target_size or size
    other = request.negative_original_size or original
    if request.aesthetic_score is not None and request.negative_aesthetic_score is not None:
        other_crops = request.negative_crops_coords_top_left or (0, 0)
        return (*original, *crops, request.aesthetic_score), (*other, *other_crops, request.negative_aesthetic_score)
    # Without negative sizes, diffusers gives the other branch the same crops; from a picture always.
    own_crops = None if from_picture else request.negative_crops_coords_top_left
    return (*original, *crops, *target), (*other, *(own_crops or crops), *(request.negative_target_size or target))
