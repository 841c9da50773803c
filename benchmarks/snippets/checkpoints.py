"""Tiny checkpoints with random weights, written by diffusers and transformers themselves; see `sizes`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file

from anamorph.benchmarks.snippets.original import clip_state, openclip_state, prefixed, unet_state, vae_state
from anamorph.benchmarks.snippets.sizes import (
    CLIP,
    CURVE,
    PLAIN_UNET,
    UNET,
    VAE,
    VISION,
    WIDTH,
    XL_BASE,
    XL_CLIP,
    XL_OPENCLIP,
    XL_REFINER,
    XL_VAE,
)
from anamorph.checkpoint import BUNDLED

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz",
         *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))  # fmt: skip
CAT = "<my-funny-cat-token>"
CUSTOM = '''
import torch

from {library} import DiffusionPipeline


class UnetSchedulerOneForwardPipeline(DiffusionPipeline):
    """Runs the denoiser once, and one step."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self):
        image = torch.randn((1, 3, self.unet.config.sample_size, self.unet.config.sample_size))
        output = self.unet(image, 1).sample
        return self.scheduler.step(output, 1, image).prev_sample
'''


def vocabulary(**special: Any) -> Any:
    """The bundled model's words, for 77 tokens."""
    return transformers.CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=77, **special)


def text_encoder(words: int, config: Mapping[str, Any], kind: Any = transformers.CLIPTextModel) -> Any:
    """A text encoder whose last two tokens begin and end a text."""
    ids = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return kind(transformers.CLIPTextConfig(vocab_size=words, **ids, **config)).eval()


def safety_checker() -> dict[str, Any]:
    """A checker that holds nothing back, with its processor."""
    size = VISION["image_size"]
    return {
        "safety_checker": StableDiffusionSafetyChecker(
            transformers.CLIPConfig(vision_config=VISION, projection_dim=VISION["projection_dim"])
        ),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
    }


def save(pipe: Any, folder: Path) -> None:
    """Write the variant fp16, and then the plain weights with the configurations that count."""
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    pipe.to(torch.float32).save_pretrained(folder)
    if isinstance(pipe.scheduler, diffusers.PNDMScheduler):
        # The published file has DDIM's key, too; without it DDIM clips, and tells apart what rounds otherwise.
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample": False}), encoding="utf-8")


def stable_diffusion(folder: Path, kind: str = "StableDiffusionPipeline", channels: int = 4, word: str = "") -> None:
    """The first Stable Diffusion, with its variants fp16 and non_ema; `word` is one that it has learned."""
    torch.manual_seed(0)
    tokenizer = vocabulary()
    encoder = text_encoder(len(tokenizer), CLIP)
    if word:
        tokenizer.add_tokens([word])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pipe = getattr(diffusers, kind)(
        vae=diffusers.AutoencoderKL(**VAE), text_encoder=encoder, tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET, in_channels=channels),
        scheduler=diffusers.PNDMScheduler(**CURVE, skip_prk_steps=True, steps_offset=1), **safety_checker(),
    )  # fmt: skip
    save(pipe, folder)
    pipe.unet.save_pretrained(folder / "unet", variant="non_ema")


def inpainting(folder: Path) -> None:
    """Its model for inpainting."""
    stable_diffusion(folder, "StableDiffusionInpaintPipeline", channels=9)


def with_learned_word(folder: Path) -> None:
    """Its model after it learned a word, which its tokenizer and text encoder hold."""
    stable_diffusion(folder, word=CAT)


def depth(folder: Path) -> None:
    """Stable Diffusion 2 with the depth of a picture, and the estimator of it."""
    torch.manual_seed(0)
    tokenizer = vocabulary(pad_token="!")
    estimator = transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16, is_hybrid=False,
    )  # fmt: skip
    diffusers.StableDiffusionDepth2ImgPipeline(
        vae=diffusers.AutoencoderKL(**VAE), tokenizer=tokenizer,
        text_encoder=text_encoder(len(tokenizer), {**CLIP, "hidden_act": "gelu"}),
        unet=diffusers.UNet2DConditionModel(**UNET, in_channels=5),
        scheduler=diffusers.PNDMScheduler(**CURVE, skip_prk_steps=True, steps_offset=1),
        depth_estimator=transformers.DPTForDepthEstimation(estimator),
        feature_extractor=transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    ).save_pretrained(folder)  # fmt: skip


def autoencoder(folder: Path) -> None:
    """An autoencoder alone."""
    torch.manual_seed(1)
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder)


def unconditional(folder: Path) -> None:
    """A denoiser without texts and its scheduler, each in a folder."""
    torch.manual_seed(0)
    diffusers.DDPMPipeline(diffusers.UNet2DModel(**PLAIN_UNET), diffusers.DDPMScheduler()).save_pretrained(folder)


def first_unconditional(folder: Path) -> None:
    """The same as the first published ones lie on the hub: all files side by side."""
    unconditional(folder)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()


def latent_text(folder: Path) -> None:
    """Latent diffusion with a text encoder of its own, before Stable Diffusion."""
    torch.manual_seed(0)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    codebook = {**VAE, "latent_channels": 3, "num_vq_embeddings": 24}
    diffusers.LDMTextToImagePipeline(
        diffusers.VQModel(**{key: value for key, value in codebook.items() if key != "sample_size"}),
        LDMBertModel(LDMBertConfig(vocab_size=len(WORDS), encoder_layers=2, encoder_ffn_dim=48,
                                   encoder_attention_heads=4, head_dim=4, d_model=WIDTH)),
        transformers.BertTokenizer.from_pretrained(folder / "tokenizer"),
        diffusers.UNet2DConditionModel(**UNET, in_channels=3, out_channels=3),
        diffusers.DDIMScheduler(**CURVE, clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip


def xl(folder: Path, kind: str, unet: Mapping[str, Any], file: str, changes: Mapping[str, Any]) -> None:
    """Stable Diffusion XL with its variant fp16, and the same in one file of the original layout."""
    torch.manual_seed(0)
    first, second = vocabulary(), vocabulary(pad_token="!")
    parts = {
        "vae": diffusers.AutoencoderKL(**XL_VAE),
        "text_encoder": text_encoder(len(first), XL_CLIP),
        "text_encoder_2": text_encoder(len(first), XL_OPENCLIP, transformers.CLIPTextModelWithProjection),
        "tokenizer": first, "tokenizer_2": second,
        "unet": diffusers.UNet2DConditionModel(**unet),
        "scheduler": diffusers.EulerDiscreteScheduler(**CURVE, steps_offset=1, timestep_spacing="leading"),
        **changes,
    }  # fmt: skip
    pipe = getattr(diffusers, kind)(**parts, add_watermarker=False)
    save(pipe, folder)
    one = prefixed("model.diffusion_model.", unet_state(pipe.unet))
    one |= prefixed("first_stage_model.", vae_state(pipe.vae))
    if pipe.text_encoder is not None:
        one |= prefixed("conditioner.embedders.0.transformer.", clip_state(pipe.text_encoder))
    place = "conditioner.embedders.0.model." if pipe.text_encoder is None else "conditioner.embedders.1.model."
    one |= prefixed(place, openclip_state(pipe.text_encoder_2, last=False))
    save_file({name: value.contiguous() for name, value in one.items()}, folder / file)


def xl_base(folder: Path) -> None:
    """The base."""
    xl(folder, "StableDiffusionXLPipeline", XL_BASE, "sd_xl_base_1.0.safetensors", {})


def xl_turbo(folder: Path) -> None:
    """The distilled base."""
    trailing = diffusers.EulerAncestralDiscreteScheduler(**CURVE, steps_offset=1, timestep_spacing="trailing")
    xl(folder, "StableDiffusionXLPipeline", XL_BASE, "sd_xl_turbo_1.0_fp16.safetensors", {"scheduler": trailing})


def xl_refiner(folder: Path) -> None:
    """The refiner, which has the second text encoder alone."""
    without = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    xl(folder, "StableDiffusionXLImg2ImgPipeline", XL_REFINER, "sd_xl_refiner_1.0.safetensors", without)


def learned_word(folder: Path) -> None:
    """A word that was learned from pictures."""
    folder.mkdir()
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    torch.save({"<cat-toy>": vector}, folder / "learned_embeds.bin")


def controlnet(folder: Path) -> None:
    """A ControlNet for the first Stable Diffusion, with a picture to follow."""
    torch.manual_seed(2)
    net = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel(**UNET), conditioning_embedding_out_channels=(8, 8, 8, 16)
    )
    with torch.no_grad():
        for parameter in net.parameters():  # what is to be trained begins as zeros, which would add nothing
            if not parameter.any():
                parameter.normal_(std=0.02)
    net.save_pretrained(folder)
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(folder / "conditioning_image_1.png")


def adapter(folder: Path) -> None:
    """Low-rank factors for the first Stable Diffusion, named as Kohya's scripts name them."""
    folder.mkdir()
    random, width = torch.Generator().manual_seed(3), UNET["block_out_channels"][1]
    tensors = {}
    for layer in ("to_q", "to_v"):
        name = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{layer}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=random)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=random) / width
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / "howls_moving_castle.safetensors")


def custom_pipeline(folder: Path) -> None:
    """A pipeline in a file, once for each library; the file `pipeline.py` is written where a chapter runs."""
    for library in ("anamorph", "diffusers"):
        (folder / library).mkdir(parents=True)
        (folder / library / "pipeline.py").write_text(CUSTOM.format(library=library), encoding="utf-8")
