"""What peers with diffusers' pipelines share: the cell's task and the stages, from the fixed inputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from serve import Clock, start_pictures

TIMESTEP = 500


class TorchArm:
    """An arm around `pipe`, a pipeline called as diffusers' are; a subclass opens it and calls its models."""

    pipe: Any
    cell: dict[str, Any]
    clock: Clock
    place: dict[str, Any]
    """Device and type of the inputs, as `torch.Tensor.to` takes them."""

    def __init__(self) -> None:
        import diffusers
        import torch

        self.diffusers, self.torch, self.place = diffusers, torch, {}

    def denoiser(self, given: dict[str, Any], extra: dict[str, Any], timestep: Any) -> Any:
        """One prediction."""
        raise NotImplementedError

    def decoder(self, latents: Any) -> Any:
        """Pictures [N, C, H, W] in -1..1."""
        raise NotImplementedError

    def take_scheduler(self, config: dict[str, Any] | None) -> None:
        """Put the scheduler in place that all arms take, and draw no bars."""
        if config:
            self.pipe.scheduler = getattr(self.diffusers, config["_class_name"]).from_config(config)
        self.pipe.set_progress_bar_config(disable=True)

    def run(self, inputs: Path) -> dict[str, Any]:
        """The cell's task once."""
        task = {"denoiser": self.denoise, "decode": self.decode}.get(self.cell["task"], self.draw)
        with self.torch.inference_mode():
            seconds: dict[str, Any] = self.clock.measure(lambda: task(inputs))
        return seconds

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        """All four."""
        with self.torch.inference_mode():
            for name, task in (("text", self.text), ("denoiser", self.denoise), ("vae", self.decode)):
                np.save(out / f"{name}.npy", task(inputs))
            np.save(out / "picture.npy", self.draw(inputs, "np"))
        return {"stages": ["text", "denoiser", "vae", "picture"]}

    def draw(self, inputs: Path, output_type: str = "pil") -> Any:
        """A whole picture."""
        if given := start_pictures(inputs):
            seeds = range(self.cell["batch"])
            given["generator"] = [self.torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        else:
            given["latents"] = self.tensor(inputs, "latents")
        return self.pipe(**_call(inputs), **given, output_type=output_type).images

    def text(self, inputs: Path) -> Any:
        """Hidden states of the prompt."""
        device = self.place.get("device", "cpu")
        told = {"prompt": _call(inputs)["prompt"], "device": device, "num_images_per_prompt": 1}
        return _array(self.pipe.encode_prompt(**told, do_classifier_free_guidance=False)[0])

    def denoise(self, inputs: Path) -> Any:
        """One call of the denoiser."""
        names = {path.name.split(".")[1] for path in inputs.glob("denoiser.*.npy")}
        given = {name: self.tensor(inputs, f"denoiser.{name}") for name in names}
        extra: dict[str, Any] = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
        return _array(self.denoiser(given, extra, self.torch.tensor(TIMESTEP)))

    def decode(self, inputs: Path) -> Any:
        """One decoding."""
        return _array(self.decoder(self.tensor(inputs, "decode")))

    def tensor(self, inputs: Path, name: str) -> Any:
        """An input in its place."""
        return self.torch.from_numpy(np.load(inputs / f"{name}.npy")).to(**self.place)


def _call(inputs: Path) -> dict[str, Any]:
    call: dict[str, Any] = json.loads((inputs / "call.json").read_text(encoding="utf-8"))
    return call


def _array(value: Any) -> Any:
    return np.asarray(value.float().cpu().numpy() if hasattr(value, "cpu") else value)
