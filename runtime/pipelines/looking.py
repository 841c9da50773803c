"""The pictures of a call as prompts: checked, encoded, and as the denoiser is told of them (IP-Adapter)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import Array, to_numpy
from anamorph.encoder_interfaces import VISION
from anamorph.errors import InputError
from anamorph.ip_adapter import Adapter
from anamorph.pipelines.image_prompts import Looks, groups_of, inputs_of
from anamorph.pipelines.ip_adapters import ENCODER, check_takes
from anamorph.pipelines.lora import SCALE
from anamorph.pipelines.sampling import FiniteCheck, Guidance
from anamorph.pipelines.signature import Arguments

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

F32 = NDArray[np.float32]
MASKS = "ip_adapter_masks"


def looks_of(pipe: "DiffusionPipeline", call: Arguments) -> Looks:
    """The pictures of a call, checked; raises InputError where they do not fit the adapters."""
    state, pictures, embeds = pipe._models["unet"].adapters, call["ip_adapter_image"], call["ip_adapter_image_embeds"]
    masks = _known(call["cross_attention_kwargs"]).get(MASKS)
    given = [
        name
        for name, value in (("ip_adapter_image", pictures), ("ip_adapter_image_embeds", embeds), (MASKS, masks))
        if value is not None
    ]
    count = len(state.loaded)
    if not count:
        if given:
            raise InputError(f"{given[0]} is given, but no IP-Adapter is loaded; call load_ip_adapter first")
        return Looks()
    if (pictures is None) == (embeds is None):
        raise InputError(
            "an IP-Adapter is loaded: give either ip_adapter_image or ip_adapter_image_embeds, or unload_ip_adapter()"
        )
    check_takes(pipe)
    if pictures is not None:
        pixels = _pixels(pipe, pictures, count)
        every, looks = [len(one) for one in pixels], Looks(pixels, scales=state.scales)
    else:
        encoded = _embeds(embeds, state.loaded)
        every, looks = [one.shape[1] for one in encoded], Looks(embeds=encoded, scales=state.scales)
    looks = replace(looks, masks=_masks(masks, every))
    for scales, mask in zip(looks.scales, looks.masks, strict=True):
        for one in scales:
            if isinstance(one, tuple) and (mask is None or len(one) != len(mask)):
                there = "no masks" if mask is None else f"{len(mask)} masks"
                raise InputError(f"an IP-Adapter has {len(one)} scales for pictures and {there}; give as many")
    return looks


def _known(kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if strange := [name for name in kwargs or {} if name not in (MASKS, SCALE)]:
        raise InputError(f"no attention here takes cross_attention_kwargs {strange[0]!r}; it takes {MASKS} and {SCALE}")
    return kwargs or {}


def _pixels(pipe: "DiffusionPipeline", pictures: Any, count: int) -> tuple[F32, ...]:
    """Pictures as the encoder takes them, [n, C, s, s] for each adapter."""
    every = pictures if isinstance(pictures, list) else [pictures]
    if len(every) != count:
        raise InputError(
            f"ip_adapter_image holds pictures for {len(every)} IP-Adapters and {count} are loaded; give one for each, "
            "or a list of several for each"
        )
    if pipe.components[ENCODER] is None:
        raise InputError(
            "ip_adapter_image needs the image encoder, which is not loaded; load the IP-Adapter with "
            "image_encoder_folder=, or give ip_adapter_image_embeds"
        )
    return tuple(_processed(pipe, one) for one in every)


def _processed(pipe: "DiffusionPipeline", given: Any) -> F32:
    """Pillow images or arrays [H, W, 3] of bytes through the processor; tensors [n, C, s, s] as they are."""
    items = list(given) if isinstance(given, list | tuple) else [given]
    if len(items) == 1 and getattr(items[0], "ndim", 0) == 4:
        side, channels = (_vision(pipe)[key] for key in ("image_size", "num_channels"))
        values = to_numpy(items[0]).astype(np.float32)
        if values.shape[1:] != (channels, side, side):
            raise InputError(
                f"ip_adapter_image has shape {list(values.shape)}, expected [n, {channels}, {side}, {side}]"
            )
        return values
    images = [Image.fromarray(one) if isinstance(one, np.ndarray) and one.dtype == np.uint8 else one for one in items]
    if strange := [type(one).__name__ for one in images if not isinstance(one, Image.Image)]:
        raise InputError(
            f"ip_adapter_image holds a {strange[0]}, expected Pillow images, arrays [H, W, 3] of bytes, or a tensor "
            "[n, 3, s, s] as the image encoder takes it"
        )
    return pipe.feature_extractor(images)


def _embeds(embeds: Any, adapters: Sequence[Adapter]) -> tuple[F32, ...]:
    """What a caller has encoded, [1 or 2, n, ...] for each adapter."""
    if not isinstance(embeds, list) or len(embeds) != len(adapters):
        what = f"{len(embeds)} arrays" if isinstance(embeds, list) else type(embeds).__name__
        raise InputError(f"ip_adapter_image_embeds is {what}, expected a list of {len(adapters)}, one per IP-Adapter")
    found = []
    for value, adapter in zip(embeds, adapters, strict=True):
        array = to_numpy(value).astype(np.float32)
        if array.ndim != 3 + adapter.kind.states or array.shape[-1] != adapter.width or not array.size:
            shape = f"[1 or 2, pictures, {'tokens, ' * adapter.kind.states}{adapter.width}]"
            raise InputError(f"ip_adapter_image_embeds holds an array of shape {list(array.shape)}, expected {shape}")
        found.append(array)
    return tuple(found)


def _masks(masks: Any, pictures: Sequence[int]) -> tuple[F32 | None, ...]:
    """A mask [n, H, W] for each adapter, or None."""
    if masks is None:
        return (None,) * len(pictures)
    every = list(masks) if isinstance(masks, list | tuple) else list(to_numpy(masks)[:, None])
    if len(every) != len(pictures):
        raise InputError(
            f"{MASKS} holds masks for {len(every)} IP-Adapters and {len(pictures)} are loaded; give one each"
        )
    found: list[F32 | None] = []
    for value, count in zip(every, pictures, strict=True):
        array = None if value is None else to_numpy(value).astype(np.float32)
        if array is not None and (array.ndim != 4 or array.shape[:2] != (1, count)):
            raise InputError(
                f"{MASKS} holds an array of shape {list(array.shape)}, expected [1, {count}, height, width]: a mask "
                "for each picture of the IP-Adapter"
            )
        found.append(None if array is None else array[0])
    return tuple(found)


def encoded(pipe: "DiffusionPipeline", looks: Looks, guided: bool) -> list[tuple[F32 | None, F32]]:
    """Embeddings or states of each adapter's pictures: of the negative branch (None: unguided) and the positive."""
    adapters = pipe._models["unet"].adapters.loaded
    pairs: list[tuple[F32 | None, F32]] = []
    for index, adapter in enumerate(adapters):
        if looks.pixels:
            pixels, name = looks.pixels[index], _output(pipe, adapter)
            seen = _run(pipe, pixels, name)
            nothing = None
            if guided:  # of a black picture's states, but no embedding
                nothing = _run(pipe, np.zeros_like(pixels), name) if adapter.kind.states else np.zeros_like(seen)
            pairs.append((nothing, seen))
            continue
        value = looks.embeds[index]
        if len(value) != 1 + guided:
            raise InputError(
                f"ip_adapter_image_embeds holds {len(value)} branches, expected {1 + guided}"
                f"{': negative and positive embeddings, as this call is guided' * guided}"
            )
        pairs.append((value[0] if guided else None, value[-1]))
    return pairs


def _output(pipe: "DiffusionPipeline", adapter: Adapter) -> str:
    """What the adapter takes of the encoder: the embedding, or the states before the last layer."""
    return f"hidden_states.{_vision(pipe)['num_hidden_layers'] - 1}" if adapter.kind.states else "image_embeds"


def _vision(pipe: "DiffusionPipeline") -> Mapping[str, Any]:
    return {**VISION, **pipe._config(ENCODER)}


def _run(pipe: "DiffusionPipeline", pixels: F32, name: str) -> F32:
    program = pipe.program(ENCODER)
    value = program.session()({"pixel_values": program.arrays.put(pixels)})[name]
    FiniteCheck.of(program).add_now(value, "encoding the pictures of the IP-Adapter")
    found: F32 = program.arrays.get(value)
    return found


def prepared(
    pipe: "DiffusionPipeline", pictures: Any, embeds: Any, device: Any, images: int, guided: bool
) -> list[Array]:
    """See `prepare_ip_adapter_image_embeds`."""
    program = pipe.program("unet")
    if device is not None and str(device) != program.placement.device:
        raise InputError(f"device is {str(device)!r}, but the denoiser is on {program.placement.device}; leave it out")
    given: Arguments = {"ip_adapter_image": pictures, "ip_adapter_image_embeds": embeds, "cross_attention_kwargs": None}
    pairs = encoded(pipe, looks_of(pipe, given), guided)
    branches = ([one for one in pair if one is not None] for pair in pairs)
    return [program.arrays.put(np.repeat(np.stack(pair), images, axis=0)) for pair in branches]


def told(
    pipe: "DiffusionPipeline", looks: Looks, guidance: Guidance, images: int, sides: Mapping[str, int]
) -> dict[str, F32]:
    """The denoiser's inputs for these pictures, [branches * N, ...]; only the last branch sees the positive ones."""
    if not looks.masks:
        return {}
    config, adapters = pipe._config("unet"), pipe._models["unet"].adapters.loaded
    pairs = encoded(pipe, looks, bool(guidance.scales))
    whole = list(zip(adapters, looks.scales, looks.masks, strict=True))
    halves = [
        [group for value, (adapter, scale, mask) in zip(half, whole, strict=True) if value is not None
         for group in groups_of(adapter, value, scale, mask, config)]
        for half in zip(*pairs, strict=True)
    ]  # fmt: skip
    branches = [*[halves[0]] * (guidance.branches - 1), halves[1]]
    return inputs_of(branches, images, pipe.program("unet").interface.inputs, sides)
