"""The parts of each class of models, and what each takes and returns. No engine here."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from anamorph.autoencoder_interfaces import plain_encoder_interface, vae_decoder_interface, vae_encoder_interface
from anamorph.config import Config
from anamorph.denoiser_interfaces import (
    adapter_interface,
    controlnet_interface,
    hint_interface,
    plain_unet_interface,
    transformer_interface,
    unet_interface,
)
from anamorph.encoder_interfaces import (
    bert_interface,
    depth_interface,
    image_encoder_interface,
    projected_text_interface,
    safety_checker_interface,
    text_encoder_interface,
)
from anamorph.errors import ConfigError
from anamorph.interface import Interface
from anamorph.native import HINTING

Declared = dict[str, Callable[[Config], Interface]]
"""Part name, in which {slot} stands for the component's -> how its interface follows from the configuration."""


_INTERFACES: dict[str, Declared] = {
    "CLIPTextModel": {"{slot}": text_encoder_interface},
    "CLIPTextModelWithProjection": {"{slot}": projected_text_interface},
    "UNet2DConditionModel": {"{slot}": unet_interface},
    "T2IAdapter": {"{slot}": adapter_interface},
    "ControlNetModel": {"{slot}": controlnet_interface, "{slot}" + HINTING: hint_interface},
    "UNet2DModel": {"{slot}": plain_unet_interface},
    "DiTTransformer2DModel": {"{slot}": transformer_interface},
    "Transformer2DModel": {"{slot}": transformer_interface},
    "AutoencoderKL": {"vae_encoder": vae_encoder_interface, "vae_decoder": vae_decoder_interface},
    "AutoencoderTiny": {"vae_encoder": plain_encoder_interface, "vae_decoder": vae_decoder_interface},
    "VQModel": {"vae_encoder": plain_encoder_interface, "vae_decoder": vae_decoder_interface},
    "LDMBertModel": {"{slot}": bert_interface},
    "CLIPVisionModelWithProjection": {"{slot}": image_encoder_interface},
    "DPTForDepthEstimation": {"{slot}": depth_interface},
    "StableDiffusionSafetyChecker": {"{slot}": safety_checker_interface},
}
_REFINING: dict[str, Declared] = {"UNet2DConditionModel": {"{slot}": partial(unet_interface, time_ids=5)}}


def interfaces(class_name: str, slot: str, refining: bool = False) -> Declared:
    """Part name -> how its interface follows from the configuration; most parts are called after their `slot`.

    `refining`: it belongs to SDXL's refiner.

    Raises ConfigError: no model of that class is known.
    """
    if class_name not in _INTERFACES:
        raise ConfigError(f"no model class {class_name!r} is known; known are {', '.join(_INTERFACES)}")
    declared = {**_INTERFACES, **(_REFINING if refining else {})}[class_name]
    named = {name.format(slot=slot): declare for name, declare in declared.items()}
    return {part: partial(_named, part, declare) for part, declare in named.items()}


def _named(part: str, declare: Callable[[Config], Interface], config: Config) -> Interface:
    return replace(declare(config), component=part)
