"""A tiny checkpoint of SDXL's kind with random weights, for tools that open its exports."""

from pathlib import Path
from typing import Any

from anamorph.checkpoint import BUNDLED

TEXT: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 24}
FIRST, SECOND = {**TEXT, "hidden_size": 32}, {**TEXT, "hidden_size": 48, "hidden_act": "gelu"}
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": FIRST["hidden_size"] + SECOND["hidden_size"],
    "projection_class_embeddings_input_dim": TEXT["projection_dim"] + 6 * 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.13025,
    "sample_size": 64,
}


def make(folder: Path) -> None:
    """Write the checkpoint; seeded."""
    import torch

    from anamorph.models import AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel
    from anamorph.pipelines import StableDiffusionXLPipeline
    from anamorph.schedulers.registry import scheduler_from_folder
    from anamorph.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer.from_pretrained(BUNDLED / "tokenizer")
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
             "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": tokenizer.model_max_length}  # fmt: skip
    torch.manual_seed(0)
    models = {
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(**FIRST, **words),
        "text_encoder_2": CLIPTextModelWithProjection(**SECOND, **words),
        "unet": UNet2DConditionModel(**UNET),
    }
    with torch.no_grad():
        for model in models.values():
            for weight in (parameter for parameter in model.parameters() if parameter.ndim > 1):
                weight.normal_().div_(weight[0].numel() ** 0.5)  # keeps activations of order one: a lively picture
    pipe = StableDiffusionXLPipeline(
        **models, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler_from_folder(BUNDLED / "scheduler"),
        backend="eager",
    )  # fmt: skip
    pipe.save_pretrained(folder)
