"""What denoisers and the nets beside them take and return, computed from their configurations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anamorph.conditions import (
    HINT,
    INTRABLOCK,
    PICTURE,
    condition_ports,
    intrablock_ports,
    residual_ports,
    unconditional_ports,
)
from anamorph.config import Config
from anamorph.image_prompts import image_ports
from anamorph.interface import BATCH, Axis, Interface, Port, Scaled


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
