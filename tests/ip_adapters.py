"""IP-Adapters with random weights, in the layout of the published files."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from checkpoints import noisy
from exported import once, shared_place
from pictures import picture
from safetensors.torch import save_file
from torch import Tensor

VISION: Mapping[str, Any] = {
    "hidden_size": 40, "intermediate_size": 56, "projection_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
"""Of the picture encoder: 5 states of 40 numbers, embeddings of 24."""
WIDTH = 64
"""Of the resampler; its heads are 64 wide in every file."""
LAYERS = 4
"""Of the resampler, as diffusers expects."""
CALL: dict[str, Any] = {
    "prompt": "a red cat", "negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
SIZE = {"height": 64, "width": 32}
LOOK = picture(20, 24)
NAMES = {"base": "base.safetensors", "plus": "plus.safetensors", "full": "full.bin"}


def image_encoder(place: Path) -> Path:
    """A random picture encoder."""
    config = transformers.CLIPVisionConfig(**VISION)
    noisy(transformers.CLIPVisionModelWithProjection(config), 21).save_pretrained(place)
    return place


def random(seed: int) -> Any:
    """A maker of matrices and vectors that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, centre: float = 0.0) -> Tensor:
        scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        return centre + scale * torch.randn(shape, generator=generator)

    return make


def projection(kind: str, width: int, seed: int) -> dict[str, Tensor]:
    """The weights that make tokens of `width` numbers from a picture."""
    make, embedding, states = random(seed), VISION["projection_dim"], VISION["hidden_size"]

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": make(size, centre=1.0), f"{name}.bias": make(size)}

    def linear(name: str, before: int, after: int, *, bias: bool = True) -> dict[str, Tensor]:
        return {f"{name}.weight": make(after, before), **({f"{name}.bias": make(after)} if bias else {})}

    if kind == "base":
        return {**linear("proj", embedding, 4 * width), **norm("norm", width)}
    if kind == "full":
        return {**linear("proj.0", states, states), **linear("proj.2", states, width), **norm("proj.3", width)}
    found = {"latents": make(1, 6, WIDTH), **linear("proj_in", states, WIDTH), **linear("proj_out", WIDTH, width),
             **norm("norm_out", width)}  # fmt: skip
    for layer in range(LAYERS):
        look, think = f"layers.{layer}.0", f"layers.{layer}.1"
        found |= {**norm(f"{look}.norm1", WIDTH), **norm(f"{look}.norm2", WIDTH), **norm(f"{think}.0", WIDTH)}
        found |= linear(f"{look}.to_q", WIDTH, 64, bias=False) | linear(f"{look}.to_kv", WIDTH, 128, bias=False)
        found |= linear(f"{look}.to_out", 64, WIDTH, bias=False)
        found |= linear(f"{think}.1", WIDTH, 4 * WIDTH, bias=False) | linear(f"{think}.3", 4 * WIDTH, WIDTH, bias=False)
    return found


def state(unet: Any, kind: str, seed: int = 31) -> dict[str, dict[str, Tensor]]:
    """An adapter for diffusers' UNet, as its file holds it."""
    make, width = random(seed + 1), unet.config.cross_attention_dim
    # Files count attentions in the order of diffusers' processors; those to the text have odd numbers.
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for number, name in enumerate(crossing):
        queries = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for half in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{half}.weight"] = 2 * make(queries, width)
    return {"image_proj": projection(kind, width, seed), "ip_adapter": layers}


def write(place: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """An adapter's file, a pickle or safetensors by its name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".bin":
        torch.save(dict(weights), place)
    else:
        save_file(
            {f"{half}.{name}": one.contiguous() for half, each in weights.items() for name, one in each.items()}, place
        )
    return place


def adapters(place: Path, checkpoint: Path) -> Path:
    """A folder of all kinds for the checkpoint's UNet, with their picture encoder, laid out as the published ones."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    image_encoder(place / "models" / "image_encoder")
    write(place / "models" / "base.bin", state(unet, "base", 31))
    write(place / "models" / "base.safetensors", state(unet, "base", 31))
    write(place / "models" / "plus.safetensors", state(unet, "plus", 41))
    write(place / "models" / "full.bin", state(unet, "full", 51))
    return place


def folder(checkpoint: Path) -> Path:
    """The adapters for a checkpoint."""
    return once(shared_place() / f"{checkpoint.name}-ip", functools.partial(adapters, checkpoint=checkpoint))
