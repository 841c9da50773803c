"""Weights of diffusers' models under the names of the code that trained them first, by an inverse map of its own.

The map is written from the other side than the one in `anamorph.original`: it walks through diffusers' modules and asks
each for its place, where the loader reads places off the file's names.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

RESIDUAL = (("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
            ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
            ("conv_shortcut.", "skip_connection."))  # fmt: skip


def unet_state(model: Any) -> State:
    """diffusers' UNet under the names of CompVis' code."""
    down, up, layers = len(model.down_blocks), len(model.up_blocks), model.config.layers_per_block
    homes = {model.conv_in: "input_blocks.0.0", model.conv_norm_out: "out.0", model.conv_out: "out.2",
             model.time_embedding.linear_1: "time_embed.0", model.time_embedding.linear_2: "time_embed.2",
             model.mid_block.resnets[0]: "middle_block.0", model.mid_block.attentions[0]: "middle_block.1",
             model.mid_block.resnets[1]: "middle_block.2"}  # fmt: skip
    if model.config.addition_embed_type is not None:
        homes |= {model.add_embedding.linear_1: "label_emb.0.0", model.add_embedding.linear_2: "label_emb.0.2"}
    for blocks, side, count in ((model.down_blocks, "input", down), (model.up_blocks, "output", up)):
        number = 1 if side == "input" else 0
        for block in blocks:
            attentions = getattr(block, "attentions", None)
            for index, resnet in enumerate(block.resnets):
                homes[resnet] = f"{side}_blocks.{number}.0"
                if attentions is not None:
                    homes[attentions[index]] = f"{side}_blocks.{number}.1"
                number += 1
            if side == "input" and block.downsamplers is not None:
                homes[block.downsamplers[0].conv] = f"input_blocks.{number}.0.op"
                number += 1
            if side == "output" and block.upsamplers is not None:
                last = 1 if attentions is None else 2
                homes[block.upsamplers[0].conv] = f"output_blocks.{number - 1}.{last}.conv"
        assert number == count * (layers + 1)
    return _collected(homes, RESIDUAL)


def vae_state(model: Any) -> State:
    """diffusers' autoencoder under the names of CompVis' code; its attention is made of 1x1 convolutions."""
    homes = {model.quant_conv: "quant_conv", model.post_quant_conv: "post_quant_conv"}
    for half, name in ((model.encoder, "encoder"), (model.decoder, "decoder")):
        homes |= {half.conv_in: f"{name}.conv_in", half.conv_norm_out: f"{name}.norm_out",
                  half.conv_out: f"{name}.conv_out", half.mid_block.resnets[0]: f"{name}.mid.block_1",
                  half.mid_block.attentions[0]: f"{name}.mid.attn_1",
                  half.mid_block.resnets[1]: f"{name}.mid.block_2"}  # fmt: skip
        blocks = half.down_blocks if name == "encoder" else half.up_blocks[::-1]
        for level, block in enumerate(blocks):
            way = "down" if name == "encoder" else "up"
            homes |= {resnet: f"{name}.{way}.{level}.block.{index}" for index, resnet in enumerate(block.resnets)}
            scalers = block.downsamplers if name == "encoder" else block.upsamplers
            if scalers is not None:
                homes[scalers[0].conv] = f"{name}.{way}.{level}.{way}sample.conv"
    inner = (("conv_shortcut.", "nin_shortcut."), ("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."),
             ("to_v.", "v."), ("to_out.0.", "proj_out."))  # fmt: skip
    state = _collected(homes, inner)
    return {
        name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
        for name, value in state.items()
    }


def _collected(homes: dict[Any, str], inner: tuple[tuple[str, str], ...]) -> State:
    state = {}
    for module, home in homes.items():
        for name, value in module.state_dict().items():
            inside = next((new + name.removeprefix(ours) for ours, new in inner if name.startswith(ours)), name)
            state[f"{home}.{inside}"] = value
    return state


def clip_state(model: Any) -> State:
    """transformers' own names, as the first Stable Diffusion's file has them."""
    plain = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    return {f"text_model.{name}": value for name, value in plain.items()} | {
        "text_model.embeddings.position_ids": torch.arange(77)[None]
    }


def openclip_state(model: Any, *, last: bool) -> State:
    """OpenCLIP's names; `last` adds the layer that Stable Diffusion 2 does not use, filled with NaN."""
    plain = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    state = {"token_embedding.weight": plain["embeddings.token_embedding.weight"],
             "positional_embedding": plain["embeddings.position_embedding.weight"],
             "ln_final.weight": plain["final_layer_norm.weight"], "ln_final.bias": plain["final_layer_norm.bias"],
             "logit_scale": torch.tensor(4.6)}  # fmt: skip
    for layer in range(model.config.num_hidden_layers):
        ours, place = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            joined = [plain[f"{ours}.self_attn.{role}_proj.{kind}"] for role in "qkv"]
            state[f"{place}.attn.in_proj_{kind}"] = torch.cat(joined)
            for mine, theirs in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                                 ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                                 ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                state[f"{place}.{theirs}.{kind}"] = plain[f"{ours}.{mine}.{kind}"]
    if "text_projection.weight" in plain:
        state["text_projection"] = plain["text_projection.weight"].T.contiguous()
    if last:
        top = model.config.num_hidden_layers
        previous = [name for name in state if name.startswith(f"transformer.resblocks.{top - 1}.")]
        for name in previous:
            state[name.replace(f".{top - 1}.", f".{top}.", 1)] = torch.full_like(state[name], torch.nan)
        state["text_projection"] = torch.full((128, 64), torch.nan)
    return state


def prefixed(prefix: str, state: State) -> State:
    """The same below a prefix."""
    return {f"{prefix}{name}": value for name, value in state.items()}
