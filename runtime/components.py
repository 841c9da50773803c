"""The components of a pipeline and their interfaces, computed from their configurations. No engine here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact
from anamorph.checkpoint import Checkpoint
from anamorph.conditions import condition_ports, residual_ports
from anamorph.config import Config
from anamorph.errors import ConfigError
from anamorph.interface import Axis, Interface, Port, Scaled

BATCH = Axis("batch")


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
        return tuple(interfaces(self.class_name, self.name, self.refining))

    @property
    def stored(self) -> Path:
        """Its folder; raises ConfigError where it was built by hand and never stored."""
        if self.folder is None:
            raise ConfigError(f"{self.name} is a module that was never stored; save the pipeline and load that folder")
        return self.folder

    @property
    def stem(self) -> str:
        """How its weight files are named: as diffusers does, or as transformers does."""
        return "model" if self.class_name.startswith("CLIP") else "diffusion_pytorch_model"

    def interface(self, part: str) -> Interface:
        """Inputs and outputs of one part; an exported one may take fewer sizes than the model."""
        if self.artifact is not None and part in self.artifact.parts:
            return self.artifact.parts[part].interface
        return interfaces(self.class_name, self.name, self.refining)[part](self.config)


def text_encoder_interface(config: Config) -> Interface:
    """Token ids to hidden states: [B, S] -> [B, S, D], pooled [B, D], every layer's states."""
    sequence = Axis("sequence", maximum=config["max_position_embeddings"])
    width = config["hidden_size"]
    states = (BATCH, sequence, width)
    layers = range(config["num_hidden_layers"] + 1)
    return Interface(
        "text_encoder",
        (Port("input_ids", (BATCH, sequence), "int64"),),
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


def unet_interface(config: Config, time_ids: int = 6) -> Interface:
    """One denoiser call: x_t [B, C, h, w], t (scalar) and what the model is conditioned on -> [B, C_out, h, w].

    `time_ids` as for `condition_ports`; the residuals of a ControlNet are optional.
    """
    height, width = Axis("latent_height"), Axis("latent_width")
    return Interface(
        "unet",
        (
            Port("sample", (BATCH, config["in_channels"], height, width)),
            Port("timestep", ()),
            *condition_ports(config, time_ids),
            *residual_ports(config),
        ),
        (Port("out_sample", (BATCH, config["out_channels"], height, width)),),
    )


def vae_encoder_interface(config: Config) -> Interface:
    """Pictures in -1..1 [B, C, H, W] -> mean and log-variance of the latents, joined [B, 2 c, h, w]."""
    multiple = vae_scale_factor(config)
    height, width = Axis("height", multiple, multiple), Axis("width", multiple, multiple)
    latent_size = (Scaled("height", 1, multiple), Scaled("width", 1, multiple))
    moments = (BATCH, 2 * config["latent_channels"], *latent_size)
    sample = Port("sample", (BATCH, config["in_channels"], height, width))
    return Interface("vae_encoder", (sample,), (Port("latent_parameters", moments),))


def vae_decoder_interface(config: Config) -> Interface:
    """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
    latents = (BATCH, config["latent_channels"], Axis("latent_height"), Axis("latent_width"))
    factor = vae_scale_factor(config)
    pictures = (BATCH, config["out_channels"], Scaled("latent_height", factor), Scaled("latent_width", factor))
    return Interface("vae_decoder", (Port("latent_sample", latents),), (Port("sample", pictures),))


def unet_multiple(config: Mapping[str, Any]) -> int:
    """Latents of such a side are halved evenly on every level: 2 to the number of levels less one."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side: 2 to the number of levels less one."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


_INTERFACES: dict[str, dict[str, Callable[[Config], Interface]]] = {
    "CLIPTextModel": {"text_encoder": text_encoder_interface},
    "CLIPTextModelWithProjection": {"text_encoder": projected_text_interface},
    "UNet2DConditionModel": {"unet": unet_interface},
    "AutoencoderKL": {"vae_encoder": vae_encoder_interface, "vae_decoder": vae_decoder_interface},
}


_REFINING = {"UNet2DConditionModel": {"unet": partial(unet_interface, time_ids=5)}}


def interfaces(class_name: str, slot: str, refining: bool = False) -> dict[str, Callable[[Config], Interface]]:
    """Part name -> how its interface follows from the configuration; a model's only part is called as its `slot`.

    `refining`: it belongs to SDXL's refiner.

    Raises ConfigError: no model of that class is known.
    """
    if class_name not in _INTERFACES:
        raise ConfigError(f"no model class {class_name!r} is known; known are {', '.join(_INTERFACES)}")
    declared = {**_INTERFACES, **(_REFINING if refining else {})}[class_name]
    if len(declared) > 1:
        return declared
    (declare,) = declared.values()
    return {slot: lambda config: replace(declare(config), component=slot)}
