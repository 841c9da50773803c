"""Adapters for tiny checkpoints, as PEFT makes and diffusers stores them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from parity import generators
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WHOLE = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
         "time_emb_proj", "upsamplers.0.conv", "downsamplers.0.conv")  # fmt: skip
"""All kinds of layers inside the blocks of a UNet; diffusers weighs others by blocks with an IndexError."""
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SHARE = 0.5
"""PEFT draws factors that change pictures beyond recognition; so much of the first one is taken."""
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


def theirs(folder: Path) -> Any:
    """diffusers' pipeline."""
    name = diffusers.DiffusionPipeline.load_config(folder)["_class_name"]
    silent = {} if "XL" in name else {"safety_checker": None}
    pipe = getattr(diffusers, name).from_pretrained(folder, **silent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **call: Any) -> Any:
    """A picture [N, H, W, C] in 0..1."""
    return pipe("a red cat", generator=generators([1])[0], **CALL, **call).images


def factors(pipe: Any, component: str, layers: Sequence[str], *, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Factors of PEFT for these layers of a diffusers pipeline, which keeps them, as if they had been trained."""
    model: Any = getattr(pipe, component)
    torch.manual_seed(seed)
    name = f"made_{component}"
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=list(layers))
    model.add_adapter(config, adapter_name=name)
    found = get_peft_model_state_dict(model, adapter_name=name)
    return {key: value * SHARE if "lora_A" in key else value for key, value in found.items()}


def stored(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Factors by component in one file of diffusers."""
    layers = {
        f"{name}_lora_layers": value if name == "unet" else convert_state_dict_to_diffusers(dict(value))
        for name, value in parts.items()
    }
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"
