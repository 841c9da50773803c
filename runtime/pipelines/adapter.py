"""Stable Diffusion and SDXL that follow pictures by T2I-Adapters (Mou et al. 2023, arXiv:2302.08453)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anamorph.conditions import INTRABLOCK, intrablock_ports
from anamorph.config import Config
from anamorph.denoiser_interfaces import adapter_interface
from anamorph.errors import ConfigError
from anamorph.pipelines import stable_diffusion as sd
from anamorph.pipelines import stable_diffusion_xl as xl
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.controlling import adapter_fields
from anamorph.pipelines.controls import Features, moved, total
from anamorph.pipelines.followed import Followed, beside
from anamorph.pipelines.prompts import Family
from anamorph.pipelines.sampling import Plan
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import model
from anamorph.pipelines.tasks import Task, from_noise

NETS = model("T2IAdapter", several="MultiAdapter")


class Adapted(Followed, public=False):
    """What the pipelines below share."""

    PLACE: ClassVar[str] = "adapter"
    CALLED: ClassVar[str] = "T2I-Adapter"
    CHANNELS: ClassVar[str] = "in_channels"

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        for name in self.nets:
            check_adapter(name, self._config(name), self._config("unet"), self.vae_scale_factor)

    __init__.__doc__ = Followed.__init__.__doc__

    @property
    def _multiple(self) -> int:
        return math.lcm(self.vae_scale_factor, *(self._config(name)["downscale_factor"] for name in self.nets))

    def _more(self, call: Arguments, prompts: int) -> dict[str, Any]:
        return {**super()._more(call, prompts), **adapter_fields(call, len(self.nets))}

    def plan(self, job: Job) -> Plan:
        plan, request = super().plan(job), job.request
        self._check_takes(INTRABLOCK)
        scales, part = request.adapter_conditioning_scale, request.adapter_conditioning_factor
        assert scales is not None
        assert part is not None
        own = self._models[self.nets[0]].programs[self.nets[0]].arrays
        weighed = []
        for name, scale, pictures in zip(self.nets, scales, job.controls, strict=True):
            program = self._models[name].programs[name]
            seen = self._seen(program, job, pictures)
            weighed.append({port: scale * moved(value, program.arrays, own) for port, value in seen.items()})
        steps = len(plan.table.rows) if request.denoising_end is not None else request.num_inference_steps
        rows = int((steps or len(plan.table.rows)) * part)
        return replace(plan, controls=(Features(total(weighed), own, rows),))

    plan.__doc__ = Followed.plan.__doc__


def check_adapter(name: str, adapter: Config, unet: Config, factor: int) -> None:
    """Raise ConfigError where an adapter does not fit a denoiser, or an autoencoder of `factor` pixels per latent."""
    places = {port.name: port for port in intrablock_ports(unet)}
    features = adapter_interface(adapter).outputs
    blocks = len(unet["down_block_types"])
    if len(features) not in (blocks, blocks + 1) or len(features) > len(places):
        raise ConfigError(
            f"{name} gives {len(features)} features, the unet has {blocks} blocks on its way down; take one made for it"
        )
    for port in features:
        place = places[port.name]
        if port.axes[1] != place.axes[1]:
            raise ConfigError(
                f"{port.name} of {name} has {port.axes[1]} channels, the unet takes {place.axes[1]} there; take one "
                "that was made for it"
            )
        scales = [factor * place.axes[2].denominator, port.axes[2].denominator]  # type: ignore[union-attr]
        if scales[0] != scales[1]:
            raise ConfigError(
                f"{port.name} of {name} stands for {scales[1]} pixels along a side, that of the unet for {scales[0]}; "
                "take one that was made for it"
            )


class StableDiffusionAdapterPipeline(Adapted):
    """Text to image along one or several pictures."""

    SLOTS: ClassVar[Mapping[str, Any]] = {
        name: slot for name, slot in beside(sd.DRAWING, "adapter", NETS).items() if name != "image_encoder"
    }
    OPTIONS: ClassVar[Mapping[str, Any]] = sd.OPTIONS
    TAKES = Signature.of(
        f"prompt image height width {sd.GUIDED} latents {sd.EMBEDDED} adapter_conditioning_scale clip_skip * "
        "adapter_conditioning_factor callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale "
        f"{sd.WHEN} {sd.OURS}"
    )
    TASK = Task(from_noise)


class StableDiffusionXLAdapterPipeline(Adapted):
    """Text to image with SDXL along one or several pictures."""

    SLOTS: ClassVar[Mapping[str, Any]] = beside(xl.DRAWING, "adapter", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = {name: value for name, value in xl.BASE.items() if name != "add_watermarker"}
    FAMILY: ClassVar[Family] = xl.FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 image height width {xl.STEPS} denoising_end {xl.GUIDED} {xl.EMBEDDED} {xl.TOLD} "
        f"adapter_conditioning_scale adapter_conditioning_factor clip_skip * callback_on_step_end "
        f"callback_on_step_end_tensor_inputs {sd.WHEN} {sd.OURS}",
        guidance_scale=5.0,
    )
    TASK = Task(from_noise)
