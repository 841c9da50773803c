"""How files name the layers of models, whichever tool wrote them.

With underscores for dots and without what frameworks put around them, the names of diffusers, PEFT and Kohya are the
same; older files name some layers otherwise, and those for SDXL may have the original's names.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anamorph.lora.factors import Layers
from anamorph.original.names import unet_places

CHANGED = ("unet", "text_encoder", "text_encoder_2")
"""The components that adapters change."""
COMPONENTS: Mapping[str, str] = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
}  # fmt: skip
"""Beginning of a name -> the component of a pipeline that it belongs to."""
WRAPPERS = ("base_model.model.",)
"""What PEFT puts before names."""
SUFFIXES: Mapping[str, str] = {
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up", ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora.down.weight": "down", ".lora.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up", ".alpha": "alpha",
    ".hada_w1_a": "up_1", ".hada_w1_b": "down_1", ".hada_w2_a": "up_2", ".hada_w2_b": "down_2",
}  # fmt: skip
"""Ending of a name -> which of a layer's factors it is."""
OTHER_KINDS: Mapping[str, str] = {
    ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".lokr_": "LoKr", ".hada_t1": "LoHa with a Tucker core",
    ".oft_": "OFT", ".diff": "whole differences of weights",
}  # fmt: skip
"""What adapters of other kinds hold."""
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""Layers of text encoders -> their names in files of diffusers before 0.18."""


def parted(name: str) -> tuple[str | None, str, str] | None:
    """Component (None: not told), layer with underscores, and role of a tensor of that name; None where it has none."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    ending = next((ending for ending in SUFFIXES if name.endswith(ending)), None)
    if ending is None:
        return None
    layer, component = name.removesuffix(ending), None
    for beginning, owner in COMPONENTS.items():
        if layer.startswith(beginning):
            layer, component = layer.removeprefix(beginning), owner
            break
    layer = layer.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    return component, layer, SUFFIXES[ending]


def other_kind(names: Iterable[str]) -> str | None:
    """The kind of adapter that a file with these names holds, where it is none that is served."""
    return next((kind for name in names for mark, kind in OTHER_KINDS.items() if mark in name), None)


def spelled(layers: Layers, config: Mapping[str, Any]) -> dict[str, str]:
    """Every spelling of the layers of a model of that configuration, with underscores -> layer."""
    original = _original(config)
    return {way.replace(".", "_"): layer for layer in layers for way in _ways(layer, original)}


def _ways(layer: str, original: Mapping[str, str]) -> Iterator[str]:
    yield layer
    place, _, last = layer.rpartition(".")
    if layer.endswith(".to_out.0"):
        yield place
    if place.endswith("self_attn") and last in OLD_TEXT:
        yield f"{place}.{OLD_TEXT[last]}"
    steps = layer.split(".")
    for length in range(len(steps), 0, -1):
        if (found := original.get(".".join(steps[:length]))) is not None:
            yield ".".join([found, *steps[length:]])
            return


def _original(config: Mapping[str, Any]) -> dict[str, str]:
    """Path in diffusers' model -> path in the original file, for a UNet; empty for others."""
    kinds, layers = config.get("down_block_types"), config.get("layers_per_block")
    if kinds is None or not isinstance(layers, int):
        return {}
    places = unet_places(len(kinds), layers, ["CrossAttn" in kind for kind in kinds])
    return {ours: theirs for theirs, ours in places.items()}
