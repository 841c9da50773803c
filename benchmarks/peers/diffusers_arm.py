"""Run in an environment of diffusers, without anamorph: diffusers eager, or with torch.compile as its guide says.

    python -sE diffusers_arm.py eager|compile

The compiled arm follows diffusers' optimisation guide: channels-last, the denoiser and the decoder compiled whole
(`fullgraph=True`, `mode="max-autotune"` on a GPU, the default mode on a processor).
"""

import sys
import time
from typing import Any

from serve import Clock, Request, serve
from torch_arm import TorchArm

KINDS = {"image-to-image": "AutoPipelineForImage2Image", "inpaint": "AutoPipelineForInpainting"}
PACKAGES = ["diffusers", "transformers", "torch"]


class Diffusers(TorchArm):  # type: ignore[misc]
    """diffusers' pipeline with a clock on each model."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def open(self, request: Request) -> dict[str, Any]:
        """Load; compiling happens in the first call."""
        torch, self.cell = self.torch, request["cell"]
        torch.set_num_threads(request["threads"])
        dtype, cuda = getattr(torch, self.cell["precision"]), torch.cuda.is_available()
        self.place = {"device": "cuda" if cuda else "cpu", "dtype": dtype}
        started = time.perf_counter()
        kind = getattr(self.diffusers, KINDS.get(self.cell["task"], "DiffusionPipeline"))
        self.pipe = pipe = kind.from_pretrained(request["folder"], torch_dtype=dtype)
        pipe.to(self.place["device"])
        self.take_scheduler(request["scheduler"])
        if self.mode == "compile":
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
            how = {"fullgraph": True, **({"mode": "max-autotune"} if cuda else {})}
            pipe.unet.forward = torch.compile(pipe.unet.forward, **how)
            pipe.vae.decode = torch.compile(pipe.vae.decode, **how)
        self.clock = Clock(torch.cuda.synchronize if cuda else lambda: None)
        for encoder in filter(None, (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))):
            encoder.forward = self.clock.timed("text", encoder.forward)
        pipe.unet.forward = self.clock.timed("denoiser", pipe.unet.forward)
        if getattr(pipe, "controlnet", None) is not None:
            pipe.controlnet.forward = self.clock.timed("control", pipe.controlnet.forward)
        pipe.vae.decode = self.clock.timed("vae", pipe.vae.decode)
        pipe.vae.encode = self.clock.timed("encode", pipe.vae.encode)
        kinds = {str(model.dtype).removeprefix("torch.") for model in (pipe.unet, pipe.vae, pipe.text_encoder)}
        return {
            "phases": {"export_s": 0.0, "load_s": time.perf_counter() - started},
            "precision": kinds.pop() if len(kinds) == 1 else "mixed",
            "placement": [f"diffusers {self.mode} on {pipe.unet.device}, {torch.get_num_threads()} threads"],
            "threads": torch.get_num_threads(),
        }

    def denoiser(self, given: dict[str, Any], extra: dict[str, Any], timestep: Any) -> Any:
        """The UNet."""
        named = {"added_cond_kwargs": extra or None, "return_dict": False}
        return self.pipe.unet(**given, timestep=timestep.to(self.place["device"]), **named)[0]

    def decoder(self, latents: Any) -> Any:
        """The autoencoder's decoder."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]


if __name__ == "__main__":
    serve(lambda: Diffusers(sys.argv[1]), PACKAGES)
