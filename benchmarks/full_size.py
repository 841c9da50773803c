"""Stable Diffusion 1.5 at its full size, with random weights: make the folder, and time one UNet call in it.

    python -m anamorph.benchmarks.full_size make FOLDER
    python -m anamorph.benchmarks.full_size unet FOLDER [--rounds 3] [--arms eager-float32,diffusers-float32,...]
    python -m anamorph.benchmarks.full_size engines FOLDER [--rounds 3] [--calls 3] [--arms openvino-float32,...]

`engines` gives every arm a process of its own; see `anamorph.benchmarks.engines`. The arms of `unet` share one.
Both run them interleaved (A B C A B C ...), after one call each that is not counted, so that a drift of the machine
hits all of them; quote ratios of their minima and medians.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anamorph.benchmarks import engines
from anamorph.checkpoint import BUNDLED, Source, component_config, open_checkpoint
from anamorph.components import Component
from anamorph.engine import Target
from anamorph.plugins import get_backend

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
ARMS = (
    "diffusers-float32", "eager-float32", "compile-float32",
    "diffusers-bfloat16", "eager-bfloat16", "compile-bfloat16",
)  # fmt: skip
SHAPES = {"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 768)}


def make(folder: Path) -> None:
    """Write the checkpoint: 860 M UNet, 84 M autoencoder and 123 M text encoder parameters, float32, seeded."""
    import torch

    from anamorph.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
    from anamorph.pipelines import StableDiffusionPipeline
    from anamorph.pipelines.loading import read_scheduler, read_tokenizer

    bundled = open_checkpoint(Source(str(BUNDLED)))
    tokenizer = read_tokenizer(bundled)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(**TEXT, **ids),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=read_scheduler(bundled),
        backend="eager",
    )
    pipe.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in pipe.components["unet"].component.module.parameters())
    print(f"{folder}: UNet of {count / 1e6:.1f} M parameters")


def opened(folder: Path, arm: str) -> Callable[[], Any]:
    """A call of the UNet on seeded inputs in one arm, engine-precision."""
    import torch

    engine, precision = arm.split("-")
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if engine == "diffusers":
        import diffusers

        dtype = getattr(torch, precision)
        model = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        cast = {name: value.to(dtype) for name, value in inputs.items()}

        def reference() -> Any:
            with torch.inference_mode():
                return model(**cast, timestep=torch.tensor(500.0)).sample.float()

        return reference
    config = component_config(folder / "unet")
    component = Component("unet", "UNet2DConditionModel", config, folder=folder / "unet")
    program = get_backend(engine).open(component, ["unet"], Target("cpu", precision))["unet"]
    session = program.session()
    return lambda: session({**inputs, "timestep": torch.tensor(500.0)})["out_sample"]


def unet(folder: Path, rounds: int, arms: tuple[str, ...]) -> dict[str, Any]:
    """Seconds per call of every arm, interleaved; also how far each is from the first one (relative L2)."""
    import torch

    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, dict[str, float]] = {}
    differences: dict[str, float] = {}
    reference = None
    for arm in arms:
        started = time.perf_counter()
        call = opened(folder, arm)
        loaded = time.perf_counter()
        out = call()
        first[arm] = {"load_s": loaded - started, "first_call_s": time.perf_counter() - loaded}
        reference = out if reference is None else reference
        differences[arm] = float((out - reference).norm() / reference.norm())
        calls[arm] = call
        gc.collect()
        print(
            f"{arm}: loaded in {first[arm]['load_s']:.1f} s, first call {first[arm]['first_call_s']:.1f} s", flush=True
        )
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[arm].append(time.perf_counter() - started)
    return {
        "environment": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "anamorph")},
        },
        "shapes": SHAPES,
        "arms": {
            arm: {
                **{name: round(value, 3) for name, value in first[arm].items()},
                "calls_s": [round(value, 3) for value in seconds[arm]],
                "min_s": round(min(seconds[arm]), 3),
                "median_s": round(statistics.median(seconds[arm]), 3),
                "relative_l2": differences[arm],
            }
            for arm in arms
        },
    }


def main() -> None:
    """Parse the arguments and run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "unet", "engines"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3, help="calls of each process (engines)")
    parser.add_argument("--arms")
    options = parser.parse_args()
    chosen = tuple(options.arms.split(",")) if options.arms else None
    if options.command == "make":
        make(options.folder)
    elif options.command == "unet":
        print(json.dumps(unet(options.folder, options.rounds, chosen or ARMS), indent=2))
    else:
        result = engines.compare(options.folder, chosen or engines.ARMS, options.rounds, options.calls)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
