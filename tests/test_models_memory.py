"""Every model is built without memory: its weights come from a checkpoint."""

from typing import Any

import pytest
import torch
from checkpoints import UNET, VAE
from test_depth import HYBRID
from test_models_autoencoders import TINY, VQ
from test_models_pictures import BERT, VISION
from test_models_unconditional import DIT, SKIP
from test_models_unconditional import UNET as PLAIN
from test_models_unet import UPSCALER

from anamorph.models import MODELS

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
NET: dict[str, Any] = {
    "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "attention_head_dim": 2, "cross_attention_dim": 32, "conditioning_embedding_out_channels": (16, 32),
    "norm_num_groups": 16,
}  # fmt: skip
EVERY: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {**UNET, **UPSCALER, **TWO_LEVELS},
    "UNet2DModel": {**PLAIN, **SKIP, **TWO_SKIPPING_LEVELS},
    "DiTTransformer2DModel": DIT,
    "AutoencoderTiny": TINY,
    "VQModel": VQ,
    "StableDiffusionSafetyChecker": CHECKER,
    "LDMBertModel": BERT,
    "AutoencoderKL": VAE,
    "CLIPTextModel": {"hidden_size": 32, "num_hidden_layers": 1},
    "CLIPTextModelWithProjection": {"hidden_size": 32, "num_hidden_layers": 1},
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": VISION,
    "Transformer2DModel": DIT,
    "DPTForDepthEstimation": HYBRID,
    "ControlNetModel": NET,
    "ControlNetUnionModel": {
        **NET, "num_trans_channel": 32, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 32,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
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
