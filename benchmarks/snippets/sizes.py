"""Sizes of the tiny models.

Those that snippets rely on are those of the published models: 768 numbers per token, 8 pixels per latent, 1024 time
steps. All others are as small as the layers allow, and pictures have 64 pixels along a side unless asked otherwise.
"""

from typing import Any

CURVE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

WIDTH = 768
"""Numbers per token of the first Stable Diffusion's text encoder, which a snippet writes out."""

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}

VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
}

CLIP: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}

# Files of one kind are told apart by their shapes: heads of 64 numbers, ten layers of the second text encoder.
XL_CLIP: dict[str, Any] = {**CLIP, "hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64}

XL_OPENCLIP: dict[str, Any] = {**XL_CLIP, "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 11,
                               "hidden_act": "gelu"}  # fmt: skip

XL_VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.13025,
}

XL_BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}

XL_REFINER: dict[str, Any] = {
    **XL_BASE,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 5 * 256 + 64,
}

PLAIN_UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
