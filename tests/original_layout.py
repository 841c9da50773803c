"""Checkpoints in the layout of the code that trained them, made from diffusers' models."""

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

from anamorph.benchmarks.snippets.original import State, clip_state, openclip_state, prefixed, unet_state, vae_state

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


def averaged(unet: State) -> State:
    """Averages of a UNet's weights (here: twice the weights) under the names that training gives them."""
    return {"model_ema." + f"diffusion_model.{name}".replace(".", ""): 2 * value for name, value in unet.items()}


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
    "sdxl-inpaint": Family({**UNET, **XL, "in_channels": 9}, CLIP, OPENCLIP, vae={"scaling_factor": 0.13025}, side=128),
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
