"""The components of a pipeline and their interfaces, computed from their configurations. No engine here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact
from anamorph.checkpoint import Checkpoint
from anamorph.conditions import (
    CONTROL_KIND,
    CONTROL_WEIGHT,
    HINT,
    INTRABLOCK,
    PICTURE,
    condition_ports,
    intrablock_ports,
    residual_ports,
    unconditional_ports,
)
from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.image_prompts import image_ports
from anamorph.interface import Axis, Interface, Port, Scaled
from anamorph.lora.factors import Change, Layers
from anamorph.lora.ports import layers_of, with_factors
from anamorph.native import HINTING, split, splits
from anamorph.safety import CONCEPTS, SPECIAL

BATCH = Axis("batch")
TRANSFORMERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection", "LDMBertModel",
    "StableDiffusionSafetyChecker", "DPTForDepthEstimation",
)  # fmt: skip
"""Classes whose files are named as transformers names them."""


UNEXPORTED = ("DPTForDepthEstimation",)
"""Classes that no exporter writes: where other parts run on exports, an engine that opens checkpoints runs them."""


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: where its weights come from, before any engine has opened it.

    Its source is the folder of a `checkpoint` (exported or not), with the `variant` of the weights to take, or a
    `module` (a PyTorch model built by hand).
    """

    name: str
    class_name: str
    config: Config
    folder: Path | None = None
    variant: str | None = None
    module: Any = None
    checkpoint: Checkpoint | None = None
    refining: bool = False
    """Whether it belongs to SDXL's refiner, whose denoiser's configuration does not tell."""
    rewrites: tuple[str, ...] = ()
    """By which an engine that runs models shall compute it."""
    adapted: Layers = field(default_factory=dict, compare=False)
    """The layers that shall take factors with each call; see `anamorph.lora.ports`."""
    fused: Change = field(default_factory=dict, compare=False)
    """What shall be added to its weights before it runs."""

    @property
    def artifact(self) -> Artifact | None:
        """The exported folder that holds this component, if it comes from one."""
        return None if self.checkpoint is None else self.checkpoint.artifact

    @property
    def content(self) -> str:
        """What an engine must be able to open: "checkpoint" or the name of an exported format."""
        return "checkpoint" if self.artifact is None else self.artifact.format

    @property
    def parts(self) -> tuple[str, ...]:
        """The functions that engines open, in order."""
        if self.artifact is not None:
            return tuple(name for name, part in self.artifact.parts.items() if part.component == self.name)
        declared = interfaces(self.class_name, self.name, self.refining)
        if not splits(self.rewrites):
            return tuple(declared)
        return tuple(self._split(declared))

    @property
    def stored(self) -> Path:
        """Its folder; raises ConfigError where it was built by hand and never stored."""
        if self.folder is None:
            raise ConfigError(f"{self.name} is a module that was never stored; save the pipeline and load that folder")
        return self.folder

    @property
    def stem(self) -> str:
        """How its weight files are named: as diffusers does, or as transformers does."""
        return "model" if self.class_name in TRANSFORMERS else "diffusion_pytorch_model"

    def interface(self, part: str) -> Interface:
        """Inputs and outputs of one part; an exported one may take fewer sizes than the model.

        The factors of adapted layers come last.
        """
        if self.artifact is not None and part in self.artifact.parts:
            exported = self.artifact.parts[part]
            here = layers_of(exported) if self.adapted else {}
            return with_factors(exported.interface, {name: self.adapted[name] for name in self.adapted if name in here})
        declared = interfaces(self.class_name, self.name, self.refining)
        plain = self._split(declared)[part] if splits(self.rewrites) else declared[part](self.config)
        return with_factors(plain, self.adapted)

    def _split(self, declared: "Declared") -> dict[str, Interface]:
        """The interfaces by rewrites that share out between parts what a denoiser takes."""
        plain = (declare(self.config) for declare in declared.values())
        return {name: one for each in plain for name, one in split(each, self.config, self.rewrites).items()}


def text_encoder_interface(config: Config) -> Interface:
    """Token ids to hidden states: [B, S] -> [B, S, D], pooled [B, D], every layer's states.

    Where `learned_mask` is 1, the vectors of `learned_embeds` take the place of the token's own.
    """
    sequence = Axis("sequence", maximum=config["max_position_embeddings"])
    width = config["hidden_size"]
    states = (BATCH, sequence, width)
    layers = range(config["num_hidden_layers"] + 1)
    return Interface(
        "text_encoder",
        (
            Port("input_ids", (BATCH, sequence), "int64", below=config["vocab_size"]),
            Port("learned_embeds", states, optional=True),
            Port("learned_mask", (BATCH, sequence, 1), optional=True),
        ),
        (
            Port("last_hidden_state", states),
            Port("pooler_output", (BATCH, width)),
            *(Port(f"hidden_states.{layer}", states) for layer in layers),
        ),
    )


def projected_text_interface(config: Config) -> Interface:
    """The same with the projected text [B, P] first, instead of the pooled states."""
    plain = text_encoder_interface(config)
    last, _, *states = plain.outputs
    return replace(plain, outputs=(Port("text_embeds", (BATCH, config["projection_dim"])), last, *states))


def bert_interface(config: Config) -> Interface:
    """Token ids to hidden states: [B, S] -> [B, S, D]."""
    sequence = Axis("sequence", maximum=config["max_position_embeddings"])
    ids = Port("input_ids", (BATCH, sequence), "int64", below=config["vocab_size"])
    return Interface("text_encoder", (ids,), (Port("last_hidden_state", (BATCH, sequence, config["d_model"])),))


VISION: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
}
"""transformers' keys of picture encoders, which leaves out what equals these defaults."""


def image_encoder_interface(given: Config) -> Interface:
    """Pictures as CLIP's processor makes them, [B, C, s, s] -> embedding [B, P], every layer's states [B, S, D]."""
    config = {**VISION, **given}
    pixels = Port("pixel_values", (BATCH, config["num_channels"], *(config["image_size"],) * 2))
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
    states = (BATCH, tokens, config["hidden_size"])
    layers = range(config["num_hidden_layers"] + 1)
    return Interface(
        "image_encoder",
        (pixels,),
        (
            Port("image_embeds", (BATCH, config["projection_dim"])),
            Port("last_hidden_state", states),
            *(Port(f"hidden_states.{layer}", states) for layer in layers),
        ),
    )


def depth_interface(config: Config) -> Interface:
    """Pictures as DPT's processor makes them, [B, C, s, s] -> inverse depth in a unit of its own, [B, h, h]."""
    pixels = Port("pixel_values", (BATCH, config["num_channels"], *(config["image_size"],) * 2))
    patches, last = config["image_size"] // config["patch_size"], config["reassemble_factors"][-1]
    deepest = patches * int(last) if last >= 1 else -(-patches // int(1 / last))
    side = deepest * 2 ** (len(config["neck_hidden_sizes"]) + 1)  # each fusion doubles the sides, and so does the head
    return Interface("depth_estimator", (pixels,), (Port("predicted_depth", (BATCH, side, side)),))


def safety_checker_interface(config: Config) -> Interface:
    """Pictures as CLIP's processor makes them, [B, 3, s, s] -> scores of `anamorph.safety`, [B, S] and [B, C]."""
    vision = {**VISION, **(config["vision_config"] or {})}
    pixels = Port("clip_input", (BATCH, vision["num_channels"], *(vision["image_size"],) * 2))
    return Interface(
        "safety_checker", (pixels,), (Port("special", (BATCH, SPECIAL)), Port("concepts", (BATCH, CONCEPTS)))
    )


def plain_unet_interface(config: Config) -> Interface:
    """One call of a denoiser without texts: x_t [B, C, h, w], t (scalar), perhaps classes -> [B, C_out, h, w]."""
    height, width = Axis("latent_height"), Axis("latent_width")
    sample = Port("sample", (BATCH, config["in_channels"], height, width))
    return Interface(
        "unet",
        (sample, Port("timestep", ()), *unconditional_ports(config)),
        (Port("out_sample", (BATCH, config["out_channels"], height, width)),),
    )


def transformer_interface(config: Config) -> Interface:
    """One call of a class-conditional transformer: x_t [B, C, s, s], t (scalar), classes [B] -> [B, C_out, s, s].

    The class after the last one stands for none.
    """
    side = (config["sample_size"],) * 2
    classes = Port("class_labels", (BATCH,), "int64", below=config["num_embeds_ada_norm"] + 1)
    return Interface(
        "transformer",
        (Port("sample", (BATCH, config["in_channels"], *side)), Port("timestep", ()), classes),
        (Port("out_sample", (BATCH, config["out_channels"] or config["in_channels"], *side)),),
    )


def unet_interface(config: Config, time_ids: int = 6) -> Interface:
    """One denoiser call: x_t [B, C, h, w], t (scalar) and what the model is conditioned on -> [B, C_out, h, w].

    `time_ids` as for `condition_ports`; the residuals of a ControlNet and pictures as prompts are optional.
    """
    height, width = _sides(config)
    return Interface(
        "unet",
        (
            Port("sample", (BATCH, config["in_channels"], height, width)),
            Port("timestep", ()),
            *condition_ports(config, time_ids),
            *residual_ports(config),
            *intrablock_ports(config),
            *image_ports(config),
        ),
        (Port("out_sample", (BATCH, config["out_channels"], height, width)),),
    )


def controlnet_interface(config: Config) -> Interface:
    """One call of a ControlNet: x_t [B, C, h, w], t (scalar), conditions, hint [B, C_0, h, w] -> residuals."""
    height, width = _sides(config)
    return Interface(
        "controlnet",
        (
            Port("sample", (BATCH, config["in_channels"], height, width)),
            Port("timestep", ()),
            *condition_ports(config),
            Port(HINT, (BATCH, config["block_out_channels"][0], height, width)),
        ),
        tuple(replace(port, optional=False) for port in residual_ports(config)),
    )


def hint_interface(config: Config) -> Interface:
    """Pictures in 0..1 [B, C, H, W] -> the hint that a ControlNet adds to its first state, [B, C_0, h, w]."""
    factor = hint_factor(config)
    height, width = Axis("height", factor, factor), Axis("width", factor, factor)
    hint = (BATCH, config["block_out_channels"][0], Scaled("height", 1, factor), Scaled("width", 1, factor))
    picture = Port(PICTURE, (BATCH, config["conditioning_channels"], height, width))
    return Interface("controlnet_hint", (picture,), (Port(HINT, hint),))


def union_hint_interface(config: Config) -> Interface:
    """The same for a net that knows several kinds of pictures: with the number of each one's kind, and its weight."""
    plain = hint_interface(config)
    kind = Port(CONTROL_KIND, (BATCH,), "int64", below=config["num_control_type"])
    return replace(plain, inputs=(*plain.inputs, kind, Port(CONTROL_WEIGHT, (BATCH,))))


LIGHT = "light_adapter"
"""The kind of T2I-Adapter that computes with a quarter of the channels, and halves once more."""


def adapter_levels(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels of each of a T2I-Adapter's features, and how often the resolution was halved before it."""
    widths, kind = tuple(config["channels"]), config["adapter_type"]
    if kind == LIGHT:
        widths = (*widths, widths[-1])
    return [(width, min(1, level // 2) if kind == "full_adapter_xl" else level) for level, width in enumerate(widths)]


def adapter_interface(config: Config) -> Interface:
    """Pictures in 0..1 [B, C, H, W] -> what joins a UNet's states, [B, C_k, h_k, w_k] for each of its places."""
    factor = config["downscale_factor"]
    height, width = Axis("height", factor, factor), Axis("width", factor, factor)

    def port(index: int, channels: int, halved: int) -> Port:
        sides = (Scaled(side, 1, factor * 2**halved) for side in ("height", "width"))
        return Port(f"{INTRABLOCK}.{index}", (BATCH, channels, *sides))

    picture = Port(PICTURE, (BATCH, config["in_channels"], height, width))
    features = (port(index, *level) for index, level in enumerate(adapter_levels(config)))
    return Interface("adapter", (picture,), tuple(features))


def hint_factor(config: Mapping[str, Any]) -> int:
    """Pixels of a ControlNet's picture per latent along one side."""
    return int(2 ** (len(config["conditioning_embedding_out_channels"]) - 1))


def _sides(config: Config) -> tuple[Axis, Axis]:
    """Height and width of a denoiser's latents; k-diffusion's blocks halve evenly and reflect two pixels or more."""
    multiple = unet_multiple(config) if config["down_block_types"][0].startswith("K") else 1
    least = 1 if multiple == 1 else 2 * multiple
    return Axis("latent_height", multiple, least), Axis("latent_width", multiple, least)


def vae_encoder_interface(config: Config) -> Interface:
    """Pictures in -1..1 [B, C, H, W] -> mean and log-variance of the latents, joined [B, 2 c, h, w]."""
    return _encoder(config, Port("latent_parameters", (BATCH, 2 * config["latent_channels"])))


def plain_encoder_interface(config: Config) -> Interface:
    """Pictures in -1..1 [B, C, H, W] -> their latents [B, c, h, w]."""
    return _encoder(config, Port("latents", (BATCH, latent_channels(config))))


def _encoder(config: Config, latents: Port) -> Interface:
    multiple = vae_scale_factor(config)
    height, width = Axis("height", multiple, multiple), Axis("width", multiple, multiple)
    size = (Scaled("height", 1, multiple), Scaled("width", 1, multiple))
    sample = Port("sample", (BATCH, config["in_channels"], height, width))
    return Interface("vae_encoder", (sample,), (replace(latents, axes=(*latents.axes, *size)),))


def vae_decoder_interface(config: Config) -> Interface:
    """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
    latents = (BATCH, latent_channels(config), Axis("latent_height"), Axis("latent_width"))
    factor = vae_scale_factor(config)
    pictures = (BATCH, config["out_channels"], Scaled("latent_height", factor), Scaled("latent_width", factor))
    return Interface("vae_decoder", (Port("latent_sample", latents),), (Port("sample", pictures),))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of an autoencoder's latents; a codebook may be narrower than what it is looked up for."""
    return int(config.get("vq_embed_dim") or config["latent_channels"])


def unet_multiple(config: Mapping[str, Any]) -> int:
    """Latents of such a side are halved evenly on every level: 2 to the number of levels less one."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def even(interface: Interface, config: Mapping[str, Any]) -> Interface:
    """An interface with sizes that are halved evenly on every level of a UNet, ControlNet or adapter, as graphs take
    them; others stay as they are."""
    if interface.inputs[0].name == "sample" and "latent_height" in interface.axes:
        names, multiple = ("latent_height", "latent_width"), unet_multiple(config)
    elif "adapter_type" in config:
        names, multiple = ("height", "width"), config["downscale_factor"] * 2 ** adapter_levels(config)[-1][1]
    else:
        return interface
    sides = (interface.axes[name] for name in names)
    limits = {side.name: replace(side, multiple=multiple, minimum=max(side.minimum, multiple)) for side in sides}
    return interface.limited(limits)


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side: 2 to the number of levels less one."""
    levels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


Declared = dict[str, Callable[[Config], Interface]]
"""Part name, in which {slot} stands for the component's -> how its interface follows from the configuration."""

_INTERFACES: dict[str, Declared] = {
    "CLIPTextModel": {"{slot}": text_encoder_interface},
    "CLIPTextModelWithProjection": {"{slot}": projected_text_interface},
    "UNet2DConditionModel": {"{slot}": unet_interface},
    "T2IAdapter": {"{slot}": adapter_interface},
    "ControlNetModel": {"{slot}": controlnet_interface, "{slot}" + HINTING: hint_interface},
    "ControlNetUnionModel": {"{slot}": controlnet_interface, "{slot}" + HINTING: union_hint_interface},
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
