"""Tiny checkpoints with random weights, written through diffusers and transformers themselves.

tiny_sd1  epsilon, DDIM, 1x1-conv projections, one number of heads, quick_gelu, 3 levels; 8 pixels per latent
tiny_sd2  v_prediction, DDIM, linear projections, heads per level, gelu, 2 levels; 2 pixels per latent
tiny_smallest  as tiny_sd2, epsilon, one level, nothing looks at texts; a pixel per latent
tiny_inpaint  as tiny_sd1 with 2 levels, and a denoiser of 9 channels
tiny_lcm  as tiny_sd2, epsilon, LCM, the guidance as an input
tiny_sdxl  epsilon, Euler, two text encoders, numbers of micro-conditioning, 2 levels; 2 pixels per latent
tiny_refiner  as tiny_sdxl with the second text encoder alone, and a score among the numbers
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

MERGES = (
    "a t</w>", "c at</w>", "d o", "do g</w>", "r e", "re d</w>", "o f</w>", "p h", "o t", "ph ot", "phot o</w>",
)  # fmt: skip
"""Byte pairs that join first; they give "cat", "dog", "red", "of" and "photo" a token each."""

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}


def tiny_sd1(folder: Path) -> Path:
    """A checkpoint of the first Stable Diffusion's kind."""
    levels = {"block_out_channels": (32, 64, 64), "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
              "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2}  # fmt: skip
    vae = {"block_out_channels": (16, 16, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
           "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 64}  # fmt: skip
    return save_pipeline(folder, {**UNET, **levels}, {**VAE, **vae}, CLIP, "epsilon")


def tiny_sd2(folder: Path, *, upcast_attention: bool = False) -> Path:
    """A checkpoint of the second Stable Diffusion's kind."""
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": upcast_attention}
    return save_pipeline(folder, {**UNET, **heads}, VAE, {**CLIP, "hidden_act": "gelu"}, "v_prediction")


def tiny_smallest(folder: Path) -> Path:
    """A checkpoint of the first kind with one level, whose denoiser looks at no text."""
    unet, vae = ({"block_out_channels": (32,), "down_block_types": (down,), "up_block_types": (up,)} for down, up in (
        ("DownBlock2D", "UpBlock2D"), ("DownEncoderBlock2D", "UpDecoderBlock2D")))  # fmt: skip
    return save_pipeline(folder, {**UNET, **unet}, {**VAE, **vae}, CLIP, "epsilon")


def tiny_inpaint(folder: Path) -> Path:
    """A checkpoint of the first kind whose denoiser also sees a mask and the latents of what stays."""
    vae = {"block_out_channels": (16, 16, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
           "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 64}  # fmt: skip
    kind = diffusers.StableDiffusionInpaintPipeline
    return save_pipeline(folder, {**UNET, "in_channels": 9}, {**VAE, **vae}, CLIP, "epsilon", kind)


def tiny_sdxl(folder: Path, *, kind: Any = diffusers.StableDiffusionXLPipeline, **unet: Any) -> Path:
    """A checkpoint of SDXL's kind; `unet` replaces keys of its denoiser."""
    return save_xl(folder, kind, {"cross_attention_dim": 32 + 40, "projection_class_embeddings_input_dim": 24 + 6 * 8,
                                  **unet}, {})  # fmt: skip


def tiny_refiner(folder: Path) -> Path:
    """A checkpoint of the kind of SDXL's refiner."""
    unet = {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 24 + 5 * 8}
    absent = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return save_xl(folder, diffusers.StableDiffusionXLImg2ImgPipeline, unet, absent)


def save_xl(folder: Path, kind: Any, unet: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write a pipeline of SDXL's kind; `changes` are other components and settings."""
    levels = {"transformer_layers_per_block": (1, 2), "use_linear_projection": True, "attention_head_dim": (2, 4),
              "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    with TemporaryDirectory() as draft:
        tokenizer = tiny_tokenizer(Path(draft))
        second = transformers.CLIPTokenizer.from_pretrained(draft, model_max_length=77, pad_token="!")
    wide = {**CLIP, "hidden_size": 40, "num_hidden_layers": 3, "hidden_act": "gelu"}
    parts = {
        "vae": noisy(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025), 1),
        "text_encoder": noisy(tiny_clip(len(tokenizer), **CLIP), 2),
        "text_encoder_2": noisy(tiny_clip(len(tokenizer), transformers.CLIPTextModelWithProjection, **wide), 4),
        "tokenizer": tokenizer,
        "tokenizer_2": second,
        "unet": noisy(diffusers.UNet2DConditionModel(**{**UNET, **levels, **unet}), 3),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
    }  # fmt: skip
    kind(**{**parts, **changes}, add_watermarker=False).save_pretrained(folder)
    return folder


def tiny_lcm(folder: Path) -> Path:
    """A checkpoint of the first kind that takes the guidance as an input."""
    kind = diffusers.LatentConsistencyModelPipeline
    save_pipeline(folder, {**UNET, "time_cond_proj_dim": 16}, VAE, CLIP, "epsilon", kind)
    scheduler = diffusers.LCMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "LCMScheduler"]}))
    return folder


def tiny_controlnet(unet: Path, levels: int, seed: int, **config: Any) -> Any:
    """diffusers' ControlNet for the denoiser in a folder, whose pictures are halved so many times."""
    made = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel.from_pretrained(unet), load_weights_from_unet=False,
        conditioning_embedding_out_channels=(8,) * levels + (16,), **config,
    )  # fmt: skip
    net = noisy(diffusers.ControlNetModel.from_config({**made.config, "in_channels": 4}), seed)
    with torch.no_grad():  # what reads the picture counts as an embedding there, whose values are larger
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            parameter.mul_(1.0 if name.endswith("bias") else parameter[0].numel() ** -0.5)
    return net


def controlled(folder: Path, checkpoint: Path, kind: Any, levels: int, nets: int = 1) -> Path:
    """A checkpoint with so many ControlNets beside its own components, written by diffusers."""
    every = [tiny_controlnet(checkpoint / "unet", levels, 20 + number) for number in range(nets)]
    silent = {} if "XL" in kind.__name__ else {"safety_checker": None}
    pipeline = kind.from_pretrained(checkpoint, controlnet=every if nets > 1 else every[0], **silent)
    pipeline.save_pretrained(folder)
    return folder


def save_pipeline(
    folder: Path,
    unet: dict[str, Any],
    vae: dict[str, Any],
    clip: dict[str, Any],
    prediction_type: str,
    kind: Any = diffusers.StableDiffusionPipeline,
) -> Path:
    """Write a whole pipeline of the class `kind` without a safety checker; returns the folder."""
    with TemporaryDirectory() as draft:
        tokenizer = tiny_tokenizer(Path(draft))
    pipeline = kind(
        vae=noisy(diffusers.AutoencoderKL(**vae), 1),
        text_encoder=noisy(tiny_clip(len(tokenizer), **clip), 2),
        tokenizer=tokenizer,
        unet=noisy(diffusers.UNet2DConditionModel(**unet), 3),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    write_vocabulary(folder / "tokenizer")  # beside `tokenizer.json`, as the published checkpoints have it
    return folder


def tiny_clip(vocab_size: int, kind: Any = transformers.CLIPTextModel, **config: Any) -> Any:
    """transformers' text encoder whose last token ids are begin and end."""
    ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    return kind(transformers.CLIPTextConfig(vocab_size=vocab_size, **{**ids, **config}))


def tiny_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's layout: 256 bytes, each also as the end of a word, and `MERGES`."""
    write_vocabulary(folder)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
             "pad_token": "<|endoftext|>"}  # fmt: skip
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77, **names)


def write_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`: bytes, bytes that end a word, joined pairs, begin and end of a text."""
    alphabet = byte_alphabet()
    joined = [merge.replace(" ", "") for merge in MERGES]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *joined, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")


def byte_alphabet() -> list[str]:
    """One printable letter per byte, as GPT-2's tokenizer writes them: unprintable bytes go to U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def noisy(module: Module, seed: int) -> Module:
    """Give every parameter random values that keep activations of order one; none stays at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * noise)
            elif "embedding" in name and "time" not in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()
