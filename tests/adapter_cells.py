"""Cells of the table of adapters in one process: one family of tiny checkpoints on one engine.

    python adapter_cells.py FAMILY ENGINE PLACE 'ADAPTER|TASK' ...

prints one JSON line per cell, in the order of the cells: the largest differences, or why there are none. eager stands
beside diffusers, and says how far the adapter moves the picture; every other engine stands beside eager. Checkpoints
are written by diffusers below PLACE, once.
"""

import functools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import ip_adapters
import torch
from adapters import TEXT, WHOLE, factors, stored
from checkpoints import noisy, tiny_controlnet, tiny_sd1, tiny_sd2, tiny_sdxl
from exported import once, one_process, shared_traces
from parity import Trace, generator, ours, relative, worst
from pictures import mask, picture

import anamorph
from anamorph.errors import AnamorphError

SEED = 3
MEASURED = ("latents", "image")
"""What `parity.worst` returns."""


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint: what writes it, how its classes begin, how often pictures are halved, a T2I-Adapter,
    and the size of its pictures in pixels.
    """

    write: Callable[[Path], Path]
    prefix: str
    halvings: int
    t2i: Mapping[str, Any]
    height: int
    width: int


FAMILIES = {
    "SD1": Family(tiny_sd1, "StableDiffusion", 3, {"channels": (32, 64, 64), "downscale_factor": 8}, 64, 32),
    "SD2": Family(tiny_sd2, "StableDiffusion", 1, {"channels": (32, 64), "downscale_factor": 2}, 16, 24),
    "SDXL": Family(
        tiny_sdxl, "StableDiffusionXL", 1,
        {"channels": (32, 64), "downscale_factor": 4, "adapter_type": "full_adapter_xl"}, 16, 24,
    ),
}  # fmt: skip
TASKS = {"text-to-image": "", "image-to-image": "Img2Img", "inpaint": "Inpaint"}
"""Task -> how its class ends."""


@dataclass(frozen=True)
class Adapter:
    """What stands beside the models: so many ControlNets or T2I-Adapters, an IP-Adapter's kind, a LoRA."""

    nets: int = 0
    t2i: bool = False
    ip: str | None = None
    lora: bool = False
    fused: bool = False


ADAPTERS = {
    "none": Adapter(),
    "ControlNet": Adapter(nets=1),
    "two ControlNets": Adapter(nets=2),
    "T2I-Adapter": Adapter(t2i=True),
    "IP-Adapter": Adapter(ip="base"),
    "IP-Adapter plus": Adapter(ip="plus"),
    "LoRA, hot": Adapter(lora=True),
    "LoRA, fused": Adapter(lora=True, fused=True),
    "ControlNet + LoRA + IP-Adapter": Adapter(nets=1, ip="plus", lora=True),
}


@dataclass(frozen=True)
class Files:
    """A family's checkpoint and adapters below `place`; each is written when it is first asked for."""

    family: Family
    place: Path

    @property
    def checkpoint(self) -> Path:
        """The pipeline's folder."""
        return once(self.place / "checkpoint", self.family.write)

    def controlnet(self, number: int) -> Path:
        """A ControlNet's folder."""

        def make(place: Path) -> None:
            tiny_controlnet(self.checkpoint / "unet", self.family.halvings, 20 + number).save_pretrained(place)

        return once(self.place / f"controlnet-{number}", make)

    @property
    def t2i(self) -> Path:
        """A T2I-Adapter's folder."""

        def make(place: Path) -> None:
            noisy(diffusers.T2IAdapter(**self.family.t2i, num_res_blocks=1), 3).save_pretrained(place)

        return once(self.place / "t2i", make)

    @property
    def ip(self) -> Path:
        """A folder with IP-Adapters and their picture encoder."""
        return once(self.place / "ip", functools.partial(ip_adapters.adapters, checkpoint=self.checkpoint))

    @property
    def lora(self) -> Path:
        """A file with factors for all kinds of layers of the denoiser and of the text encoders."""

        def make(place: Path) -> None:
            kind = getattr(diffusers, f"{self.family.prefix}Pipeline")
            pipe = kind.from_pretrained(self.checkpoint, **silent(self.family))
            encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
            parts = {name: factors(pipe, name, TEXT, seed=1 + n) for n, name in enumerate(encoders)}
            stored(place, {"unet": factors(pipe, "unet", WHOLE), **parts})

        return once(self.place / "lora", make) / "pytorch_lora_weights.safetensors"


def silent(family: Family) -> dict[str, Any]:
    """What keeps diffusers from speaking of a safety checker that is not there."""
    return {} if family.prefix.endswith("XL") else {"safety_checker": None}


def class_name(family: Family, adapter: Adapter, task: str) -> str:
    """How both libraries call the pipeline."""
    if adapter.t2i:
        return f"{family.prefix}AdapterPipeline"
    return f"{family.prefix}{'ControlNet' if adapter.nets else ''}{TASKS[task]}Pipeline"


def call_of(family: Family, adapter: Adapter, task: str) -> dict[str, Any]:
    """The arguments of a call, the same for both libraries."""
    size = (family.height, family.width)
    call: dict[str, Any] = {"prompt": "a red cat", "negative_prompt": "blue", "guidance_scale": 5.0}
    call["num_inference_steps"] = 3 if task == "text-to-image" else 4
    if task != "text-to-image":
        call |= {"image": picture(*size), "strength": 0.8}
    if task == "inpaint":
        call["mask_image"] = mask(*size)
    if task != "image-to-image":
        call |= {"height": size[0], "width": size[1]}
    followed = [picture(*size, hue=1 + number) for number in range(adapter.nets or adapter.t2i)]
    if followed:
        name = "image" if task == "text-to-image" else "control_image"
        call[name] = followed[0] if len(followed) == 1 else followed
    if adapter.nets:
        call["controlnet_conditioning_scale"] = 0.7 if adapter.nets == 1 else [0.7, 0.4]
    if adapter.ip:
        call["ip_adapter_image"] = picture(20, 24)
    return call


def fitted(pipe: Any, adapter: Adapter, files: Files) -> Any:
    """A pipeline of either library with its LoRA and its IP-Adapter."""
    if adapter.lora:
        pipe.load_lora_weights(files.lora)
    if adapter.fused:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if adapter.ip:
        pipe.load_ip_adapter(files.ip, subfolder="models", weight_name=f"{adapter.ip}.safetensors")
        pipe.set_ip_adapter_scale(0.8)
    return pipe


def theirs(files: Files, adapter: Adapter, task: str) -> Trace:
    """diffusers' pictures."""
    family = files.family
    kind = getattr(diffusers, class_name(family, adapter, task))
    beside: dict[str, Any] = {}
    if adapter.nets:
        nets = [diffusers.ControlNetModel.from_pretrained(files.controlnet(n)) for n in range(adapter.nets)]
        beside["controlnet"] = nets[0] if len(nets) == 1 else nets
    if adapter.t2i:
        beside["adapter"] = diffusers.T2IAdapter.from_pretrained(files.t2i)
    pipe = fitted(kind.from_pretrained(files.checkpoint, **beside, **silent(family)), adapter, files)
    pipe.set_progress_bar_config(disable=True)
    latents: list[Any] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {}

    heard: dict[str, Any] = {"callback_on_step_end": keep}
    if adapter.t2i:  # whose pipelines know an older kind of callback alone
        heard = {"callback": lambda _step, _time, value: latents.append(value.numpy().copy())}
    images = pipe(generator=generator(SEED), output_type="np", **heard, **call_of(family, adapter, task)).images
    return Trace(latents, images)


@dataclass
class Engine:
    """Our pictures by one engine; the tasks of one adapter share what was opened."""

    name: str
    files: Files
    opened: dict[str, Any] = field(default_factory=dict)
    drawn: dict[tuple[str, str], Trace] = field(default_factory=dict)

    def trace(self, adapter: str, task: str) -> Trace:
        """The picture of a cell; raises AnamorphError where the engine refuses."""
        if (adapter, task) not in self.drawn:
            family, wanted = self.files.family, ADAPTERS[adapter]
            kind = getattr(anamorph, class_name(family, wanted, task))
            pipe = kind.from_pipe(self._pipe(adapter))
            self.drawn[adapter, task] = ours(pipe, SEED, **call_of(family, wanted, task))
        return self.drawn[adapter, task]

    def _pipe(self, name: str) -> Any:
        """The pipeline for texts with an adapter."""
        if name not in self.opened:
            files, adapter = self.files, ADAPTERS[name]
            beside: dict[str, Any] = {}
            if adapter.nets:
                beside["controlnet"] = [str(files.controlnet(n)) for n in range(adapter.nets)]
            if adapter.t2i:
                beside["adapter"] = str(files.t2i)
            kind = getattr(anamorph, class_name(files.family, adapter, "text-to-image"))
            pipe = kind.from_pretrained(files.checkpoint, backend=self.name, **beside)
            strangers = {one.engine for one in pipe.placement.values()} - {self.name}
            if strangers:
                raise AssertionError(f"parts ran on {', '.join(strangers)} instead")
            self.opened[name] = fitted(pipe, adapter, files)
        return self.opened[name]


def cell(engine: Engine, eager: Engine, adapter: str, task: str) -> dict[str, Any]:
    """The largest differences from diffusers (eager), or from eager; or a reason."""
    wanted = ADAPTERS[adapter]
    if wanted.t2i and task != "text-to-image":
        return {"reason": "diffusers has no such pipeline", "refused": True}
    try:
        found = engine.trace(adapter, task)
    except AnamorphError as error:
        return {"reason": str(error), "refused": True}
    if engine is not eager:
        return dict(zip(MEASURED, worst(found, eager.trace(adapter, task)), strict=True))
    effect = relative(found.latents[-1], eager.trace("none", task).latents[-1])
    return {**dict(zip(MEASURED, worst(found, theirs(engine.files, wanted, task)), strict=True)), "effect": effect}


def main(family: str, engine: str, place: str, *cells: str) -> None:
    """Print the cells' lines."""
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(place) / family
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(FAMILIES[family], folder)
    eager = Engine("eager", files)
    own = eager if engine == "eager" else Engine(engine, files)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    with shared_traces(), one_process():
        for name in cells:
            started = time.perf_counter()
            try:
                row = cell(own, eager, *name.split("|"))
            except Exception as error:  # whatever goes wrong is a row of the table
                row = {
                    "reason": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                    "refused": False,
                }
            answers.write(json.dumps({**row, "seconds": round(time.perf_counter() - started, 1)}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
