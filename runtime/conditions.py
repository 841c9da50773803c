"""What a UNet wants to know besides x_t and t, read from its configuration. No PyTorch here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from anamorph.interface import Axis, Port, Scaled

ADDED: Mapping[str | None, tuple[str, ...]] = MappingProxyType(
    {
        None: (),
        "text": (),
        "text_time": ("text_embeds", "time_ids"),
        "text_image": ("text_embeds", "image_embeds"),
        "image": ("image_embeds",),
    }
)
"""`addition_embed_type` -> keys of `added_cond_kwargs` that it takes."""

PROJECTED: Mapping[str | None, tuple[str, ...]] = MappingProxyType(
    {None: (), "text_proj": (), "text_image_proj": ("image_embeds",), "image_proj": ("image_embeds",)}
)
"""`encoder_hid_dim_type` -> keys of `added_cond_kwargs` that it takes."""

HINT = "hint"
"""What a ControlNet's encoder makes of its picture, the same for every branch of guidance."""
CONTROL_TYPE, CONTROL_KIND, CONTROL_WEIGHT = "control_type", "control_kind", "control_weight"
"""What a ControlNet for several kinds of pictures takes: those that it looks at, 0 or 1 for each kind, and what its
encoder is told of a picture, the number of its kind and how much it counts."""
RESIDUALS = "down_block_additional_residuals"
INTRABLOCK = "down_intrablock_additional_residuals"
PICTURE = "control_picture"
"""What encoders of ControlNets, and adapters, look at."""

TIMESTEPS = 1000
"""How many timesteps training has, where classes are timesteps."""


IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS, IMAGE_MASKS = "image_keys", "image_values", "image_bias", "image_masks"
"""What a UNet takes of pictures that are prompts; see `anamorph.image_prompts`."""


def mask_name(level: int) -> str:
    """The input that says where at a level pictures count as prompts."""
    return f"{IMAGE_MASKS}.{level}"


def projection(config: Mapping[str, Any]) -> str | None:
    """How the encoder's states are projected; a width without a type means "text_proj", as in diffusers."""
    kind: str | None = config.get("encoder_hid_dim_type")
    return "text_proj" if kind is None and config.get("encoder_hid_dim") is not None else kind


def added_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that `added_cond_kwargs` must hold, each once."""
    return tuple(dict.fromkeys((*ADDED[config.get("addition_embed_type")], *PROJECTED[projection(config)])))


def condition_ports(config: Mapping[str, Any], time_ids: int = 6) -> tuple[Port, ...]:
    """The UNet's inputs after `sample` and `timestep`, in the order in which its parts take them.

    `time_ids`: how many numbers of micro-conditioning there are (SDXL's base 6, its refiner 5); the configuration
    knows only the width of all of them together with the pooled text.
    """
    batch, sequence = Axis("batch"), Axis("sequence")
    cross = config["cross_attention_dim"]
    cross = cross if isinstance(cross, int) else cross[0]
    hidden = config.get("encoder_hid_dim") or cross
    times = time_ids * (config.get("addition_time_embed_dim") or 0)
    pooled = (config.get("projection_class_embeddings_input_dim") or 0) - times
    from_image = projection(config) == "image_proj" or config.get("addition_embed_type") == "image"
    widths = {
        "text_embeds": pooled if config.get("addition_embed_type") == "text_time" else cross,
        "time_ids": time_ids,
        "image_embeds": hidden if from_image else cross,
    }
    ports = [] if projection(config) == "image_proj" else [Port("encoder_hidden_states", (batch, sequence, hidden))]
    # Numbers of pixels are told apart by their units, which bfloat16 loses.
    ports += [Port(name, (batch, widths[name]), exact=name == "time_ids") for name in added_names(config)]
    if (guidance := config.get("time_cond_proj_dim")) is not None:
        ports.append(Port("timestep_cond", (batch, guidance)))
    times = 2 if config.get("time_embedding_type") == "fourier" else 4
    width = config.get("time_embedding_dim") or times * config["block_out_channels"][0]
    if (kinds := config.get("num_control_type")) is not None:
        ports.append(Port(CONTROL_TYPE, (batch, kinds)))
    return (*ports, *class_ports(config, width))


def residual_ports(config: Mapping[str, Any]) -> tuple[Port, ...]:
    """What a ControlNet adds (arXiv:2302.05543): one residual per state of the way down, then one for the middle.

    All are optional. Level k works at 1 / 2^k of the latents' size and begins with what the level above hands down.
    UNets of other blocks than Stable Diffusion's take none.
    """
    if set(config["down_block_types"]) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        return ()
    channels = tuple(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    states = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        states += [(width, level)] * count
        states += [(width, level + 1)] * (level + 1 < len(channels))
    names = [f"{RESIDUALS}.{index}" for index in range(len(states))]
    named = [*zip(names, states, strict=True), ("mid_block_additional_residual", states[-1])]
    return tuple(Port(name, (Axis("batch"), width, *_level(level)), optional=True) for name, (width, level) in named)


def intrablock_ports(config: Mapping[str, Any]) -> tuple[Port, ...]:
    """What a T2I-Adapter adds (arXiv:2302.08453): one residual per block of the way down, and one for the middle.

    All are optional, and the same for every branch of guidance. That of a block joins its last state: before the
    resolution changes where the block looks at the text, and after it elsewhere.
    """
    kinds, channels = config["down_block_types"], tuple(config["block_out_channels"])
    if not residual_ports(config):
        return ()
    lowest = len(channels) - 1
    levels = [level + (kind == "DownBlock2D" and level < lowest) for level, kind in enumerate(kinds)]
    shapes = [*zip(channels, levels, strict=True), (channels[-1], lowest)]
    return tuple(
        Port(f"{INTRABLOCK}.{index}", (Axis("batch"), width, *_level(level)), optional=True)
        for index, (width, level) in enumerate(shapes)
    )


def _level(level: int) -> tuple[Scaled, Scaled]:
    return Scaled("latent_height", 1, 2**level), Scaled("latent_width", 1, 2**level)


def unconditional_ports(config: Mapping[str, Any]) -> tuple[Port, ...]:
    """The inputs of a UNet without texts after `sample` and `timestep`: its classes, if it knows any."""
    return class_ports(config, config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])


def class_ports(config: Mapping[str, Any], time_width: int) -> tuple[Port, ...]:
    """`class_labels` as the model takes them: numbers, or vectors of some width; none where it knows no classes."""
    kind, batch = config.get("class_embed_type"), Axis("batch")
    if kind in ("projection", "simple_projection"):
        return (Port("class_labels", (batch, config["projection_class_embeddings_input_dim"])),)
    if kind == "identity":
        return (Port("class_labels", (batch, time_width)),)
    if kind == "timestep":
        return (Port("class_labels", (batch,), "int64", below=TIMESTEPS),)
    if (classes := config.get("num_class_embeds")) is not None:
        return (Port("class_labels", (batch,), "int64", below=classes),)
    return ()
