"""Stable Diffusion and SDXL that follow pictures by ControlNets (Zhang et al. 2023, arXiv:2302.05543)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anamorph.conditions import HINT, RESIDUALS, residual_ports
from anamorph.config import Config
from anamorph.denoiser_interfaces import hint_factor
from anamorph.errors import ConfigError
from anamorph.native import HINTING, preparing
from anamorph.pipelines import stable_diffusion as sd
from anamorph.pipelines import stable_diffusion_xl as xl
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.controlling import controlnet_fields
from anamorph.pipelines.controls import ControlNet
from anamorph.pipelines.denoiser import Opened
from anamorph.pipelines.followed import Followed, beside
from anamorph.pipelines.prompts import Family
from anamorph.pipelines.sampling import Plan, check_axes
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import Slots, model
from anamorph.pipelines.spans import table_of
from anamorph.pipelines.tasks import Task, from_noise, from_picture, inpaint, plain_or_inpainting

NETS = model("ControlNetModel", parts=("{slot}", "{slot}" + HINTING), several="MultiControlNetModel")


class Controlled(Followed, public=False):
    """What the pipelines below share."""

    PLACE: ClassVar[str] = "controlnet"
    CALLED: ClassVar[str] = "ControlNet"
    CHANNELS: ClassVar[str] = "conditioning_channels"

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        for name in self.nets:
            check_net(name, self._config(name), self._config("unet"), self.vae_scale_factor)

    __init__.__doc__ = Followed.__init__.__doc__

    def _more(self, call: Arguments, prompts: int) -> dict[str, Any]:
        return {**super()._more(call, prompts), **controlnet_fields(call, len(self.nets))}

    def plan(self, job: Job) -> Plan:
        plan = super().plan(job)
        self._check_takes(RESIDUALS)
        # A way that is not gone to its end counts as a whole, as in diffusers.
        whole = table_of(self.scheduler, replace(job.request, denoising_end=None), self.TASK.distilled)
        controls = (self._control(index, job, plan, len(whole.rows)) for index in range(len(self.nets)))
        return replace(plan, controls=tuple(controls))

    plan.__doc__ = Followed.plan.__doc__

    def _control(self, index: int, job: Job, plan: Plan, rows: int) -> ControlNet:
        """One net with its picture, and its weight in each of so many rows."""
        name, request = self.nets[index], job.request
        scales, starts, ends = (getattr(request, field) for field in FIELDS)
        inside = [starts[index] <= row / rows and (row + 1) / rows <= ends[index] for row in range(rows)]
        pooled = [bool(self._config(each).get("global_pool_conditions")) for each in self.nets]
        alone = bool(request.guess_mode) or pooled[0]
        programs = self._models[name].programs
        sides = {
            "latent_height": request.height // self.vae_scale_factor,
            "latent_width": request.width // self.vae_scale_factor,
        }
        for branches in (1,) if alone else plan.guidance.counts:
            what = f"{request.images} of {request.height}x{request.width} pixels in {branches} branches"
            check_axes(programs[name], branches, request.images, sides, what)
        return ControlNet(
            Opened.of(programs[name], programs.get(preparing(name))),
            self._seen(programs[name + HINTING], job, job.controls[index])[HINT],
            tuple(scales[index] * counts for counts in inside),
            alone=alone,
            gradual=alone and not pooled[index],
        )


FIELDS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
"""What a request holds for each net."""


def check_net(name: str, net: Config, unet: Config, factor: int) -> None:
    """Raise ConfigError where a ControlNet does not fit a denoiser, or an autoencoder of `factor` pixels per latent."""
    ours, theirs = ([tuple(map(str, port.axes[1:])) for port in residual_ports(config)] for config in (net, unet))
    if len(ours) != len(theirs):
        raise ConfigError(f"{name} gives {len(ours)} residuals, the unet takes {len(theirs)}; take one made for it")
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            raise ConfigError(
                f"residual {index} of {name} has {mine[0]} channels, the unet takes {other[0]} at that place; take one "
                "that was made for it"
            )
    widths = [config.get("encoder_hid_dim") or config["cross_attention_dim"] for config in (net, unet)]
    if widths[0] != widths[1]:
        raise ConfigError(f"{name} looks at texts {widths[0]} wide, the unet at {widths[1]}; take one made for it")
    if net.get("addition_embed_type") != unet.get("addition_embed_type"):
        raise ConfigError(f"{name} and the unet are told other things beside the text; take one that was made for it")
    if hint_factor(net) != factor:
        raise ConfigError(
            f"{name} has {hint_factor(net)} pixels of its picture per latent, the autoencoder {factor}; take one for it"
        )


LATER = "controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end"
SD = f"guidance_scale negative_prompt num_images_per_prompt eta generator latents {sd.LOOKING} {LATER} {sd.WATCHED}"


class StableDiffusionControlNetPipeline(Controlled):
    """Text to image along one or several pictures."""

    SLOTS: ClassVar[Slots] = beside(sd.DRAWING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = sd.OPTIONS
    TAKES = Signature.of(
        f"prompt image height width num_inference_steps timesteps sigmas {SD} * guidance_rescale {sd.WHEN} {sd.OURS}"
    )
    TASK = Task(from_noise)


class StableDiffusionControlNetImg2ImgPipeline(Controlled):
    """Image to image along further pictures."""

    SLOTS: ClassVar[Slots] = beside(sd.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = sd.OPTIONS
    TAKES = Signature.of(
        f"prompt image control_image height width strength num_inference_steps {SD} * "
        f"timesteps sigmas guidance_rescale {sd.WHEN} {sd.OURS}",
        strength=0.8, controlnet_conditioning_scale=0.8,
    )  # fmt: skip
    FOLLOWS = "control_image"
    TASK = Task(from_picture, ("image",))


class StableDiffusionControlNetInpaintPipeline(Controlled):
    """Inpainting along further pictures, with a model made for inpainting or with any other."""

    SLOTS: ClassVar[Slots] = beside(sd.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = sd.OPTIONS
    TAKES = Signature.of(
        f"prompt image mask_image control_image height width padding_mask_crop strength num_inference_steps {SD} * "
        f"timesteps sigmas guidance_rescale {sd.WHEN} {sd.OURS}",
        strength=1.0, controlnet_conditioning_scale=0.5,
    )  # fmt: skip
    FOLLOWS = "control_image"
    TASK = Task(inpaint, ("image", "mask_image"), channels=plain_or_inpainting)


XL = (
    "guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta generator latents prompt_embeds "
    "negative_prompt_embeds"
)
POOLED = "pooled_prompt_embeds negative_pooled_prompt_embeds"
CALLED = f"{sd.RETURNED} cross_attention_kwargs"
SHOWN = f"{POOLED} {sd.SHOWN} {CALLED}"
SIZES = "original_size crops_coords_top_left target_size"
NEGATIVE = "negative_original_size negative_crops_coords_top_left negative_target_size"
OURS = f"{sd.WHEN} {sd.OURS}"


class StableDiffusionXLControlNetPipeline(Controlled):
    """Text to image with SDXL along one or several pictures."""

    SLOTS: ClassVar[Slots] = beside(xl.DRAWING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.BASE
    FAMILY: ClassVar[Family] = xl.FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 image height width {xl.STEPS} denoising_end {XL} {SHOWN} {LATER} {SIZES} "
        f"{NEGATIVE} {sd.WATCHED} * guidance_rescale {OURS}",
        guidance_scale=5.0,
    )
    TASK = Task(from_noise)


class StableDiffusionXLControlNetImg2ImgPipeline(Controlled):
    """Image to image with SDXL along further pictures."""

    SLOTS: ClassVar[Slots] = beside(xl.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.REFINING
    FAMILY: ClassVar[Family] = xl.FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 image control_image height width strength num_inference_steps {XL} {SHOWN} "
        f"{LATER} {SIZES} {NEGATIVE} {xl.SCORED} {sd.WATCHED} * timesteps sigmas guidance_rescale {OURS}",
        strength=0.8, guidance_scale=5.0, controlnet_conditioning_scale=0.8,
    )  # fmt: skip
    FOLLOWS = "control_image"
    TASK = Task(from_picture, ("image",))


class StableDiffusionXLControlNetInpaintPipeline(Controlled):
    """Inpainting with SDXL along further pictures."""

    SLOTS: ClassVar[Slots] = beside(xl.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.REFINING
    FAMILY: ClassVar[Family] = xl.FAMILY
    TAKES = Signature.of(
        f"prompt prompt_2 image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"denoising_start denoising_end {XL} {sd.SHOWN} {POOLED} {CALLED} {LATER} guidance_rescale {SIZES} {xl.SCORED} "
        f"{sd.WATCHED} * timesteps sigmas {NEGATIVE} {OURS}",
        strength=0.9999, guidance_scale=5.0,
    )  # fmt: skip
    FOLLOWS = "control_image"
    TASK = Task(inpaint, ("image", "mask_image"), channels=plain_or_inpainting)
