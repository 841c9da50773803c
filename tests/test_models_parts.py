"""The parts of the newer models that engines call: exportable with dynamic sizes, and built without memory."""

from typing import Any

import pytest
import torch
from checkpoints import UNET, VAE
from test_depth import HYBRID
from test_models_autoencoders import TINY, VQ
from test_models_pictures import BERT, VISION
from test_models_unconditional import DIT, SKIP
from test_models_unconditional import UNET as PLAIN
from test_models_unet import UPSCALER, XL
from torch import Tensor, nn
from torch.export import Dim

from anamorph.conditions import condition_ports, unconditional_ports
from anamorph.config import Config
from anamorph.interface import Port
from anamorph.models import MODELS

BATCH = Dim("batch", max=64)
CHECKER = {"projection_dim": 24, "vision_config": VISION}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 64),
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
    "layers_per_block": 1,
}
TWO_SKIPPING_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "layers_per_block": 1,
    "num_class_embeds": 20,
}
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "sdxl with guidance": ("UNet2DConditionModel", "unet", {**UNET, **XL, "time_cond_proj_dim": 16}, 2),
    "k-diffusion": ("UNet2DConditionModel", "unet", {**UNET, **UPSCALER, **TWO_LEVELS}, 2),
    "ncsnpp": ("UNet2DModel", "unet", {**PLAIN, **SKIP, **TWO_SKIPPING_LEVELS}, 2),
    "dit": ("DiTTransformer2DModel", "transformer", DIT, 0),
    "tiny decoder": ("AutoencoderTiny", "vae_decoder", TINY, 1),
    "quantised decoder": ("VQModel", "vae_decoder", VQ, 1),
    "safety checker": ("StableDiffusionSafetyChecker", "safety_checker", CHECKER, 0),
    "text": ("LDMBertModel", "text_encoder", BERT, 0),
}


class Part(nn.Module):
    """One part of a model as a module of its own."""

    def __init__(self, model: Any, part: str) -> None:
        super().__init__()
        self.model, self.method = model, model.PARTS[part]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = getattr(self.model, self.method)(*values)
        return results


def conditions(name: str, config: Config) -> tuple[Port, ...]:
    if name == "UNet2DConditionModel":
        return condition_ports(config)
    return unconditional_ports(config) if name == "UNet2DModel" else ()


def arguments(name: str, model: Any, multiple: int, batch: int, times: int) -> list[Tensor]:
    """Random inputs; pictures are `times` and 2 more multiples of the model's high and wide."""
    config, noise = model.config, torch.Generator().manual_seed(batch)
    if name == "LDMBertModel":
        return [torch.randint(0, 50, (batch, 5 + times), generator=noise)]
    side = VISION["image_size"] if "Vision" in name or "Checker" in name else config.get("sample_size")
    size = (times * multiple, (times + 2) * multiple) if multiple else (side, side)
    channels = config.get("latent_channels" if multiple == 1 else "in_channels", 3)
    values = [torch.randn(batch, channels, *size, generator=noise)]
    if "unet" in model.PARTS or "transformer" in model.PARTS:
        values.append(torch.tensor(31.0))
    for port in conditions(name, config):
        shape = (batch, *(7 if not isinstance(axis, int) else axis for axis in port.axes[1:]))
        values.append(torch.randn(shape, generator=noise) if port.dtype == "float32" else torch.arange(shape[0]))
    return [*values, torch.arange(batch)] if "transformer" in model.PARTS else values


def dynamic(name: str, value: Tensor, multiple: int) -> dict[int, Any]:
    if value.ndim == 4 and multiple:
        sides = [Dim(side, min=2, max=64) for side in ("height", "width")]
        return {0: BATCH, 2: multiple * sides[0], 3: multiple * sides[1]} if multiple > 1 else {
            0: BATCH, 2: sides[0], 3: sides[1]
        }  # fmt: skip
    sequence = value.ndim == 3 or name == "LDMBertModel"
    return {0: BATCH, **({1: Dim("sequence", max=77)} if sequence else {})} if value.ndim else {}


@pytest.mark.parametrize("case", CASES)
def test_exports_with_dynamic_sizes(case: str) -> None:
    name, part, config, multiple = CASES[case]
    model = MODELS[name](**config).eval()
    module, first = Part(model, part), arguments(name, model, multiple, 2, 4)
    axes = tuple(dynamic(name, value, multiple) for value in first)
    with torch.no_grad():
        exported = torch.export.export(module, tuple(first), dynamic_shapes=(axes,), strict=False).module()
        for values in (first, arguments(name, model, multiple, 3, 3)):
            for result, expected in zip(exported(*values), module(*values), strict=True):
                assert torch.allclose(result, expected, atol=1e-5)


EVERY: dict[str, dict[str, Any]] = {
    **{name: config for name, _, config, _ in CASES.values()},
    "AutoencoderKL": VAE,
    "CLIPTextModel": {"hidden_size": 32, "num_hidden_layers": 1},
    "CLIPTextModelWithProjection": {"hidden_size": 32, "num_hidden_layers": 1},
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": VISION,
    "Transformer2DModel": DIT,
    "DPTForDepthEstimation": HYBRID,
    "ControlNetModel": {
        "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 2, "cross_attention_dim": 32, "conditioning_embedding_out_channels": (16, 32),
        "norm_num_groups": 16,
    },
    "T2IAdapter": {"channels": (32, 64), "downscale_factor": 2},
}  # fmt: skip


def test_every_model_is_in_the_list() -> None:
    assert EVERY.keys() == MODELS.keys()


@pytest.mark.parametrize("name", EVERY)
def test_builds_without_memory_and_stores_all_that_it_has(name: str) -> None:
    """Weights of a checkpoint need no random ones first: nothing but they would be left without values."""
    with torch.device("meta"):
        model = MODELS[name](**EVERY[name])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {value.device.type for value in tensors.values()} == {"meta"}
    assert tensors.keys() == model.state_dict().keys()
