"""The arguments that say what a picture shall follow: control pictures, their weights, and when they count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError
from anamorph.pipelines.pictures import Fit, Given, own_size, read_controls
from anamorph.pipelines.signature import Arguments

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Following:
    """What a pipeline follows: the `argument` that holds the pictures, and for each net the `channels` of its own.

    `what` is how errors call a net; pictures without a wished size are cut to a `multiple` of pixels. Where they are
    `open`, a single net follows any number of pictures, and each entry of the argument is one, or one for each prompt.
    """

    argument: str
    channels: tuple[int, ...]
    what: str
    multiple: int
    open: bool = False


def brought_controls(call: Arguments, following: Following) -> tuple[Given, ...]:
    """The pictures of each net as they came; raises InputError: they are missing, or others than there are nets."""
    given: Mapping[str, Any] = call
    value, count = given[following.argument], len(following.channels)
    if value is None:
        raise InputError(f"{following.argument} is missing; give the picture that the {following.what} follows")
    channels = following.channels
    if following.open:
        every: list[Any] | None = list(value) if isinstance(value, list | tuple) else [value]
        channels = channels * len(every or ()) if count == 1 else channels
        count = max(1, len(channels))
    else:
        every = _per_net(value, count)
    if every is None or len(every) != count:
        found = "no list" if every is None else f"{len(every)} pictures"
        raise InputError(
            f"{following.argument} holds {found} for {count} {following.what}s; give a list with one for each"
        )
    pairs = zip(every, channels, strict=True)
    return tuple(read_controls(one, following.argument, channels) for one, channels in pairs)


def _per_net(value: Any, count: int) -> list[Any] | None:
    """The pictures of each net: of one net, all of them; else a list, or a list for each prompt with one of each."""
    if isinstance(value, list | tuple) and value and all(isinstance(one, list | tuple) for one in value):
        if len({len(one) for one in value}) != 1:
            return []
        return [list(each) for each in zip(*value, strict=True)]
    if count == 1:
        return [value]
    return list(value) if isinstance(value, list | tuple) else None


def followed_size(controls: Sequence[Given], height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    """Height and width of what is drawn: those that are given, or the first control picture's."""
    own = own_size(controls[0], multiple)
    return (own[0] if height is None else height, own[1] if width is None else width)


def fitted_controls(
    controls: Sequence[Given], fit: Fit, asked: tuple[int | None, int | None], following: Following, prompts: int
) -> tuple[F32, ...]:
    """Each net's pictures at the size of what is drawn, in 0..1: one, or one for each prompt.

    They are resized to the height and width that are `asked` for, and to a box that is cut out.
    Raises InputError: they have another size than what is drawn, or are neither one nor one for each prompt.
    """
    fitted = []
    for given in controls:
        own = followed_size((given,), *asked, following.multiple)
        if fit.box is None and own != (fit.height, fit.width):
            raise InputError(
                f"{given.name} has {own[0]}x{own[1]} pixels where {fit.height}x{fit.width} are drawn; give pictures of "
                "one size, or height and width to have all resized"
            )
        if given.count not in (1, prompts):
            raise InputError(
                f"there are {given.count} of {given.name} for {prompts} prompts; give one, or one for each"
            )
        fitted.append(_unit(given, fit))
    return tuple(fitted)


def _unit(given: Given, fit: Fit) -> F32:
    """Pictures at the size that is drawn, as nets see them: [B, C, H, W], those of Pillow in 0..1."""
    if given.array is not None:
        return fit.array(given.array)
    stacked = np.stack([np.asarray(fit.pillow(image), np.float32) for image in given.images]) / np.float32(255)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def controlnet_fields(call: Arguments, nets: int) -> dict[str, Any]:
    """What a request remembers of ControlNets: a weight, a beginning and an end for each, and whether they guess.

    Raises InputError: a value is out of range, or a list holds others than there are nets.
    """
    scales = _numbers("controlnet_conditioning_scale", call["controlnet_conditioning_scale"], nets, "ControlNet")
    starts = _numbers("control_guidance_start", call["control_guidance_start"], nets, "ControlNet")
    ends = _numbers("control_guidance_end", call["control_guidance_end"], nets, "ControlNet")
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise InputError(
                f"control_guidance_start is {start:g} and control_guidance_end {end:g}, expected 0 <= start < end <= 1"
            )
    if not isinstance(call["guess_mode"], bool):
        raise InputError(f"guess_mode is {call['guess_mode']!r}, expected True or False")
    return {
        "controlnet_conditioning_scale": scales, "control_guidance_start": starts, "control_guidance_end": ends,
        "guess_mode": call["guess_mode"],
    }  # fmt: skip


def union_fields(call: Arguments, kinds: Sequence[int]) -> dict[str, Any]:
    """What a request remembers of nets that look at so many `kinds` of pictures each: also the kind of each picture.

    Raises InputError: there are not as many kinds as pictures, or one is of no net, or what `controlnet_fields` says.
    """
    given, pictures = call["control_mode"], call["control_image"]
    modes = tuple(given) if isinstance(given, list | tuple) else (given,)
    count = len(pictures) if isinstance(pictures, list | tuple) else 1
    if len(modes) != count:
        raise InputError(f"control_mode holds {len(modes)} kinds for {count} pictures; give one for each")
    for mode, most in zip(modes, kinds if len(kinds) > 1 else [*kinds] * count, strict=False):
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode < most:
            raise InputError(f"control_mode is {given!r}, expected a kind of picture from 0 to {most - 1} for each")
    return {**controlnet_fields(call, count), "control_mode": modes}


def adapter_fields(call: Arguments, nets: int) -> dict[str, Any]:
    """What a request remembers of T2I-Adapters: a weight for each, and for which part of the steps they count.

    Raises InputError: a value is out of range, or a list holds others than there are adapters.
    """
    scales = _numbers("adapter_conditioning_scale", call["adapter_conditioning_scale"], nets, "T2I-Adapter")
    part = call["adapter_conditioning_factor"]
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part <= 1:
        raise InputError(f"adapter_conditioning_factor is {part!r}, expected 0 to 1")
    return {"adapter_conditioning_scale": scales, "adapter_conditioning_factor": float(part)}


def _numbers(name: str, value: Any, nets: int, what: str) -> tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value] * nets
    if len(values) != nets:
        raise InputError(f"{name} holds {len(values)} numbers for {nets} {what}s; give one for all, or as many")
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float) or not np.isfinite(one):
            raise InputError(f"{name} is {value!r}, expected a finite number, or one for each {what}")
    return tuple(float(one) for one in values)
