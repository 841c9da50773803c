"""Which pipeline an original file is meant for: its class, scheduler, sizes and the tokenizers it needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.original import parts
from anamorph.original.parts import Converted
from anamorph.original.reading import Original
from anamorph.original.shapes import SCALING, SDXL_SCALING

EPSILON, V_PREDICTION = "epsilon", "v_prediction"
BASE_STEPS = 875000
"""How long Stable Diffusion 2 was trained before it went on with v-prediction."""
MARK = "v_pred"
"""A tensor by which files of others say that their model predicts v."""

SD = {4: "StableDiffusionPipeline", 8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}
SDXL = {4: "StableDiffusionXLPipeline", 8: "StableDiffusionXLInstructPix2PixPipeline",
        9: "StableDiffusionXLInpaintPipeline"}  # fmt: skip
REFINER = {4: "StableDiffusionXLImg2ImgPipeline"}
"""Channels that the denoiser takes -> class of the pipeline."""

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
         "trained_betas": None}  # fmt: skip
"""The schedule that all of them were trained with."""
VOCABULARIES = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2": "stabilityai/stable-diffusion-2-1",
                "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}  # fmt: skip
"""Hub ids of checkpoints with the same tokenizers."""


@dataclass(frozen=True)
class Kind:
    """A recognised file: its models, and what they are used with.

    `tokenizers` maps slots to whether their texts are filled up with "!", as OpenCLIP's are.
    """

    class_name: str
    models: Sequence[Converted]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokenizers: Mapping[str, bool]
    hub_id: str


def recognise(original: Original, *, ema: bool = False, prediction: str | None = None) -> Kind:
    """What the file is.

    `prediction` ("epsilon", "v_prediction") decides where the file does not tell, as with Stable Diffusion 2.
    Raises CheckpointError: a model is missing. Raises ConfigError: no pipeline takes such a denoiser.
    """
    if prediction not in (None, EPSILON, V_PREDICTION):
        raise InputError(f"prediction_type is {prediction!r}, expected {EPSILON} or {V_PREDICTION}")
    unet = parts.unet(original, ema=ema)
    encoders = {encoder.slot: encoder for encoder in parts.text_encoders(original)}
    second = "text_encoder_2" in encoders
    vae = parts.vae(original, SDXL_SCALING if second else SCALING)
    if unet is None or vae is None or not encoders:
        lacks = [name for name, part in (("UNet", unet), ("autoencoder", vae), ("text encoder", encoders)) if not part]
        few = ", ".join(sorted(original.tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{original.path} holds no {' and no '.join(lacks)} of Stable Diffusion (it begins with {few}); expected a "
            "whole checkpoint in the original layout"
        )
    channels, refiner = unet.config["in_channels"], second and "text_encoder" not in encoders
    class_name = _class_name(original, REFINER if refiner else SDXL if second else SD, channels)
    newer = not second and encoders["text_encoder"].config["hidden_act"] == "gelu"
    predicts = prediction or _prediction(original, newer and channels == 4)
    side = 128 if second else 96 if newer and predicts == V_PREDICTION else 64
    upcast = {"upcast_attention": True} if newer and predicts == V_PREDICTION else {}
    models = [
        replace(unet, config={**unet.config, "sample_size": side, **upcast}),
        replace(vae, config={**vae.config, "sample_size": 8 * side}),
        *encoders.values(),
    ]
    tokenizers = {slot.replace("text_encoder", "tokenizer"): newer or slot.endswith("_2") for slot in encoders}
    settings: dict[str, Any] = {"requires_safety_checker": False}
    if second:
        settings = {"force_zeros_for_empty_prompt": not refiner, "requires_aesthetics_score": refiner}
    hub_id = VOCABULARIES["sdxl" if second else "sd2" if newer else "sd1"]
    return Kind(class_name, models, _scheduler(second, predicts), settings, tokenizers, hub_id)


def _class_name(original: Original, classes: Mapping[int, str], channels: int) -> str:
    if channels not in classes:
        known = " or ".join(map(str, classes))
        raise ConfigError(f"{original.path} holds a UNet of {channels} channels; single files are served with {known}")
    return classes[channels]


def _prediction(original: Original, unsure: bool) -> str:
    marked = MARK in original.tensors
    return V_PREDICTION if marked or (unsure and original.step != BASE_STEPS) else EPSILON


def _scheduler(second: bool, prediction: str) -> dict[str, Any]:
    if second:
        extra = {"interpolation_type": "linear", "timestep_spacing": "leading", "use_karras_sigmas": False}
        return {"_class_name": "EulerDiscreteScheduler", **NOISE, **extra, "prediction_type": prediction}
    name = "DDIMScheduler" if prediction == V_PREDICTION else "PNDMScheduler"
    return {"_class_name": name, **NOISE, "prediction_type": prediction}


def model_of(original: Original, class_name: str, *, ema: bool = False) -> Converted:
    """The model of that class, out of a whole checkpoint or a file that holds it alone.

    Raises CheckpointError: there is none.
    """
    if class_name == "ControlNetModel":
        models = [model for model in (parts.controlnet(original),) if model is not None]
    elif original.below(*parts.UNET) and original.below(*parts.VAE):
        models = list(recognise(original, ema=ema).models)
    else:
        alone = (parts.unet(original, ema=ema), parts.vae(original, SCALING), *parts.text_encoders(original))
        models = [model for model in alone if model is not None]
    for model in models:
        if model.class_name == class_name:
            return model
    held = ", ".join(model.class_name for model in models) or "none that is known"
    raise CheckpointError(f"{original.path} holds no {class_name} in the original layout; its models are: {held}")
