"""How the arguments of a call become a checked `Job`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import to_numpy
from anamorph.errors import InputError
from anamorph.noise import NoiseSource, SeededNoise, TorchNoise
from anamorph.pipelines.controlling import Following, brought_controls, fitted_controls, followed_size
from anamorph.pipelines.cropping import Box, region
from anamorph.pipelines.image_prompts import Looks
from anamorph.pipelines.pictures import (
    Fit,
    Given,
    binary,
    check_count,
    is_latent,
    own_size,
    pixels,
    read_depth,
    read_masks,
    read_pictures,
)
from anamorph.pipelines.request import (
    Request,
    as_interval,
    as_refresh,
    as_texts,
    check_numbers,
    check_size,
    negatives_for,
    seeds_for,
)
from anamorph.pipelines.signature import Arguments
from anamorph.pipelines.tasks import Sources


@dataclass(frozen=True)
class Overlay:
    """Where a picture that was drawn for a part of another goes."""

    original: Image.Image
    mask: Image.Image
    box: Box


@dataclass(frozen=True)
class Job:
    """A checked call: the serialisable request, and what the caller brought instead of seeds and texts."""

    request: Request
    generator: Any = None
    latents: NDArray[Any] | None = None
    embeds: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Encoded texts, by the name of the argument."""
    sources: Sources = field(default_factory=Sources)
    overlay: Overlay | None = None
    looks: Looks = field(default_factory=Looks)
    controls: tuple[NDArray[np.float32], ...] = ()
    """For each net, the pictures that it follows, [1 or prompts, C, H, W]."""

    @property
    def noise(self) -> NoiseSource:
        """A new source of this job's noise, at its beginning."""
        if self.request.seeds is not None:
            return SeededNoise(self.request.seeds)
        return TorchNoise(self.generator, self.request.images)


MoreFields = Callable[[Arguments, int], dict[str, Any]]
"""From a call and its number of prompts to further fields of a request; raises InputError."""


@dataclass(frozen=True)
class Limits:
    """What a pipeline's models say about arguments: sides in pixels, channels, widths of texts, layers to skip.

    `factor` is the number of pixels per latent along one side, `side` the model's own size; `pooled` is the width of
    pooled texts, None where the denoiser takes none. Pictures come out `scale` times as large as the one that they
    start from, where that is not None. An `inpainting` denoiser looks at what stays. `following` are the nets.
    """

    factor: int
    side: int
    channels: int
    latent_channels: int
    width: int
    layers: int
    pooled: int | None = None
    scale: int | None = None
    inpainting: bool = False
    following: Following | None = None


def job_of(call: Arguments, limits: Limits, needs: Sequence[str], more: MoreFields) -> Job:
    """Check a call and freeze it; `needs` are the names of the sources that the task starts from.

    `more` checks what only one family of pipelines takes.

    Raises InputError: an argument is missing, out of range or does not fit the others.
    """
    if (call["prompt"] is None) == (call["prompt_embeds"] is None):
        raise InputError("give either prompt or prompt_embeds")
    check_numbers(call["guidance_scale"], call["num_images_per_prompt"], call["guidance_rescale"])
    _check_clip_skip(call["clip_skip"], limits.layers)
    embeds = _embeds(call, limits)
    given = call["prompt"]
    prompts = ("",) * len(embeds["prompt_embeds"]) if given is None else as_texts(given, "prompt")
    images = len(prompts) * call["num_images_per_prompt"]
    brought = _brought(call, limits, needs)
    controls: tuple[Given, ...] = ()
    if limits.following is not None:
        controls = brought_controls(call, limits.following)
    height, width = _size(call, limits, brought, controls)
    request = Request(
        prompts, negatives_for(len(prompts), call["negative_prompt"]), height, width, call["num_inference_steps"],
        float(call["guidance_scale"]), call["num_images_per_prompt"], float(call["eta"]), seeds_of(call, images),
        _frozen(call["timesteps"]), _frozen(call["sigmas"]), float(call["guidance_rescale"]), call["clip_skip"],
        _strength(call), call["padding_mask_crop"], **more(call, len(prompts)),
        prompt_weighting=call["prompt_weighting"] or None, long_prompts=call["long_prompts"] or None,
        guidance_interval=as_interval(call["guidance_interval"]), step_caching=as_refresh(call["step_caching"]),
    )  # fmt: skip
    shape = (limits.latent_channels, height // limits.factor, width // limits.factor)
    overlay = _overlay(call, height, width)
    scale = limits.scale or 1
    fit = Fit(height // scale, width // scale, overlay.box if overlay else None, bicubic=limits.scale is not None)
    sources = _sources(call, brought, fit, shape, images)
    if limits.inpainting and sources.mask is not None and sources.pictures is None and sources.masked_latents is None:
        raise InputError("image holds latents; give masked_image_latents, too, at which this model looks")
    sources = replace(sources, depth=_depth(call, needs, shape, images))
    latents = None if call["latents"] is None else _latents(call["latents"], "latents", (images, *shape))
    fitted: tuple[NDArray[np.float32], ...] = ()
    if limits.following is not None:
        fitted = fitted_controls(controls, fit, (call["height"], call["width"]), limits.following, len(prompts))
    return Job(request, call["generator"], latents, embeds, sources, overlay, controls=fitted)


def _frozen(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def seeds_of(call: Arguments, images: int) -> tuple[int, ...] | None:
    """One seed per picture, None where generators draw; raises InputError: both are given, or a wrong number."""
    if call["generator"] is None:
        return seeds_for(images, call["seed"])
    if call["seed"] is not None:
        raise InputError("give either seed or generator, not both")
    return None


def _check_clip_skip(clip_skip: int | None, layers: int) -> None:
    if clip_skip is not None and (not isinstance(clip_skip, int) or not 0 <= clip_skip <= layers):
        raise InputError(f"clip_skip is {clip_skip!r}, expected None or 0 to {layers} layers")


EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")
"""Encoded texts that a caller may bring, each also with "negative_" before its name."""


def _embeds(call: Arguments, limits: Limits) -> dict[str, NDArray[Any]]:
    if call["negative_prompt_embeds"] is not None and call["negative_prompt"] is not None:
        raise InputError("give either negative_prompt or negative_prompt_embeds, not both")
    if call["prompt_embeds"] is not None and call["clip_skip"] is not None:
        raise InputError("clip_skip says how texts are encoded, but prompt_embeds are given; leave one out")
    arrays = {}
    for name, value in call.items():
        if value is not None and name.removeprefix("negative_") in EMBEDS:
            arrays[name] = _embed(name, value, limits)
    for prefix in ("", "negative_"):
        given = [prefix + name for name in EMBEDS if prefix + name in arrays]
        if limits.pooled is not None and len(given) == 1:
            missing = next(prefix + name for name in EMBEDS if prefix + name not in given)
            raise InputError(f"{given[0]} without {missing}; this model takes both, from the same encoders")
    for name in EMBEDS:
        pair = [arrays[prefix + name].shape for prefix in ("", "negative_") if prefix + name in arrays]
        if len(set(pair)) > 1:
            raise InputError(f"{name} and negative_{name} have different shapes; expected the same")
    return arrays


def _embed(name: str, value: Any, limits: Limits) -> NDArray[Any]:
    array, pooled = to_numpy(value).astype(np.float32), "pooled" in name
    width = limits.pooled if pooled else limits.width
    if array.ndim != (2 if pooled else 3) or array.shape[-1] != width or not len(array):
        expected = f"[prompts, {width}]" if pooled else f"[prompts, tokens, {width}]"
        raise InputError(f"{name} has shape {list(array.shape)}, expected {expected}")
    return array


def _latents(value: Any, name: str, expected: tuple[int, ...]) -> NDArray[Any]:
    array = to_numpy(value).astype(np.float32)
    if array.shape != expected:
        raise InputError(f"{name} have shape {list(array.shape)}, expected {list(expected)}")
    return array


def _strength(call: Arguments) -> float | None:
    strength = call["strength"]
    if strength is None:
        return None
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"strength is {strength!r}, expected 0 to 1")
    return float(strength)


@dataclass(frozen=True)
class _Brought:
    """The sources of a call as they came."""

    image: Given | None = None
    mask: Given | None = None


def _brought(call: Arguments, limits: Limits, needs: Sequence[str]) -> _Brought:
    all_of = " and ".join(needs)
    given = [name for name, value in call.items() if value is not None]
    for name in needs:
        if name not in given:
            others = [other for other in needs if other in given]
            what = f"{' and '.join(others)} without {name}" if others else f"{name} is missing"
            raise InputError(f"{what}; this task starts from {all_of}")
    if "image" not in needs:
        return _Brought()
    image = read_pictures(call["image"], limits.channels, limits.latent_channels)
    if "mask_image" not in needs:
        return _Brought(image)
    mask = read_masks(call["mask_image"])
    factor = limits.factor if is_latent(image, limits.latent_channels) else 1
    expected = (image.size[0] * factor, image.size[1] * factor)
    if mask.size != expected:
        raise InputError(
            f"mask_image is {mask.size[0]}x{mask.size[1]} and image {expected[0]}x{expected[1]} pixels, "
            "expected the same size; resize the mask"
        )
    return _Brought(image, mask)


def _size(call: Arguments, limits: Limits, brought: _Brought, controls: Sequence[Given]) -> tuple[int, int]:
    """Height and width of the pictures; without a mask, a source's own size counts, and that of a control picture."""
    scale = limits.scale or 1
    if brought.image is not None and is_latent(brought.image, limits.latent_channels):
        size = (brought.image.size[0] * limits.factor * scale, brought.image.size[1] * limits.factor * scale)
        if any(side not in (None, own) for side, own in zip((call["height"], call["width"]), size, strict=True)):
            raise InputError(f"image holds latents of {size[0]}x{size[1]} pixels; leave height and width out")
    elif limits.following is not None:
        first = controls if brought.image is None else (brought.image,)
        size = followed_size(first, call["height"], call["width"], limits.following.multiple)
    elif brought.image is not None and brought.mask is None:
        own = own_size(brought.image, limits.factor)
        size = (own[0] * scale, own[1] * scale)
    else:
        height, width = call["height"], call["width"]
        size = (limits.side if height is None else height, limits.side if width is None else width)
    check_size(*size, limits.factor)
    return size


def _depth(call: Arguments, needs: Sequence[str], shape: tuple[int, int, int], images: int) -> NDArray[Any] | None:
    if "depth_map" not in needs:
        return None
    depth = read_depth(call["depth_map"], shape[1:])
    check_count("depth_map", len(depth), images)
    return depth


def _overlay(call: Arguments, height: int, width: int) -> Overlay | None:
    pad, image, mask = call["padding_mask_crop"], call["image"], call["mask_image"]
    if pad is None:
        return None
    if not isinstance(pad, int) or pad < 0:
        raise InputError(f"padding_mask_crop is {pad!r}, expected 0 or more pixels")
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
        raise InputError("padding_mask_crop needs one Pillow image and one Pillow mask")
    return Overlay(image, mask, region(mask, width, height, pad))


def _sources(call: Arguments, brought: _Brought, fit: Fit, shape: tuple[int, int, int], images: int) -> Sources:
    image, mask = brought.image, brought.mask
    if image is None:
        return Sources()
    for given in (image, mask):
        if given is not None:
            check_count(given.name, given.count, images)
    latents = image.array if image.array is not None and is_latent(image, shape[0]) else None
    pictures = pixels(image, fit) if latents is None else None
    if mask is None:
        return Sources(pictures, latents)
    if image.count != mask.count and 1 not in (image.count, mask.count):
        raise InputError(f"there are {image.count} pictures and {mask.count} masks; give as many, or one of a kind")
    kept = call["masked_image_latents"]
    if kept is not None:
        kept = to_numpy(kept)
        check_count("masked_image_latents", len(kept), images)
        kept = _latents(kept, "masked_image_latents", (len(kept), *shape))
    return Sources(pictures, latents, binary(mask, fit), kept)
