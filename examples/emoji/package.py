"""Assemble the checkpoint folder that ships with the package: diffusers' layout, fp16 safetensors."""

import json
import shutil
from pathlib import Path

import torch

from anamorph import AutoencoderKL, CLIPTextModel, DDIMScheduler, UNet2DConditionModel

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # latents exceed 1
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write(work: Path, out: Path) -> None:
    """Convert the trained parts to fp16 and write the folder; `model_index.json` comes last."""
    for name, model in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel)):
        part = model.from_pretrained(work / name, torch_dtype=torch.float16)
        if name == "text_encoder":
            # Without a word about its type, transformers would run this part alone in the type that is stored.
            part.config = part.config.replace(dtype="float32")
        part.save_pretrained(out / name)
    DDIMScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    shutil.copytree(work / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
