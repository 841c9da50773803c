"""From the original names of tensors to diffusers': places of blocks are paired, and what is inside follows."""

from collections.abc import Iterable, Mapping

from anamorph.errors import CheckpointError

Places = dict[str, str]
"""Path of a module in the original file -> its path in diffusers' model."""

UNET_RESIDUAL = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                 "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
VAE_RESIDUAL = {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPENCLIP_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                  "attn.out_proj": "self_attn.out_proj"}  # fmt: skip


def within(original: str, ours: str, inner: Mapping[str, str]) -> Places:
    """A block at `original`, with names inside it that differ."""
    return {original: ours, **{f"{original}.{old}": f"{ours}.{new}" for old, new in inner.items()}}


def renamed(names: Iterable[str], places: Places, what: str) -> dict[str, str]:
    """Original name -> diffusers' name, by the longest path that is known.

    Raises CheckpointError: a name belongs to no known place.
    """
    found: dict[str, str] = {}
    for name in names:
        steps = name.split(".")
        for length in range(len(steps), 0, -1):
            if (place := places.get(".".join(steps[:length]))) is not None:
                found[name] = ".".join([place, *steps[length:]])
                break
        else:
            raise CheckpointError(f"the {what} holds {name}, which no Stable Diffusion model has; expected one")
    return found


def controlnet_places(levels: int, layers: int, attention: Iterable[bool], hints: int) -> Places:
    """A ControlNet's blocks: those of a UNet's way down, `hints` convolutions that read the picture, and what adds."""
    last = 2 * (hints - 1)
    places = unet_places(levels, layers, attention)
    places |= {
        f"input_hint_block.{2 * index}": f"controlnet_cond_embedding.blocks.{index - 1}" for index in range(hints)
    }
    places |= {"input_hint_block.0": "controlnet_cond_embedding.conv_in",
               f"input_hint_block.{last}": "controlnet_cond_embedding.conv_out",
               "middle_block_out.0": "controlnet_mid_block"}  # fmt: skip
    states = 1 + levels * (layers + 1)
    return places | {f"zero_convs.{index}.0": f"controlnet_down_blocks.{index}" for index in range(states)}


def unet_places(levels: int, layers: int, attention: Iterable[bool]) -> Places:
    """A UNet's blocks: `layers` residual blocks per level, transformers on the levels where `attention` says so."""
    has = list(attention)
    places: Places = {
        "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **within("middle_block.0", "mid_block.resnets.0", UNET_RESIDUAL),
        **within("middle_block.2", "mid_block.resnets.1", UNET_RESIDUAL),
    }  # fmt: skip
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            places |= within(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}", UNET_RESIDUAL)
            places[f"input_blocks.{first + layer}.1"] = f"down_blocks.{level}.attentions.{layer}"
        places[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, attends in enumerate(reversed(has)):
        first = level * (layers + 1)
        for layer in range(layers + 1):
            places |= within(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}", UNET_RESIDUAL)
            if attends:
                places[f"output_blocks.{first + layer}.1"] = f"up_blocks.{level}.attentions.{layer}"
        last = 2 if attends else 1
        places[f"output_blocks.{first + layers}.{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return places


def vae_places(levels: int) -> Places:
    """An autoencoder's blocks; the original counts the decoder's levels from the largest picture."""
    places: Places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.norm_out": f"{half}.conv_norm_out",
                   f"{half}.conv_out": f"{half}.conv_out"}  # fmt: skip
        places |= within(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        for index in (0, 1):
            block = f"{half}.mid.block_{index + 1}"
            places |= within(block, f"{half}.mid_block.resnets.{index}", VAE_RESIDUAL)
    for level in range(levels):
        mirrored = levels - 1 - level
        places[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        places[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{mirrored}.upsamplers.0.conv"
        for layer in range(_MOST_LAYERS):
            down, up = f"encoder.down.{level}.block.{layer}", f"decoder.up.{level}.block.{layer}"
            places |= within(down, f"encoder.down_blocks.{level}.resnets.{layer}", VAE_RESIDUAL)
            places |= within(up, f"decoder.up_blocks.{mirrored}.resnets.{layer}", VAE_RESIDUAL)
    return places


_MOST_LAYERS = 8
"""Residual blocks per level of an autoencoder that are looked for."""


def openclip_places(layers: int) -> Places:
    """OpenCLIP's text transformer; its joined query, key and value are split elsewhere."""
    places: Places = {"token_embedding": "text_model.embeddings.token_embedding",
                      "positional_embedding": "text_model.embeddings.position_embedding.weight",
                      "ln_final": "text_model.final_layer_norm",
                      "text_projection": "text_projection.weight"}  # fmt: skip
    for layer in range(layers):
        inner = f"text_model.encoder.layers.{layer}"
        places |= within(f"transformer.resblocks.{layer}", inner, OPENCLIP_LAYER)
    return places
