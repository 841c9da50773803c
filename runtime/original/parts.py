"""The models in an original file, each with diffusers' names, shapes and configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anamorph.errors import CheckpointError
from anamorph.original import names, shapes
from anamorph.original.reading import Original
from anamorph.weights import Stored

UNET = ("model.diffusion_model.", "diffusion_model.")
EMA = "model_ema."
CONTROL = ("control_model.",)
HINT = "input_hint_block.0.weight"
"""By which a ControlNet is known."""
VAE = ("first_stage_model.", "vae.")
IGNORED = ("logit_scale", "attn_mask", "position_ids")
"""Last steps of names that carry no weights."""


@dataclass(frozen=True)
class Converted:
    """One model: its slot in a pipeline, class, configuration, and tensors by diffusers' names."""

    slot: str
    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def library(self) -> str:
        """What `model_index.json` calls the library of its class."""
        return "transformers" if self.class_name.startswith("CLIP") else "diffusers"

    @property
    def stem(self) -> str:
        """How its weight file is named."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"


@dataclass(frozen=True)
class Encoder:
    """Where an original file keeps a text encoder, which slot it fills, and in which of the two layouts."""

    prefix: str
    slot: str
    openclip: bool
    projected: bool = False


ENCODERS = (
    Encoder("cond_stage_model.transformer.", "text_encoder", False),
    Encoder("cond_stage_model.model.", "text_encoder", True),
    Encoder("conditioner.embedders.0.transformer.", "text_encoder", False),
    Encoder("conditioner.embedders.0.model.", "text_encoder_2", True, True),
    Encoder("conditioner.embedders.1.model.", "text_encoder_2", True, True),
)


def unet(original: Original, *, ema: bool = False) -> Converted | None:
    """The denoiser, or None; with `ema` the average of its weights that training kept.

    Raises CheckpointError: there is no average, or the blocks are of another kind.
    """
    found = original.below(*UNET)
    if not found and "input_blocks.0.0.weight" in original.tensors and HINT not in original.tensors:
        found = dict(original.tensors)
    if not found:
        return None
    if ema:
        found = {name: _averaged(original, name) for name in found}
    known = {name: tuple(value.values.shape) for name, value in found.items()}
    config = shapes.unet_config(known)
    levels = shapes.unet_levels(known)
    places = names.unet_places(len(levels), levels[0].layers, [level.depth > 0 for level in levels])
    renamed = names.renamed(found, places, "UNet")
    return Converted("unet", "UNet2DConditionModel", config, {renamed[name]: found[name] for name in found})


def controlnet(original: Original) -> Converted | None:
    """The ControlNet, or None; also one with diffusers' names, as many files of a single model have it.

    Raises CheckpointError: its blocks are of another kind.
    """
    found = original.below(*CONTROL)
    if not found and HINT in original.tensors:
        found = dict(original.tensors)
    ours = not found and "controlnet_cond_embedding.conv_in.weight" in original.tensors
    known = {name: tuple(value.values.shape) for name, value in (original.tensors if ours else found).items()}
    if ours:
        levels = shapes.count(known, "down_blocks")
        looks = [shapes.count(known, f"down_blocks.{level}.attentions") > 0 for level in range(levels)]
        hints = 2 + shapes.count(known, "controlnet_cond_embedding.blocks")
        places = names.controlnet_places(levels, shapes.count(known, "down_blocks.0.resnets"), looks, hints)
        before = names.renamed(known, {new: old for old, new in places.items()}, "ControlNet")
        config = shapes.controlnet_config({before[name]: shape for name, shape in known.items()})
        return Converted("controlnet", "ControlNetModel", config, dict(original.tensors))
    if not found:
        return None
    config, unet_levels = shapes.controlnet_config(known), shapes.unet_levels(known)
    looks = [level.depth > 0 for level in unet_levels]
    hints = shapes.count(known, "input_hint_block") // 2 + 1
    places = names.controlnet_places(len(unet_levels), unet_levels[0].layers, looks, hints)
    renamed = names.renamed(found, places, "ControlNet")
    return Converted("controlnet", "ControlNetModel", config, {renamed[name]: found[name] for name in found})


def _averaged(original: Original, name: str) -> Stored:
    """The average of a weight; its name is joined without dots."""
    key = EMA + f"diffusion_model.{name}".replace(".", "")
    if key not in original.tensors:
        raise CheckpointError(f"{original.path} holds no averaged weights ({key}); leave out extract_ema")
    return original.tensors[key]


def vae(original: Original, scaling: float) -> Converted | None:
    """The autoencoder, or None."""
    found = original.below(*VAE)
    if not found and "encoder.conv_in.weight" in original.tensors:
        found = dict(original.tensors)
    found = {name: value for name, value in found.items() if name.split(".")[0] not in ("loss", "model_ema")}
    if not found:
        return None
    known = {name: tuple(value.values.shape) for name, value in found.items()}
    config = shapes.vae_config(known, scaling)
    renamed = names.renamed(found, names.vae_places(len(config["block_out_channels"])), "autoencoder")
    return Converted("vae", "AutoencoderKL", config, {renamed[name]: _matrix(name, found[name]) for name in found})


def _matrix(name: str, value: Stored) -> Stored:
    """Attention's 1x1 convolutions are matrices in diffusers."""
    if ".attn_1." in name and value.values.shape[2:] == (1, 1):
        return replace(value, values=value.values[:, :, 0, 0])
    return value


def text_encoders(original: Original) -> list[Converted]:
    """All text encoders."""
    found = []
    for encoder in ENCODERS:
        if tensors := original.below(encoder.prefix):
            plain = {name: value for name, value in tensors.items() if name.split(".")[-1] not in IGNORED}
            found.append(_openclip(plain, encoder) if encoder.openclip else _clip(plain, encoder))
    return found


def _clip(tensors: Mapping[str, Stored], encoder: Encoder) -> Converted:
    """transformers' own layout; some files leave out the model's name."""
    short = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    known = {name: tuple(value.values.shape) for name, value in short.items()}
    layers = shapes.count(known, "encoder.layers")
    config = shapes.clip_config(known, openclip=False, layers=layers, projected=False)
    return Converted(encoder.slot, "CLIPTextModel", config, {f"text_model.{name}": v for name, v in short.items()})


def _openclip(tensors: Mapping[str, Stored], encoder: Encoder) -> Converted:
    """OpenCLIP's layout; Stable Diffusion 2 stops before its last layer, which is left out as diffusers does."""
    known = {name: tuple(value.values.shape) for name, value in tensors.items()}
    layers = shapes.count(known, "transformer.resblocks") - (not encoder.projected)
    config = shapes.clip_config(known, openclip=True, layers=layers, projected=encoder.projected)
    unused = (f"transformer.resblocks.{layers}.", *(() if encoder.projected else ("text_projection",)))
    whole = {name: value for name, value in tensors.items() if not name.startswith(unused)}
    joined = {name: value for name, value in whole.items() if ".attn.in_proj_" in name}
    renamed = names.renamed(whole.keys() - joined.keys(), names.openclip_places(layers), "text encoder")
    result = {renamed[name]: whole[name] for name in whole if name in renamed}
    if encoder.projected:
        projection = result["text_projection.weight"]
        result["text_projection.weight"] = replace(projection, values=projection.values.T)
    for name, value in joined.items():
        result |= _split(name, value)
    kind = "CLIPTextModelWithProjection" if encoder.projected else "CLIPTextModel"
    return Converted(encoder.slot, kind, config, result)


def _split(name: str, value: Stored) -> dict[str, Stored]:
    """Query, key and value of one layer, stored one below the other."""
    _, _, layer, _, kind = name.split(".")
    rows = len(value.values) // 3
    place = f"text_model.encoder.layers.{layer}.self_attn"
    return {
        f"{place}.{role}_proj.{kind.removeprefix('in_proj_')}": replace(
            value, values=value.values[index * rows : (index + 1) * rows]
        )
        for index, role in enumerate("qkv")
    }
