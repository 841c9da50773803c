"""IP-Adapters in a pipeline: loading them, and how strongly they count."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.clip_image import CLIPImageProcessor
from anamorph.components import Component
from anamorph.conditions import IMAGE_KEYS
from anamorph.encoder_interfaces import VISION
from anamorph.errors import CheckpointError, InputError
from anamorph.hub import HubOptions, find_component
from anamorph.ip_adapter import LAYERS, PROJECTION, Adapter, adapter_of
from anamorph.original.reading import open_original
from anamorph.pickles import load_pickle, tensors
from anamorph.pipelines.describing import read_component
from anamorph.pipelines.image_scales import shares
from anamorph.weights import floats

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

ENCODER, ENCODER_CLASS = "image_encoder", "CLIPVisionModelWithProjection"
ENCODER_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt")
Many = str | Sequence[str] | None


def load(
    pipe: "DiffusionPipeline", sources: Any, subfolder: Many, weight_name: Many, encoder: str | None, hub: HubOptions
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


def check_takes(pipe: "DiffusionPipeline") -> None:
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
        return read_component(open_checkpoint(Source(str(place))), ENCODER, (ENCODER_CLASS,))
    except CheckpointError as error:
        raise CheckpointError(f"the IP-Adapter comes without its image encoder ({error}); {remedy}") from None


def rescale(pipe: "DiffusionPipeline", scale: Any) -> None:
    """Let adapters count so much from now on; see `set_ip_adapter_scale`."""
    state, scales = pipe._models["unet"].adapters, scale if isinstance(scale, list) else [scale]
    if len(scales) != len(state.loaded):
        raise InputError(f"there are {len(scales)} scales for {len(state.loaded)} IP-Adapters; give one for each")
    state.scales = tuple(shares(one, pipe._config("unet")) for one in scales)


def unload(pipe: "DiffusionPipeline") -> None:
    """Forget the adapters and the picture encoder."""
    state = pipe._models["unet"].adapters
    state.loaded, state.scales = (), ()
    pipe.image_encoder = None
    if "safety_checker" not in pipe.SLOTS:
        pipe.feature_extractor = None  # type: ignore[assignment]  # its place may be empty
