"""A generation as data: what was asked for, checked, serialisable, and enough to make the picture again."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from anamorph.errors import InputError

LARGEST_SEED = 2**64 - 1
LARGEST_SIDE = 16384


@dataclass(frozen=True)
class Request:
    """One call of a pipeline; pictures that it starts from are named by the caller who records it.

    `prompt` and `negative_prompt` (None: there is none) have one entry per prompt; `seeds` one per picture (prompts
    times `num_images_per_prompt`, pictures of one prompt side by side), or none where the caller brought the noise.
    Without texts, each picture has an empty prompt.
    """

    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...] | None
    height: int
    width: int
    num_inference_steps: int | None
    guidance_scale: float
    num_images_per_prompt: int = 1
    eta: float = 0.0
    seeds: tuple[int, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    image_guidance_scale: float | None = None
    noise_level: int | None = None
    class_labels: tuple[int, ...] | None = None
    use_clipped_model_output: bool | None = None
    prompt_2: tuple[str, ...] | None = None
    negative_prompt_2: tuple[str, ...] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    prompt_weighting: bool | None = None
    long_prompts: bool | None = None
    original_inference_steps: int | None = None
    guidance_interval: tuple[float, float] | None = None
    controlnet_conditioning_scale: tuple[float, ...] | None = None
    control_guidance_start: tuple[float, ...] | None = None
    control_guidance_end: tuple[float, ...] | None = None
    guess_mode: bool | None = None
    control_mode: tuple[int, ...] | None = None
    adapter_conditioning_scale: tuple[float, ...] | None = None
    adapter_conditioning_factor: float | None = None
    step_caching: int | float | None = None
    cross_attention_kwargs: Mapping[str, float] | None = None
    """How much adapters count in this call, as "scale"."""

    @property
    def images(self) -> int:
        """Number of pictures."""
        return len(self.prompt) * self.num_images_per_prompt

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without what is not set."""
        items = ((key, value) for key, value in asdict(self).items() if value is not None)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def as_texts(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """A prompt or a list of prompts as a tuple.

    Raises InputError: the list is empty or holds something else than text.
    """
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts:
        raise InputError(f"{name} is an empty list; give at least one text (the empty text is one)")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{name} holds a {type(text).__name__}, expected text")
    return texts


def negatives_for(prompts: int, negative: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One negative prompt per prompt; a single text counts for all, None stays None.

    Raises InputError: the numbers differ.
    """
    if negative is None or isinstance(negative, str):
        return None if negative is None else (negative,) * prompts
    texts = as_texts(negative, "negative_prompt")
    if len(texts) != prompts:
        raise InputError(f"there are {prompts} prompts and {len(texts)} negative prompts; give as many, or one text")
    return texts


def seeds_for(images: int, seed: int | Sequence[int] | None) -> tuple[int, ...]:
    """One seed per picture: a single seed counts up from picture to picture, None draws a random one.

    Raises InputError: another number of seeds than pictures, or a seed outside 0 .. 2**64 - 1.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    seeds = tuple(range(seed, seed + images)) if isinstance(seed, int) else tuple(seed)
    if len(seeds) != images:
        raise InputError(f"there are {len(seeds)} seeds for {images} pictures; give one per picture, or a single one")
    for value in seeds:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_SEED:
            raise InputError(f"seed {value!r} is no whole number from 0 to 2**64 - 1")
    return seeds


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise InputError where a side is no positive multiple of the autoencoder's factor (pixels)."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < multiple or value % multiple:
            raise InputError(f"{name} is {value!r}, expected a positive multiple of {multiple} pixels")
        if value > LARGEST_SIDE:
            raise InputError(f"{name} is {value}, expected at most {LARGEST_SIDE} pixels")


def check_numbers(guidance_scale: float, num_images_per_prompt: int, guidance_rescale: float = 0.0) -> None:
    """Raise InputError where a number makes no sense for any model."""
    if not 0 <= guidance_rescale <= 1:
        raise InputError(f"guidance_rescale is {guidance_rescale}, expected 0 to 1")
    if not 0 <= guidance_scale < float("inf"):
        raise InputError(f"guidance_scale is {guidance_scale}, expected a finite number of 0 or more")
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise InputError(f"num_images_per_prompt is {num_images_per_prompt!r}, expected 1 or more")


def as_interval(value: Sequence[float] | None) -> tuple[float, float] | None:
    """A beginning and an end of 0..1; raises InputError: something else."""
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if (
        len(numbers) != 2
        or not all(isinstance(one, int | float) for one in numbers)
        or not 0 <= numbers[0] < numbers[1] <= 1
    ):
        raise InputError(f"guidance_interval is {value!r}, expected two numbers with 0 <= start < end <= 1")
    return float(numbers[0]), float(numbers[1])


def as_refresh(value: Any) -> int | float | None:
    """A number of steps, or a part of 1; raises InputError: something else."""
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole and value >= 1) or (isinstance(value, float) and 0 < value < 1):
        return int(value) if whole else float(value)
    raise InputError(f"step_caching is {value!r}, expected a whole number of steps, or a part between 0 and 1")


def steps_left(steps: int, strength: float) -> int:
    """How many of `steps` a picture goes through at a strength in 0..1: floor(steps strength).

    Raises InputError: none is left.
    """
    if (left := int(steps * strength)) < 1:
        raise InputError(f"strength {strength} leaves none of {steps} steps; expected at least 1/{steps}")
    return left
