"""What models of texts and of pictures take and return, computed from their configurations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anamorph.config import Config
from anamorph.interface import BATCH, Axis, Interface, Port
from anamorph.safety import CONCEPTS, SPECIAL


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
