"""Checkpoints in the layout of the code that trained them, made from diffusers' models by an inverse map of its own.

The map is written from the other side than the one under test: it walks through diffusers' modules and asks each for
its place, where the loader reads places off the file's names.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from checkpoints import noisy, tiny_clip, tiny_tokenizer, write_vocabulary
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

RESIDUAL = (("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
            ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
            ("conv_shortcut.", "skip_connection."))  # fmt: skip
UNET: dict[str, Any] = {
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "sample_size": 64,
}
NEWER: dict[str, Any] = {"attention_head_dim": (1, 2, 2), "use_linear_projection": True}
XL: dict[str, Any] = {
    **NEWER,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
    "sample_size": 128,
}
REFINER: dict[str, Any] = {
    **XL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 5 * 256 + 64,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1,
                        "max_position_embeddings": 77, "projection_dim": 64}  # fmt: skip
OPENCLIP: dict[str, Any] = {**CLIP, "hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}


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


def averaged(unet: State) -> State:
    """Averages of a UNet's weights (here: twice the weights) under the names that training gives them."""
    return {"model_ema." + f"diffusion_model.{name}".replace(".", ""): 2 * value for name, value in unet.items()}


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


@dataclass(frozen=True)
class Family:
    """One kind of original file: its models in diffusers' form, and where the file keeps them."""

    unet: dict[str, Any]
    text_encoder: dict[str, Any] | None
    text_encoder_2: dict[str, Any] | None = None
    openclip: bool = False
    vae: dict[str, Any] = field(default_factory=dict)
    side: int = 64


FAMILIES = {
    "sd1": Family(UNET, CLIP),
    "sd1-inpaint": Family({**UNET, "in_channels": 9}, CLIP),
    "sd1-edit": Family({**UNET, "in_channels": 8}, CLIP),
    "sd2": Family({**UNET, **NEWER, "cross_attention_dim": 128, "upcast_attention": True, "sample_size": 96},
                  {**OPENCLIP, "num_hidden_layers": 23}, openclip=True, side=96),
    "sd2-inpaint": Family({**UNET, **NEWER, "cross_attention_dim": 128, "in_channels": 9}, OPENCLIP, openclip=True),
    "sdxl": Family({**UNET, **XL}, CLIP, OPENCLIP, vae={"scaling_factor": 0.13025}, side=128),
    "sdxl-refiner": Family({**UNET, **REFINER}, None, OPENCLIP, vae={"scaling_factor": 0.13025}, side=128),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """An original file and the models that it was made of, by slot."""

    file: Path
    models: dict[str, Any]


def make(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Made:
    """Write a family's file, with its tokenizers beside it."""
    family = FAMILIES[name]
    slots = [slot for slot in ("text_encoder", "text_encoder_2") if getattr(family, slot) is not None]
    names = tuple(slot.replace("text_encoder", "tokenizer") for slot in slots)
    openclip = family.openclip or names == ("tokenizer_2",)
    words = write_tokenizers(folder, filled="!" if openclip or len(names) == 2 else None, names=names)
    models: dict[str, Any] = {
        "unet": noisy(diffusers.UNet2DConditionModel(**family.unet), 3),
        "vae": noisy(diffusers.AutoencoderKL(**{**VAE, "sample_size": 8 * family.side, **family.vae}), 1),
    }
    state = prefixed("model.diffusion_model.", unet_state(models["unet"]))
    state |= averaged(unet_state(models["unet"])) if name == "sd1" else {}
    state |= prefixed("first_stage_model.", vae_state(models["vae"]))
    state["betas"] = torch.linspace(0, 1, 9)
    if family.text_encoder is not None:
        models["text_encoder"] = noisy(tiny_clip(words, **family.text_encoder), 2)
        home = "conditioner.embedders.0.transformer." if len(slots) == 2 else "cond_stage_model.transformer."
        state |= (
            prefixed("cond_stage_model.model.", openclip_state(models["text_encoder"], last=True))
            if family.openclip
            else prefixed(home, clip_state(models["text_encoder"]))
        )
    if family.text_encoder_2 is not None:
        ids = {"bos_token_id": words - 2, "eos_token_id": words - 1}
        config = transformers.CLIPTextConfig(vocab_size=words, **ids, **family.text_encoder_2)
        models["text_encoder_2"] = noisy(transformers.CLIPTextModelWithProjection(config), 4)
        home = f"conditioner.embedders.{len(slots) - 1}.model."
        state |= prefixed(home, openclip_state(models["text_encoder_2"], last=False))
    path = folder / f"{name}.safetensors"
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path)
    return Made(path, models)


def write_tokenizers(folder: Path, *, filled: str | None, names: tuple[str, ...] = ("tokenizer",)) -> int:
    """Tokenizer folders; returns the number of words."""
    with TemporaryDirectory() as draft:
        tokenizer = tiny_tokenizer(Path(draft))
    for name in names:
        tokenizer.save_pretrained(folder / name)
        write_vocabulary(folder / name)
        if filled is not None and (name.endswith("_2") or len(names) == 1):
            for file in ("tokenizer_config.json", "special_tokens_map.json"):
                path = folder / name / file
                if path.is_file():
                    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": filled}))
    return len(tokenizer)
