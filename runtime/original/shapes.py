"""Configurations of models read off the shapes of their tensors, and the modules that those shapes show."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anamorph.errors import CheckpointError
from anamorph.original import Shapes

HEAD_WIDTH = 64
"""Width of an attention head of every model but the first Stable Diffusion's UNet, which has HEADS of them."""
HEADS = 8
TIME_WIDTH = 256
"""Width of the waves that encode one number of SDXL's micro-conditioning."""
SDXL_SCALING, SCALING = 0.13025, 0.18215


@dataclass(frozen=True)
class Level:
    """One resolution of a UNet: channels and, per transformer, its depth (0: none)."""

    channels: int
    depth: int
    layers: int


def count(shapes: Shapes, prefix: str) -> int:
    """How many children, numbered from 0, the module `prefix` has."""
    start = f"{prefix}." if prefix else ""
    numbers = {name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def unet_levels(shapes: Shapes) -> list[Level]:
    """A UNet's levels from the top; raises CheckpointError where its blocks come in no order that is known."""
    levels: list[list[tuple[int, int]]] = [[]]
    for index in range(1, count(shapes, "input_blocks")):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = shape(shapes, f"{block}.0.out_layers.3.weight")[0]
        levels[-1].append((width, count(shapes, f"{block}.1.transformer_blocks")))
    kinds = {len(set(level)) for level in levels}
    if kinds != {1} or len({len(level) for level in levels}) != 1:
        raise CheckpointError("the UNet's blocks differ within a level; expected a Stable Diffusion model")
    return [Level(*level[0], layers=len(level)) for level in levels]


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """`config.json` of a UNet2DConditionModel; raises CheckpointError where a tensor that tells is missing."""
    down = trunk_config(shapes)
    turned = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    return {
        **down,
        "_class_name": "UNet2DConditionModel",
        "out_channels": shape(shapes, "out.2.weight")[0],
        "up_block_types": [turned[kind] for kind in reversed(down["down_block_types"])],
    }


def controlnet_config(shapes: Shapes) -> dict[str, Any]:
    """`config.json` of a ControlNetModel; raises CheckpointError where a tensor that tells is missing."""
    last = count(shapes, "input_hint_block") - 1
    reading = [shape(shapes, f"input_hint_block.{index}.weight") for index in range(0, last, 4)]
    return {
        **trunk_config(shapes),
        "_class_name": "ControlNetModel",
        "conditioning_channels": reading[0][1],
        "conditioning_embedding_out_channels": [each[0] for each in reading],
    }


def trunk_config(shapes: Shapes) -> dict[str, Any]:
    """What both have in common: the way down, and what it looks at."""
    levels = unet_levels(shapes)
    attending = next((level for level in levels if level.depth), None)
    if attending is None:
        raise CheckpointError("the UNet looks at no text; expected a Stable Diffusion model")
    channels = [level.channels for level in levels]
    first = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    linear = len(next(value for name, value in shapes.items() if name.endswith(".1.proj_in.weight"))) == 2
    depths = [level.depth or 1 for level in levels]
    depths[-1] = count(shapes, "middle_block.1.transformer_blocks")
    config: dict[str, Any] = {
        "in_channels": shape(shapes, "input_blocks.0.0.weight")[1],
        "block_out_channels": channels,
        "layers_per_block": levels[0].layers,
        "down_block_types": ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels],
        "cross_attention_dim": shapes[first][1],
        "attention_head_dim": [width // HEAD_WIDTH for width in channels] if linear else HEADS,
        "use_linear_projection": linear,
    }
    if set(depths) != {1}:
        config["transformer_layers_per_block"] = depths
    if (added := shapes.get("label_emb.0.0.weight")) is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_WIDTH,
                   "projection_class_embeddings_input_dim": added[1]}  # fmt: skip
    return config


def vae_config(shapes: Shapes, scaling: float) -> dict[str, Any]:
    """`config.json` of an AutoencoderKL."""
    levels = count(shapes, "encoder.down")
    channels = [shape(shapes, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shape(shapes, "encoder.conv_in.weight")[1],
        "out_channels": shape(shapes, "decoder.conv_out.weight")[0],
        "latent_channels": shape(shapes, "decoder.conv_in.weight")[1],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, "encoder.down.0.block"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": scaling,
    }


def clip_config(shapes: Shapes, *, openclip: bool, layers: int, projected: bool) -> dict[str, Any]:
    """`config.json` of a CLIP text encoder; OpenCLIP's have an exact GELU, and begin and end are the last ids."""
    token, position, inner = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
        if openclip
        else ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
              "encoder.layers.0.mlp.fc1.weight")
    )  # fmt: skip
    words, width = shape(shapes, token)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shape(shapes, inner)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": shape(shapes, position)[0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        **({"projection_dim": shape(shapes, "text_projection")[1]} if projected else {}),
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": 1,
    }


def shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there; raises CheckpointError."""
    if name not in shapes:
        raise CheckpointError(f"the file has no {name}; it is cut down, or of another kind than Stable Diffusion")
    return shapes[name]


def stripped(shapes: Shapes, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below `prefix`, without it."""
    return ((name[len(prefix) :], value) for name, value in shapes.items() if name.startswith(prefix))
