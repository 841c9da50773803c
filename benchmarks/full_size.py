"""Stable Diffusion 1.5 at its full size, with random weights: make the folder, and time one UNet call in it.

    python -m anamorph.benchmarks.full_size make FOLDER
    python -m anamorph.benchmarks.full_size engines FOLDER [--rounds 3] [--calls 3] [--arms openvino-float32,...]

The arms run interleaved (A B C A B C ...), each in a process of its own after one call that is not counted, so that a
drift of the machine hits all of them; quote ratios of their minima and medians. See `anamorph.benchmarks.engines`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from anamorph.benchmarks import engines
from anamorph.checkpoint import BUNDLED
from anamorph.config import read_json

UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


def make(folder: Path) -> None:
    """Write the checkpoint: 860 M UNet, 84 M autoencoder and 123 M text encoder parameters, float32, seeded."""
    import torch

    from anamorph.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
    from anamorph.pipelines import StableDiffusionPipeline
    from anamorph.schedulers import load_scheduler
    from anamorph.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer.from_pretrained(BUNDLED / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(**TEXT, **ids),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=load_scheduler(read_json(BUNDLED / "scheduler" / "scheduler_config.json")),
        backend="eager",
    )
    pipe.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in pipe.components["unet"].component.module.parameters())
    print(f"{folder}: UNet of {count / 1e6:.1f} M parameters")


def main() -> None:
    """Parse the arguments and run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "engines"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3, help="calls of each process")
    parser.add_argument("--arms")
    options = parser.parse_args()
    chosen = tuple(options.arms.split(",")) if options.arms else None
    if options.command == "make":
        make(options.folder)
    else:
        result = engines.compare(options.folder, chosen or engines.ARMS, options.rounds, options.calls)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
