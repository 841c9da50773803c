"""SDXL that follows pictures of several kinds by one ControlNet for all of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from anamorph.arrays import Array
from anamorph.conditions import CONTROL_KIND, CONTROL_TYPE, CONTROL_WEIGHT, HINT
from anamorph.native import HINTING
from anamorph.pipelines import controlnet as plain
from anamorph.pipelines import stable_diffusion as sd
from anamorph.pipelines import stable_diffusion_xl as xl
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.controlling import Following, union_fields
from anamorph.pipelines.controlnet import Followings
from anamorph.pipelines.followed import beside
from anamorph.pipelines.prompts import Family
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import Slots, model
from anamorph.pipelines.tasks import Task, from_noise, from_picture, inpaint, plain_or_inpainting

NETS = model("ControlNetUnionModel", parts=("{slot}", "{slot}" + HINTING), several="MultiControlNetUnionModel")


class United(plain.Controlled, public=False):
    """What the pipelines below share: one net follows any number of pictures, of several nets each follows one."""

    FOLLOWS: ClassVar[str] = "control_image"
    FAMILY: ClassVar[Family] = xl.FAMILY

    @property
    def kinds(self) -> list[int]:
        """How many kinds of pictures each net knows."""
        return [self._config(name)["num_control_type"] for name in self.nets]

    @property
    def _following(self) -> Following:
        return replace(super()._following, open=True)

    def _fields(self, call: Arguments) -> dict[str, Any]:
        return union_fields(call, self.kinds)

    def _followed(self, index: int, job: Job, rows: int) -> Followings:
        kinds, scales = job.request.control_mode, job.request.controlnet_conditioning_scale
        assert kinds is not None
        assert scales is not None
        name, alone = self.nets[index], len(job.controls) == len(self.nets)
        program = self._models[name].programs[name + HINTING]
        arrays, own = program.arrays, [index] if len(self.nets) > 1 else range(len(job.controls))
        seen = [
            self._seen(program, job, job.controls[each], {
                CONTROL_KIND: np.array(kinds[each], np.int64),
                CONTROL_WEIGHT: np.array(1.0 if alone else scales[each], np.float32),
            })[HINT]
            for each in own
        ]  # fmt: skip
        inside = list(zip(*(plain.inside(job.request, each, rows) for each in own), strict=True))
        shown = np.zeros((1, self.kinds[index]), np.float32)
        shown[0, [kinds[each] for each in own]] = 1
        hints = {counts: _sum(seen, counts) for counts in set(inside)}
        # Of several pictures each weighs what it adds to the net's first state, and not what the net adds.
        weights = tuple(scales[index] * counts[0] if alone else 1.0 for counts in inside)
        return tuple(hints[counts] for counts in inside), weights, {CONTROL_TYPE: arrays.put(shown)}


def _sum(seen: list[Array], counts: tuple[bool, ...]) -> Array:
    """What those pictures add that count."""
    total = 0.0 * seen[0]
    for each, counted in zip(seen, counts, strict=True):
        total = total + each if counted else total
    return total


LATER = f"{plain.LATER} control_mode"


class StableDiffusionXLControlNetUnionPipeline(United):
    """Text to image with SDXL along pictures of one or several kinds."""

    SLOTS: ClassVar[Slots] = beside(xl.DRAWING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.BASE
    TAKES = Signature.of(
        f"prompt prompt_2 control_image height width {xl.STEPS} denoising_end {plain.XL} {plain.SHOWN} {LATER} "
        f"{plain.SIZES} {plain.NEGATIVE} {sd.WATCHED} * guidance_rescale {plain.OURS}",
        guidance_scale=5.0,
    )
    TASK = Task(from_noise)


class StableDiffusionXLControlNetUnionImg2ImgPipeline(United):
    """Image to image with SDXL along further pictures of one or several kinds."""

    SLOTS: ClassVar[Slots] = beside(xl.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.REFINING
    TAKES = Signature.of(
        f"prompt prompt_2 image control_image height width strength num_inference_steps {plain.XL} {plain.SHOWN} "
        f"{LATER} {plain.SIZES} {plain.NEGATIVE} {xl.SCORED} {sd.WATCHED} * timesteps sigmas guidance_rescale "
        f"{plain.OURS}",
        strength=0.8, guidance_scale=5.0, controlnet_conditioning_scale=0.8,
    )  # fmt: skip
    TASK = Task(from_picture, ("image",))


class StableDiffusionXLControlNetUnionInpaintPipeline(United):
    """Inpainting with SDXL along further pictures of one or several kinds."""

    SLOTS: ClassVar[Slots] = beside(xl.EDITING, "controlnet", NETS)
    OPTIONS: ClassVar[Mapping[str, Any]] = xl.REFINING
    TAKES = Signature.of(
        f"prompt prompt_2 image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"denoising_start denoising_end {plain.XL} {sd.SHOWN} {plain.POOLED} {plain.CALLED} {LATER} guidance_rescale "
        f"{plain.SIZES} {xl.SCORED} {sd.WATCHED} * timesteps sigmas {plain.NEGATIVE} {plain.OURS}",
        strength=0.9999, guidance_scale=5.0,
    )  # fmt: skip
    TASK = Task(inpaint, ("image", "mask_image"), channels=plain_or_inpainting)
