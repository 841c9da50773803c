"""The bundled model with and without an adapter that was trained for it, hot and fused, on one sheet.

python examples/lora/draw.py [OUT]
"""

import sys
from pathlib import Path

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.sheet import Row, contact_sheet

HERE = Path(__file__).parent
PROMPTS = ("rocket", "cat face", "red apple", "smiling face with sunglasses")
CALL = {"num_inference_steps": 20, "guidance_scale": 4, "seed": 0}


def main(out: Path) -> None:
    """Draw each prompt as the model does, with half of the adapter, and with all of it, hot and fused."""
    pipe = DiffusionPipeline.from_pretrained()
    assert isinstance(pipe, StableDiffusionPipeline)
    plain = [pipe(prompt, **CALL).images[0] for prompt in PROMPTS]
    pipe.load_lora_weights(HERE / "pencil.safetensors", "pencil")
    whole = [pipe(prompt, **CALL).images[0] for prompt in PROMPTS]
    pipe.set_adapters("pencil", 0.5)
    half = [pipe(prompt, **CALL).images[0] for prompt in PROMPTS]
    pipe.set_adapters("pencil")
    pipe.fuse_lora()
    fused = [pipe(prompt, **CALL).images[0] for prompt in PROMPTS]
    rows = [Row(prompt, "", list(drawn)) for prompt, *drawn in zip(PROMPTS, plain, half, whole, fused, strict=True)]
    title, subtitle = "An adapter", "The bundled model, and what a LoRA of rank 8 makes of its pictures"
    contact_sheet(title, subtitle, ("without", "half", "hot", "fused"), rows).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "lora.png")
