"""What a UNet wants to know besides x_t and t, read from its configuration. No PyTorch here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from anamorph.interface import Axis, Port

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
    ports += [Port(name, (batch, widths[name])) for name in added_names(config)]
    if (guidance := config.get("time_cond_proj_dim")) is not None:
        ports.append(Port("timestep_cond", (batch, guidance)))
    return (*ports, *_class_port(config, batch))


def _class_port(config: Mapping[str, Any], batch: Axis) -> tuple[Port, ...]:
    kind = config.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        return (Port("class_labels", (batch, config["projection_class_embeddings_input_dim"])),)
    if kind == "identity":
        first = config["block_out_channels"][0] * (2 if config.get("time_embedding_type") == "fourier" else 4)
        return (Port("class_labels", (batch, config.get("time_embedding_dim") or first)),)
    if kind == "timestep" or config.get("num_class_embeds") is not None:
        return (Port("class_labels", (batch,), "int64"),)
    return ()
