"""Checkpoints of the full size with random weights, in diffusers' layout: what benchmarks need and nobody downloads.

    python -m anamorph.benchmarks.full_size FOLDER [--kind sd15|sd15-control|sd21|sdxl] [--dtype float32|...]
        [--tokenizer FOLDER]

The seed is fixed, so that two machines measure the same weights. One component is in memory at a time.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anamorph.checkpoint import BUNDLED, VERSION_WRITTEN
from anamorph.config import read_json
from anamorph.errors import AnamorphError, InputError
from anamorph.files import replacing
from anamorph.schedulers import load_scheduler
from anamorph.tokenizer import ClipTokenizer

SEED = 0
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
OPEN_CLIP_H = {
    **CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512,
}  # fmt: skip
OPEN_CLIP_G = {
    **CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
UNET_XL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
LEVELS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Kind:
    """A published model's pipeline, its models' classes and configurations, and its scheduler."""

    pipeline: str
    models: Mapping[str, tuple[str, Mapping[str, Any]]]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


CONTROLNET = {key: UNET[key] for key in ("block_out_channels", "cross_attention_dim", "attention_head_dim")}
DDIM = {"_class_name": "DDIMScheduler", **LEVELS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
KINDS = {
    "sd15": Kind(
        "StableDiffusionPipeline",
        {
            "vae": ("AutoencoderKL", VAE),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "unet": ("UNet2DConditionModel", UNET),
        },
        {"_class_name": "PNDMScheduler", **LEVELS, "skip_prk_steps": True, "steps_offset": 1},
        {"requires_safety_checker": False},
    ),
    "sd15-control": Kind(
        "StableDiffusionControlNetPipeline",
        {
            "vae": ("AutoencoderKL", VAE),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "unet": ("UNet2DConditionModel", UNET),
            "controlnet": ("ControlNetModel", CONTROLNET),
        },
        {"_class_name": "PNDMScheduler", **LEVELS, "skip_prk_steps": True, "steps_offset": 1},
        {"requires_safety_checker": False},
    ),
    "sd21": Kind(
        "StableDiffusionPipeline",
        {
            "vae": ("AutoencoderKL", {**VAE, "sample_size": 768}),
            "text_encoder": ("CLIPTextModel", OPEN_CLIP_H),
            "unet": (
                "UNet2DConditionModel",
                {
                    **UNET,
                    "sample_size": 96,
                    "cross_attention_dim": 1024,
                    "attention_head_dim": (5, 10, 20, 20),
                    "use_linear_projection": True,
                },
            ),
        },
        {**DDIM, "prediction_type": "v_prediction"},
        {"requires_safety_checker": False},
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        {
            "vae": ("AutoencoderKL", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_CLIP_G),
            "unet": ("UNet2DConditionModel", UNET_XL),
        },
        {"_class_name": "EulerDiscreteScheduler", **LEVELS, "steps_offset": 1},
        {"force_zeros_for_empty_prompt": True},
    ),
}


def make(folder: Path, name: str, dtype: str = "float32", vocabulary: Path = BUNDLED / "tokenizer") -> dict[str, int]:
    """Write the checkpoint with a tokenizer's vocabulary; returns the number of parameters of each model.

    Raises CheckpointError: there is no such vocabulary. Raises InputError: a text encoder knows fewer words.
    """
    import torch

    from anamorph.models import MODELS

    kind = KINDS[name]
    tokenizer = ClipTokenizer.from_pretrained(vocabulary)
    known = min(config["vocab_size"] for _, config in kind.models.values() if "vocab_size" in config)
    if tokenizer.vocab_size > known:
        raise InputError(f"{vocabulary} has {tokenizer.vocab_size} tokens, expected {known} at most, as CLIP's")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    index: dict[str, Any] = {"_class_name": kind.pipeline, "_diffusers_version": VERSION_WRITTEN, **kind.settings}
    if name != "sdxl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    counts = {}
    for number, (slot, (class_name, config)) in enumerate(kind.models.items()):
        text = class_name.startswith("CLIP")
        torch.manual_seed(SEED + number)
        model = MODELS[class_name](**config, **(ids if text else {})).to(getattr(torch, dtype))
        for weight in model.parameters():  # what begins at zero would do nothing
            if weight.ndim > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=1e-2)
        counts[slot] = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder / slot)
        index[slot] = ["transformers" if text else "diffusers", class_name]
        if text:
            place = slot.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(folder / place)
            _lengthen(folder / place / "tokenizer_config.json", config["max_position_embeddings"])
            index[place] = ["transformers", "CLIPTokenizer"]
        del model
    scheduler = load_scheduler(kind.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    with replacing(folder / "model_index.json") as draft:  # last: a folder without it does not load
        draft.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return counts


def _lengthen(path: Path, length: int) -> None:
    """The bundled model's tokenizer cuts earlier than the published ones."""
    config = {**read_json(path), "model_max_length": length}
    with replacing(path) as draft:
        draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=list(KINDS), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=BUNDLED / "tokenizer",
        help="folder of CLIP's vocabulary (default: the bundled model's, unlike that of tools that bring their own)",
    )
    options = parser.parse_args()
    try:
        counts = make(options.folder, options.kind, options.dtype, options.tokenizer)
    except AnamorphError as error:
        sys.exit(f"full_size: {error}")
    for slot, count in counts.items():
        print(f"{slot}: {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
