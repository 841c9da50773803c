"""IP-Adapters in a pipeline: loading them, how strongly they count, and the pictures of a call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.arrays import Array, to_numpy
from anamorph.checkpoint import component_config
from anamorph.clip_image import CLIPImageProcessor
from anamorph.components import VISION, Component
from anamorph.conditions import IMAGE_KEYS
from anamorph.errors import CheckpointError, InputError
from anamorph.hub import HubOptions, find_component
from anamorph.ip_adapter import LAYERS, PROJECTION, Adapter, adapter_of
from anamorph.original.reading import open_original
from anamorph.pickles import load_pickle, tensors
from anamorph.pipelines.image_prompts import Looks, groups_of, inputs_of
from anamorph.pipelines.image_scales import shares
from anamorph.pipelines.sampling import FiniteCheck, Guidance
from anamorph.pipelines.signature import Arguments
from anamorph.weights import floats

if TYPE_CHECKING:
    from anamorph.pipelines.latent_diffusion import LatentDiffusion

F32 = NDArray[np.float32]
ENCODER, ENCODER_CLASS, ENCODER_FILES = (
    "image_encoder",
    "CLIPVisionModelWithProjection",
    ("config.json", "model.safetensors", "pytorch_model.bin"),
)
MASKS = "ip_adapter_masks"
SUFFIXES = (".safetensors", ".bin", ".pt")
Many = str | Sequence[str] | None


def load(
    pipe: "LatentDiffusion", sources: Any, subfolder: Many, weight_name: Many, encoder: str | None, hub: HubOptions
) -> None:
    """Read the adapters and take them in the place of those before; nothing changes where one of them is refused."""
    check_takes(pipe)
    named = [_listed(value) for value in (sources, subfolder, weight_name)]
    count = max(map(len, named))
    if strange := [len(values) for values in named if len(values) not in (1, count)]:
        raise InputError(f"there are {strange[0]} and {count} sources, folders or names of IP-Adapters; give as many")
    every = list(zip(*(values * count if len(values) == 1 else values for values in named), strict=True))
    config = pipe._config("unet")
    adapters = tuple(_read(source, folder, name, config, hub) for source, folder, name in every)
    own = pipe._models.get(ENCODER)
    found = _encoder(every[0][0], every[0][1], encoder, hub) if own is None and encoder is not None else None
    known = own or found
    if known is not None:
        vision = {**VISION, **known.config}
        for adapter in adapters:
            check_width(adapter, vision)
        if pipe.feature_extractor is None:
            pipe.feature_extractor = CLIPImageProcessor(size=vision["image_size"], crop_size=vision["image_size"])
    if found is not None:
        pipe.image_encoder = found
    state = pipe._models["unet"].adapters
    state.loaded, state.scales = adapters, tuple(shares(1.0, config) for _ in adapters)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def check_takes(pipe: "LatentDiffusion") -> None:
    """Raise InputError where the pipeline, or its opened denoiser, has no place for pictures as prompts."""
    if "ip_adapter_image" not in pipe.TAKES.all:
        raise InputError(
            f"{type(pipe).__name__} takes no pictures as prompts; open the checkpoint as a pipeline that does"
        )
    program = pipe.program("unet")
    if stranger := program.placement.details.get("calling"):
        raise InputError(f"the unet is a {stranger}, which takes no pictures as prompts; open the checkpoint's own")
    if IMAGE_KEYS not in {port.name for port in program.interface.inputs}:
        raise InputError(
            "the opened unet has no inputs for pictures as prompts; export the checkpoint with the native signature, "
            "or open the checkpoint itself"
        )


def check_width(adapter: Adapter, encoder: Mapping[str, Any]) -> None:
    """Raise InputError where the adapter was made for another picture encoder."""
    key = "hidden_size" if adapter.kind.states else "projection_dim"
    if adapter.width != encoder[key]:
        raise InputError(
            f"the IP-Adapter takes pictures encoded as {adapter.width} numbers, and the image encoder's {key} is "
            f"{encoder[key]}; take the encoder that it was made with"
        )


def _read(source: Any, subfolder: str | None, name: str | None, config: Mapping[str, Any], hub: HubOptions) -> Adapter:
    if isinstance(source, Mapping):
        return adapter_of(source, config, "the IP-Adapter")
    path = adapter_file(source, subfolder, name, hub)
    if path.suffix == ".safetensors":
        every = open_original(path).tensors.items()
        halves = (PROJECTION, LAYERS)
        return adapter_of({key: floats(one, path) for key, one in every if key.startswith(halves)}, config, str(path))
    whole = load_pickle(path)
    found = {half: tensors(path, value) for half, value in whole.items() if isinstance(value, Mapping)}
    return adapter_of(found or tensors(path, whole), config, str(path))


def adapter_file(source: Any, subfolder: str | None, name: str | None, hub: HubOptions) -> Path:
    """The adapter's file: named, or the only one in its folder; raises CheckpointError where there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    folder = find_component(source, subfolder, (name,) if name else [f"*{suffix}" for suffix in SUFFIXES], **hub)
    if name is not None:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; name the adapter's file with weight_name=")
        return folder / name
    files = sorted(one for one in folder.iterdir() if one.suffix in SUFFIXES)
    if len(files) != 1:
        there = ", ".join(one.name for one in files) or "none"
        raise CheckpointError(f"{folder} holds {len(files)} files of weights ({there}); name one with weight_name=")
    return files[0]


def _encoder(source: Any, subfolder: str | None, folder: str, hub: HubOptions) -> Component:
    """The picture encoder beside the first adapter."""
    remedy = "name its folder with image_encoder_folder=, or pass None there and ip_adapter_image_embeds to calls"
    if isinstance(source, Mapping):
        raise InputError(f"a mapping of weights has no image encoder beside it; {remedy}")
    path = Path(source).expanduser()
    inside = folder if "/" in folder or not subfolder else f"{subfolder}/{folder}"
    try:
        place = find_component(path.parent if path.is_file() else source, inside, ENCODER_FILES, **hub)
        return Component(ENCODER, ENCODER_CLASS, component_config(place), place)
    except CheckpointError as error:
        raise CheckpointError(f"the IP-Adapter comes without its image encoder ({error}); {remedy}") from None


def rescale(pipe: "LatentDiffusion", scale: Any) -> None:
    """Let adapters count so much from now on; see `set_ip_adapter_scale`."""
    state, scales = pipe._models["unet"].adapters, scale if isinstance(scale, list) else [scale]
    if len(scales) != len(state.loaded):
        raise InputError(f"there are {len(scales)} scales for {len(state.loaded)} IP-Adapters; give one for each")
    state.scales = tuple(shares(one, pipe._config("unet")) for one in scales)


def unload(pipe: "LatentDiffusion") -> None:
    """Forget the adapters and the picture encoder."""
    state = pipe._models["unet"].adapters
    state.loaded, state.scales = (), ()
    pipe.image_encoder = None
    if "safety_checker" not in pipe.SLOTS:
        pipe.feature_extractor = None  # type: ignore[assignment]  # its place may be empty


def looks_of(pipe: "LatentDiffusion", call: Arguments) -> Looks:
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
    if strange := [name for name in kwargs or {} if name != MASKS]:
        raise InputError(f"no attention here takes cross_attention_kwargs {strange[0]!r}; it takes {MASKS}")
    return kwargs or {}


def _pixels(pipe: "LatentDiffusion", pictures: Any, count: int) -> tuple[F32, ...]:
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


def _processed(pipe: "LatentDiffusion", given: Any) -> F32:
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


def encoded(pipe: "LatentDiffusion", looks: Looks, guided: bool) -> list[tuple[F32 | None, F32]]:
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


def _output(pipe: "LatentDiffusion", adapter: Adapter) -> str:
    """What the adapter takes of the encoder: the embedding, or the states before the last layer."""
    return f"hidden_states.{_vision(pipe)['num_hidden_layers'] - 1}" if adapter.kind.states else "image_embeds"


def _vision(pipe: "LatentDiffusion") -> Mapping[str, Any]:
    return {**VISION, **pipe._config(ENCODER)}


def _run(pipe: "LatentDiffusion", pixels: F32, name: str) -> F32:
    program = pipe.program(ENCODER)
    value = program.session()({"pixel_values": program.arrays.put(pixels)})[name]
    FiniteCheck.of(program).add_now(value, "encoding the pictures of the IP-Adapter")
    found: F32 = program.arrays.get(value)
    return found


def prepared(
    pipe: "LatentDiffusion", pictures: Any, embeds: Any, device: Any, images: int, guided: bool
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
    pipe: "LatentDiffusion", looks: Looks, guidance: Guidance, images: int, sides: Mapping[str, int]
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
